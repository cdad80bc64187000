"""What mixed sparsity training does in which step: pure functions of its settings and of the length of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.anatomy import Anatomy
from lit_accel.compute.active import Active
from lit_accel.methods.compatibility import MST
from lit_accel.methods.method import Method, Span
from lit_accel.methods.mixed_sparsity.attention import AttentionPattern, PatternName
from lit_accel.methods.mixed_sparsity.distribution import Distribution
from lit_accel.methods.mixed_sparsity.schedule import SparsitySchedule
from lit_accel.methods.mixed_sparsity.sparse_model import Execution
from lit_accel.methods.mixed_sparsity.targets import Targets
from lit_accel.methods.mixed_sparsity.units import UnitsError, spaces_of
from lit_accel.schedules import num_steps_of


class PlannedUnits(Method):
    """Base of :class:`~lit_accel.MixedSparsityTraining`: which units there are, and how many are on when."""

    title = MST
    decides = "units"
    needs_whole_parameters = True
    chooses_by_gradient = True

    stages: list[tuple[int | float, float]]
    ffn_units: str
    attention_units: str
    head_units: str
    update_every: int
    drop_fraction: float
    gradient_share: float
    distribution: Distribution
    quantum: int
    block_size: int
    attention_pattern: PatternName | None
    attention_window: int
    attention_phase: tuple[int | float, int | float]
    evaluate_pattern: bool
    execution: Execution
    targets: Targets | None
    """The schedule on the model's units; known once the length of the run is."""

    @property
    def is_neutral(self) -> bool:
        """Whether no unit is ever off, and attention is the model's own."""
        return not self._ever_sparse and self.attention_pattern is None

    @property
    def is_planned(self) -> bool:
        """Whether the stages are known in optimizer steps."""
        return self.targets is not None

    def spans(self) -> Sequence[Span]:
        """Return the steps in which units are off or attention follows a pattern."""
        assert self.targets is not None
        return self.targets.spans

    def needs_all_blocks(self, step: int) -> bool:
        """Whether units are chosen by gradient in an optimizer step."""
        return self.targets is not None and self.targets.chooses_by_gradient(step)

    def begins_phase(self, step: int) -> bool:
        """Whether other numbers of units are on from the forward passes of this optimizer step on."""
        assert self.targets is not None
        counts, by_gradient = self.targets.counts, self.targets.chooses_by_gradient
        # Chosen by gradient, they change only between the backward pass and the optimizer's step.
        return (step > 0 and counts(step) != counts(step - 1) and not by_gradient(step)) or (
            step > 1 and counts(step - 1) != counts(step - 2) and by_gradient(step - 1)
        )

    def transition(self, step: int) -> str | None:
        """Return how the units that are on, or the pattern of attention, change in an optimizer step."""
        assert self.targets is not None
        name, schedule = type(self).__name__, self.targets.schedule
        changes = []
        if self._ever_sparse and schedule.is_event(step):
            before, after = schedule.sparsity(step - 1) if step else 0.0, schedule.sparsity(step)
            changes.append(
                f"{name} has replaced units at a sparsity of {after:.4g}"
                if before == after
                else f"{name} has gone from a sparsity of {before:.4g} to one of {after:.4g}"
            )
        if step and (attends := self.targets.attends_by_pattern(step)) != self.targets.attends_by_pattern(step - 1):
            changes.append(f"{name} has attention {'follow its pattern' if attends else 'dense again'}")
        return "; ".join(changes) or None

    def plan_units(self, anatomy: Anatomy) -> Callable[[int], Active | None]:
        """Return what says, for an optimizer step, which units take part in it.

        Args:
            anatomy: The model, at any of its sizes.
        """
        assert self.targets is not None
        return self._targets_of(anatomy, self.targets.schedule.num_steps).planned()

    @property
    def _ever_sparse(self) -> bool:
        return any(sparsity > 0 for _, sparsity in self.stages)

    def _targets_of(self, anatomy: Anatomy, num_steps: int | None = None) -> Targets:
        """Return the targets; without the length of the run the stages are in their places, but not their steps."""
        units = (self.ffn_units, self.attention_units, self.head_units) if self._ever_sparse else ("dense",) * 3
        try:
            spaces = spaces_of(anatomy, *units, tile=self.block_size, quantum=self.quantum)
            schedule = self._schedule_of(num_steps)
        except (UnitsError, ValueError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        pattern = None
        if self.attention_pattern is not None:
            pattern = AttentionPattern(self.attention_pattern, self.attention_window, self.evaluate_pattern)
        first, end = (num_steps_of(bound, num_steps or 0) for bound in self.attention_phase)
        return Targets(
            anatomy=anatomy,
            spaces=spaces,
            schedule=schedule,
            distribution=self.distribution,
            gradient_share=self.gradient_share,
            is_compact=self.execution == "compact",
            pattern=pattern,
            pattern_steps=(first, end),
        )

    def _schedule_of(self, num_steps: int | None) -> SparsitySchedule:
        if num_steps is None:
            sparsities = tuple(sparsity for _, sparsity in self.stages)
            return SparsitySchedule(tuple(range(len(sparsities))), sparsities, len(sparsities), self.update_every)
        return SparsitySchedule.of(self.stages, num_steps, self.update_every, self.drop_fraction)
