"""Progressive layer dropping (PLD) as a Lightning callback."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.anatomy import Anatomy, anatomy_of, find_transformer
from lit_accel.arguments import is_number, require_duration, require_one_of
from lit_accel.methods.compatibility import PLD
from lit_accel.methods.layer_dropping.callback import LayerDropping
from lit_accel.methods.layer_dropping.dropper import Scale
from lit_accel.methods.layer_dropping.progressive import Convention, Direction, keep_probabilities, theta_at
from lit_accel.methods.layer_dropping.refusals import droppable_blocks, require_gradient
from lit_accel.methods.layer_dropping.sampling import Sampler
from lit_accel.schedules import num_steps_of

_SECTION = "progressive_layer_drop"


class ProgressiveLayerDropping(LayerDropping):
    """Skips blocks at random, deeper ones more often, and more of them as training goes on (PLD; arXiv 2010.13369).

    A skipped block costs nothing, forward and backward, and its parameters stay as they are in that optimizer step. One
    mask holds for a whole step, on all micro-batches and ranks; evaluation and generation use every block.

    Deviations from the paper: by default nothing is scaled, since runs ended lower without it (docs/results;
    ``scale="sublayer"`` is the paper's); as many blocks run in every step as their probabilities sum up to
    (``sampler="bernoulli"`` is the paper's); the schedule follows the length of the run unless ``gamma`` is given.

    Logged every ``Trainer.log_every_n_steps`` steps: ``layer_dropping/kept_blocks``, ``layer_dropping/kept_flops`` and
    ``layer_dropping/planned_flops`` (shares of the blocks' FLOPs, since the last time), ``layer_dropping/theta``, and
    ``layer_dropping/keep_probability/<block>``.

    Args:
        theta: Keep probability of the deepest block when dropping is strongest, in (0, 1]. The paper recommends 0.5; 1
            drops nothing.
        gamma: Rate at which theta is approached, per optimizer step, as DeepSpeed takes it. Default: ``gamma_factor``
            divided by the number of steps of the run. Only for ``direction="increasing"``.
        gamma_factor: The rate times the length of the run; default is 100, the paper's rule of thumb, which does 99 %
            of the way within 4.6 % of the run.
        convention: How keep probabilities fall with depth: ``"paper"``, ``"deepspeed"`` or ``"timm"``; see
            :func:`~lit_accel.methods.layer_dropping.keep_probabilities`.
        direction: ``"increasing"``: ever more is dropped, as published. ``"decreasing"``: ever less, with a fully
            active tail, as later work argues (arXiv 2402.05913).
        release: The end of the run in which all blocks come back: optimizer steps (int) or a share of the run (float).
            Increasing, theta rises linearly to 1 in it; default is 0, as published. Decreasing, all blocks are
            active in it; default is 0.2.
        pinned: Indices of blocks that always run; negative ones count from the last. The depth rule counts the others.
        sampler: ``"systematic"`` or ``"bernoulli"``; see :func:`~lit_accel.methods.layer_dropping.sample_blocks`.
        scale: ``"block"``, ``"sublayer"`` or ``"none"``; see :class:`~lit_accel.methods.layer_dropping.BlockDropper`.
            Where norms stand after the addition, as in BERT, only ``"none"``.
        seed: Seed of the draws.
        check_ranks_every: With several processes, after how many optimizer steps they compare their masks.

    Raises:
        ValueError: If an argument is none of the allowed values.

    Example::

        Trainer(max_steps=10_000, callbacks=[ProgressiveLayerDropping(theta=0.5)])
    """

    title = PLD

    def __init__(
        self,
        theta: float = 0.5,
        gamma: float | None = None,
        gamma_factor: float | None = None,
        convention: Convention = "paper",
        direction: Direction = "increasing",
        release: int | float | None = None,
        pinned: Sequence[int] = (),
        sampler: Sampler = "systematic",
        scale: Scale = "none",
        seed: int = 0,
        check_ranks_every: int = 100,
    ) -> None:
        super().__init__(pinned=pinned, sampler=sampler, scale=scale, seed=seed, check_ranks_every=check_ranks_every)
        if not is_number(theta) or not 0 < theta <= 1:
            raise ValueError(f"theta is {theta!r}; it is a keep probability and must be in (0, 1].")
        require_one_of("convention", convention, get_args(Convention))
        require_one_of("direction", direction, get_args(Direction))
        for argument, rate in (("gamma", gamma), ("gamma_factor", gamma_factor)):
            if rate is None:
                continue
            if not is_number(rate) or rate <= 0:
                raise ValueError(f"{argument} is {rate!r}; it is a rate and must be positive.")
            if direction == "decreasing":
                rank_zero_warn(f'{argument} is ignored: it is for direction="increasing".')
        if gamma is not None and gamma_factor is not None:
            raise ValueError("gamma and gamma_factor are two ways to say the same; give one of them.")
        if release is None:
            release = 0.2 if direction == "decreasing" else 0
        require_duration("release", release)
        self.theta = theta
        self.gamma = gamma
        self.gamma_factor = 100.0 if gamma_factor is None else gamma_factor
        self.convention: Convention = convention
        self.direction: Direction = direction
        self.release = release
        self._release_steps = 0

    @classmethod
    def from_deepspeed(cls, config: Mapping[str, Any] | str | Path, **options: Any) -> ProgressiveLayerDropping:
        """Translate the ``progressive_layer_drop`` section of a DeepSpeed configuration.

        The published reference draws each block by itself and never drops the first, so that is what this sets. It
        scales, too, by what does not belong to the probabilities that it draws with; here the default holds.

        Args:
            config: The configuration, that section of it, or a JSON file with one of them.
            **options: Further arguments of this class, which override what is translated.

        Raises:
            ValueError: If there is no such section, it is not enabled, or a value is missing or unknown.
        """
        section: Any = json.loads(Path(config).read_text()) if isinstance(config, (str, Path)) else config
        if not isinstance(section, Mapping):
            raise ValueError(f"A DeepSpeed configuration is a mapping; this is a {type(section).__name__}.")
        section = section.get(_SECTION, section)
        if not isinstance(section, Mapping) or "enabled" not in section:
            keys = list(section) if isinstance(section, Mapping) else section
            raise ValueError(f'No section "{_SECTION}" with "enabled", "theta" and "gamma" was found, but {keys!r}.')
        if unknown := section.keys() - {"enabled", "theta", "gamma"}:
            raise ValueError(
                f'"{_SECTION}" has the unknown keys {sorted(unknown)}; known are enabled, theta and gamma.'
            )
        if not section["enabled"]:
            raise ValueError(f'"{_SECTION}" is not enabled: leave the callback out.')
        if missing := {"theta", "gamma"} - section.keys():
            raise ValueError(f'"{_SECTION}" is enabled but lacks {", ".join(sorted(missing))}; DeepSpeed needs both.')
        translated = {
            "theta": section["theta"],
            "gamma": section["gamma"],
            "convention": "deepspeed",
            "sampler": "bernoulli",
        }
        return cls(**{**translated, **options})

    @property
    def drops(self) -> bool:
        """Whether any block is ever dropped."""
        return self.theta < 1

    @property
    def needs_length(self) -> bool:
        """Whether the schedule depends on the length of the run."""
        return self.drops and (self.direction == "decreasing" or self.gamma is None or self.release != 0)

    def plan(self, trainer: L.Trainer) -> None:
        """Resolve the end of the run."""
        if self.num_steps is None:
            return
        self._release_steps = num_steps_of(self.release, self.num_steps)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            # A rehearsal of a few steps has no room for the durations of the run that it rehearses.
            self._release_steps = min(self._release_steps, self.num_steps // 2)
        if self._release_steps > self.num_steps or (
            self.direction == "decreasing" and self._release_steps == self.num_steps
        ):
            raise MisconfigurationException(
                f"release is {self._release_steps} optimizer steps, but the run has {self.num_steps}: nothing would be "
                "dropped. Make it shorter, or a share of the run such as 0.2."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that no step is left without a gradient, and intercept the blocks."""
        transformer = find_transformer(pl_module)[1]
        # Of a run that goes on in mid-way, those of the size that it has by now.
        anatomy = anatomy_of(transformer)
        if units := self._units_of(anatomy):
            last = zip(units, keep_probabilities(self.theta, len(units), self.convention), strict=True)
            least = {unit: p for unit, p in last if p < 1}
            # The other sampler keeps as many as are expected, rounded down or up.
            num_kept = 0 if self.sampler == "bernoulli" else math.floor(math.fsum(least.values()))
            require_gradient(pl_module, transformer, anatomy, list(least), len(least) - num_kept)
        super().on_train_start(trainer, pl_module)

    def theta_at(self, step: int) -> float:
        """Return the keep probability of the deepest block at an optimizer step."""
        num_steps = self.num_steps or 0
        gamma = self.gamma if self.gamma is not None else self.gamma_factor / max(num_steps, 1)
        return theta_at(
            step,
            theta=self.theta,
            gamma=gamma,
            direction=self.direction,
            release=self._release_steps,
            num_steps=num_steps,
        )

    def probabilities(self, step: int) -> list[float]:
        """Return the keep probability of each block at an optimizer step; pinned ones have 1."""
        assert self.anatomy is not None
        return self._by_depth(self._coordinator.schedule_step(step), self.units, len(self.anatomy.blocks))

    def plan_blocks(self, anatomy: Anatomy, num_tokens: int) -> Callable[[int], Sequence[float]]:
        """Return what says the same for a model of any size.

        Args:
            anatomy: The model.
            num_tokens: Has no influence.
        """
        units = droppable_blocks(anatomy, self.pinned, type(self).__name__)
        return partial(self._by_depth, units=units, num_blocks=len(anatomy.blocks))

    def _by_depth(self, step: int, units: Sequence[int], num_blocks: int) -> list[float]:
        probabilities = [1.0] * num_blocks
        for index, p in zip(units, keep_probabilities(self.theta_at(step), len(units), self.convention), strict=True):
            probabilities[index] = p
        return probabilities

    def metrics(self) -> dict[str, float]:
        """Return theta."""
        return {"layer_dropping/theta": self.theta_at(self._coordinator.schedule_step(self._step or 0))}

    def _rules(self) -> dict[str, Any]:
        own = ("theta", "gamma", "gamma_factor", "convention", "direction", "release")
        return {**super()._rules(), **{name: getattr(self, name) for name in own}}
