"""Sparsity variation: how sparse a run is at each step, and when its topology changes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from lit_accel.schedules import num_steps_of

Stages = Sequence[tuple[int | float, float]]
"""Pairs of a start, in optimizer steps (int) or as a share of the run (float), and the sparsity from there on."""

# The spans of the paper are unknown. Dense for 1 % of the run, down to a tenth by 6 %, back from 80 % on, and 5 % dense
# at the end.
DEFAULT_STAGES: tuple[tuple[float, float], ...] = (
    (0.0, 0.0),
    (0.01, 0.3),
    (0.02, 0.6),
    (0.04, 0.8),
    (0.06, 0.9),
    (0.80, 0.8),
    (0.85, 0.6),
    (0.90, 0.3),
    (0.95, 0.0),
)


@dataclass(frozen=True)
class SparsitySchedule:
    """The stages of a run in optimizer steps: warm-up, ultra-sparsification and restoration.

    Args:
        starts: First step of each stage, increasing; the first is 0.
        sparsities: Share of the units that are off, stage by stage, in [0, 1).
        num_steps: Length of the run.
        update_every: Optimizer steps between updates of the topology.
        drop_fraction: Share of the active units that the first update would replace.
    """

    starts: tuple[int, ...]
    sparsities: tuple[float, ...]
    num_steps: int
    update_every: int = 100
    drop_fraction: float = 0.3

    @classmethod
    def of(
        cls, stages: Stages, num_steps: int, update_every: int = 100, drop_fraction: float = 0.3
    ) -> SparsitySchedule:
        """Place stages in a run.

        Args:
            stages: See :data:`Stages`.
            num_steps: Length of the run in optimizer steps. Of stages that fall on one step the last one holds.
            update_every: See :class:`SparsitySchedule`.
            drop_fraction: See there.

        Raises:
            ValueError: If the stages are out of order.
        """
        placed: dict[int, float] = {}
        last = 0
        for start, sparsity in stages:
            step = num_steps_of(start, num_steps)
            if step < last:
                raise ValueError(
                    f"The stages of the sparsity are out of order: one that starts at {start} is step {step} of "
                    f"{num_steps}, after one that starts at step {last}. List them by their starts."
                )
            placed[step] = float(sparsity)
            last = step
        return cls(tuple(placed), tuple(placed.values()), num_steps, update_every, drop_fraction)

    def stage(self, step: int) -> int:
        """Return the index of the stage that a step belongs to."""
        return bisect_right(self.starts, step) - 1

    def sparsity(self, step: int) -> float:
        """Return the share of the units that are off from this step's optimizer step on."""
        return self.sparsities[self.stage(step)]

    @property
    def restoration_start(self) -> int | None:
        """The step from which on units only come back; ``None`` if there is none."""
        changes = [after - before for before, after in zip((0.0, *self.sparsities), self.sparsities, strict=False)]
        last_rise = max((index for index, change in enumerate(changes) if change > 0), default=0)
        return next((self.starts[index] for index in range(last_rise, len(changes)) if changes[index] < 0), None)

    def drop_fraction_at(self, step: int) -> float:
        """Return which share of the active units an update at this step replaces.

        Half a period of a cosine: from ``drop_fraction`` at step 0 to 0 where restoration starts or, without one, where
        the run ends.
        """
        end = self.num_steps if self.restoration_start is None else self.restoration_start
        return 0.0 if step >= end else self.drop_fraction / 2 * (1 + math.cos(math.pi * step / end))

    def is_event(self, step: int) -> bool:
        """Whether the topology changes in this step.

        It does where a stage starts and, between the first sparse one and restoration, every ``update_every`` steps.
        The published code waits with a new sparsity for the next of these: of a run shorter than 10,000 steps the
        warm-up of the default stages would shrink to one update.
        """
        if step in self.starts:
            index = self.starts.index(step)
            if self.sparsities[index] != (self.sparsities[index - 1] if index else 0.0):
                return True
        is_sparse = self.sparsity(step) > 0
        return is_sparse and step % self.update_every == 0 and self.drop_fraction_at(step) > 0
