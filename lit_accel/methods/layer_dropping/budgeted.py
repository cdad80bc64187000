"""What a budget of blocks comes to in which step: pure functions of its settings and of the length of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning.pytorch as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.anatomy import Anatomy
from lit_accel.compute.flops import training_flops
from lit_accel.methods.compatibility import SBLD
from lit_accel.methods.layer_dropping.budget import allocate
from lit_accel.methods.layer_dropping.callback import LayerDropping
from lit_accel.methods.layer_dropping.kept_schedule import kept_share
from lit_accel.methods.layer_dropping.refusals import droppable_blocks
from lit_accel.schedules import num_steps_of


class BudgetedLayerDropping(LayerDropping):
    """Base of :class:`~lit_accel.SensitivityLayerDropping`: how much of the blocks' FLOPs is kept when."""

    title = SBLD
    measures_blocks = True

    kept: float
    min_keep: float
    warmup: int | float
    ramp: int | float
    release: int | float
    measure_every: int | float
    _next: int | None

    @property
    def drops(self) -> bool:
        """Whether any block is ever dropped."""
        return self.kept < 1

    @property
    def needs_length(self) -> bool:
        """Whether the schedule depends on the length of the run."""
        return self.drops

    def plan(self, trainer: L.Trainer) -> None:
        """Resolve the schedule."""
        if self.num_steps is None:
            return
        self._warmup, self._ramp, self._release, self._interval = (
            num_steps_of(duration, self.num_steps)
            for duration in (self.warmup, self.ramp, self.release, self.measure_every)
        )
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            # A rehearsal of a few steps has no room for the durations of the run that it rehearses.
            self._warmup, self._ramp, self._release = (
                min(steps, self.num_steps // 3) for steps in (self._warmup, self._ramp, self._release)
            )
        excess = self._warmup + self._ramp + self._release - self.num_steps
        if 0 < excess <= 2 and all(isinstance(share, float) for share in (self.warmup, self.ramp, self.release)):
            # Shares that add up to the whole run may be rounded to more than it.
            self._ramp = max(0, self._ramp - excess)
        try:
            self._kept_share(0)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        if self._next is None:
            self._next = self._warmup

    def _kept_share(self, step: int) -> float:
        assert self.num_steps is not None
        return kept_share(
            step, self.num_steps, kept=self.kept, warmup=self._warmup, ramp=self._ramp, release=self._release
        )

    def plan_blocks(self, anatomy: Anatomy, num_tokens: int) -> Callable[[int], Sequence[float]]:
        """Return what says with which probability blocks run, were all of them equally sensitive.

        What the blocks cost together is the budget, whatever is measured; measurements come on top, up to
        ``max_overhead``.

        Args:
            anatomy: The model.
            num_tokens: Tokens of a sequence.
        """
        costs = training_flops(anatomy, 1, num_tokens).blocks
        units = droppable_blocks(anatomy, self.pinned, type(self).__name__)
        always = set(range(len(costs))) - set(units) | {units[0], units[-1]}
        made: dict[float, list[float]] = {}

        def at(step: int) -> list[float]:
            kept = round(self._kept_share(step), 4)
            if kept not in made:
                made[kept] = allocate(kept, costs, min_keep=self.min_keep, always=always, allocation="uniform")
            return made[kept]

        return at
