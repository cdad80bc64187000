"""What was measured and decided over a run, and its picture: layers by time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class History:
    """Sensitivities at each measurement, and keep probabilities at some steps.

    Args:
        measured_at: Optimizer steps of the measurements.
        sensitivities: One list a measurement, one value a block.
        kept_at: Optimizer steps at which keep probabilities were noted.
        keep_probabilities: One list for each of them, one value a block.
    """

    measured_at: list[int] = field(default_factory=list)
    sensitivities: list[list[float]] = field(default_factory=list)
    kept_at: list[int] = field(default_factory=list)
    keep_probabilities: list[list[float]] = field(default_factory=list)

    def add_sensitivities(self, step: int, values: Sequence[float]) -> None:
        """Note a measurement."""
        self.measured_at.append(step)
        self.sensitivities.append(list(values))

    def add_keep(self, step: int, values: Sequence[float], *, every: int) -> None:
        """Note keep probabilities, if ``every`` steps have passed since the last time."""
        if not self.kept_at or step >= self.kept_at[-1] + every:
            self.kept_at.append(step)
            self.keep_probabilities.append(list(values))

    def to_state(self) -> dict[str, Any]:
        """Return lists of numbers."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """Read what :meth:`to_state` wrote."""
        return cls(**{name: list(values) for name, values in state.items()})

    def draw(self, path: Path, units: Sequence[int], num_steps: int) -> None:
        """Draw sensitivities and keep probabilities, layers by time.

        Args:
            path: The file to write; its folder is made.
            units: The blocks that could be dropped; only their sensitivities were measured.
            num_steps: The step at which the pictures end.
        """
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        num_blocks = len(self.sensitivities[0])
        rows = [
            [values[i] if i in units and values[i] > 0 else float("nan") for i in range(num_blocks)]
            for values in self.sensitivities
        ]
        positive = [value for row in rows for value in row if value > 0]
        norm = LogNorm(min(positive), max(positive)) if positive and min(positive) < max(positive) else None
        for axes, steps, values, title, options in (
            (left, self.measured_at, rows, "sensitivity", {"norm": norm, "cmap": "viridis"}),
            (right, self.kept_at, self.keep_probabilities, "keep probability", {"vmin": 0, "vmax": 1, "cmap": "magma"}),
        ):
            image = axes.pcolormesh(
                [*steps, max(num_steps, steps[-1] + 1)],
                [index - 0.5 for index in range(num_blocks + 1)],
                list(zip(*values, strict=True)),
                **options,
            )
            image.axes.set_facecolor("0.85")
            figure.colorbar(image, ax=axes)
            axes.set(title=title, xlabel="optimizer step", ylabel="block")
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.invert_yaxis()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
