"""How many units are on at each step, what each update of the topology does, and what all of it costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from lit_accel.anatomy import Anatomy
from lit_accel.compute.active import Active
from lit_accel.compute.flops import CountedPairs, HeadAccountings, head_accountings, training_flops
from lit_accel.methods.mixed_sparsity.attention import AttentionPattern
from lit_accel.methods.mixed_sparsity.distribution import Distribution, densities
from lit_accel.methods.mixed_sparsity.schedule import SparsitySchedule
from lit_accel.methods.mixed_sparsity.topology import Change, planned_change
from lit_accel.methods.mixed_sparsity.units import AxisUnits, UnitSpace

Counts = dict[str, int]
"""Active units of a group, by the name of their space."""


@dataclass(frozen=True)
class Targets:
    """A schedule on the units of a model.

    Args:
        anatomy: The model.
        spaces: Its units, by name.
        schedule: How sparse it is at each step.
        distribution: How sparsity is spread over the spaces.
        gradient_share: Share of grown units that are chosen by gradient.
        is_compact: Whether units that can be taken out of the model are.
        pattern: How it attends in the pattern's phase; ``None`` for its own way throughout.
        pattern_steps: First step of that phase and the first one after it.
    """

    anatomy: Anatomy
    spaces: Mapping[str, UnitSpace]
    schedule: SparsitySchedule
    distribution: Distribution = "uniform"
    gradient_share: float = 0.75
    is_compact: bool = True
    pattern: AttentionPattern | None = None
    pattern_steps: tuple[int, int] = (0, 0)

    @property
    def ever_sparse(self) -> bool:
        """Whether any unit is ever off."""
        return any(sparsity > 0 for sparsity in self.schedule.sparsities)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First steps and first ones after, of all that is not dense."""
        starts = self.schedule.starts
        stages = zip(starts, (*starts[1:], self.schedule.num_steps), self.schedule.sparsities, strict=True)
        pattern = [self.pattern_steps] if self.pattern is not None else []
        return [*((start, end) for start, end, sparsity in stages if sparsity > 0), *pattern]

    @cached_property
    def stage_counts(self) -> tuple[Counts, ...]:
        """Active units of a group in each stage of the schedule, by space."""
        return tuple(self._counts(sparsity) for sparsity in self.schedule.sparsities)

    def counts(self, step: int) -> Counts:
        """Return the active units of a group from a step's optimizer step on, by space."""
        return self.stage_counts[self.schedule.stage(step)]

    def _counts(self, sparsity: float) -> Counts:
        shapes = {name: space.shape for name, space in self.spaces.items()}
        sizes = {
            name: space.num_groups * space.num_units * space.weights_per_unit for name, space in self.spaces.items()
        }
        density = densities(shapes, sparsity, self.distribution, sizes) if shapes else {}
        return {name: space.num_active(density[name]) for name, space in self.spaces.items()}

    def changes(self, step: int, before: Mapping[str, int]) -> dict[str, Change]:
        """Return what an update does in each space.

        Args:
            step: The step.
            before: Units of a group that are on, by space.
        """
        fraction, after = self.schedule.drop_fraction_at(step), self.counts(step)
        return {
            name: planned_change(space.num_units, before[name], after[name], fraction)
            for name, space in self.spaces.items()
        }

    def needs_gradient(self, changes: Mapping[str, Change]) -> bool:
        """Whether an update has a choice to make by gradient, for which the whole model's must be computed."""
        return any(
            math.floor(self.gradient_share * change.num_grown + 1e-9) > 0
            # Where all that were off come back, there is nothing to choose.
            and change.num_active + change.num_dropped < self.spaces[name].num_units
            for name, change in changes.items()
        )

    def takes_out(self, space: UnitSpace) -> bool:
        """Whether units of a space that are off are taken out of the model."""
        return self.is_compact and space.is_separable

    def attends_by_pattern(self, step: int) -> bool:
        """Whether a step is in the pattern's phase."""
        first, end = self.pattern_steps
        return self.pattern is not None and first <= step < end

    # Costs

    def active(self, step: int, counts: Mapping[str, int], with_dense_gradients: bool = False) -> Active:
        """Return what of the model takes part in a step.

        Args:
            step: The step.
            counts: Units of a group that are on, by space.
            with_dense_gradients: Whether the step's gradients are those of the whole model. Units that are taken out of
                it are then put back for the whole step, forward pass and all.
        """
        entries: dict[str, int] = {}
        widths: dict[int, int] = {}
        num_parameters = self.anatomy.num_parameters
        for name, space in self.spaces.items():
            num_active = counts[name]
            active = space.active_entries(num_active)
            # Those of the stage, which in its first step are still about to be chosen.
            in_stage = space.active_entries(self.counts(step)[name])
            num_parameters -= sum(space.active_entries(space.num_units).values()) - sum(in_stage.values())
            if with_dense_gradients and self.takes_out(space):
                continue
            entries |= active
            if isinstance(space, AxisUnits) and space.part == "attention":
                attention = self.anatomy.blocks[space.block].attention
                widths[space.block] = attention.width({**space.axes, space.axis: num_active})
        return Active(
            entries=entries,
            widths=widths,
            pairs=self.pattern.pairs if self.pattern is not None and self.attends_by_pattern(step) else None,
            has_dense_gradients=with_dense_gradients,
            stage=self.schedule.stage(step),
            num_parameters=num_parameters,
        )

    def shares(
        self,
        num_tokens: int,
        counted: CountedPairs = "exact",
        activation_checkpointing: bool = False,
        num_sequences: int = 1,
    ) -> Shares:
        """Return what a run costs in parts of a dense one, by three ways to count the model's head.

        Args:
            num_tokens: Tokens of a sequence.
            counted: Which pairs dense attention is charged for. A pattern is charged for its own either way.
            activation_checkpointing: Whether blocks compute their forward pass once more in the backward pass.
            num_sequences: Sequences of a batch. It matters where something is paid once a batch, as SwinV2's table of
                relative positions is.
        """

        def cost(active: Active | None) -> HeadAccountings:
            flops, whole = (
                training_flops(
                    self.anatomy,
                    num_sequences,
                    num_tokens,
                    attention=counted,
                    activation_checkpointing=activation_checkpointing,
                    active=one,
                )
                for one in (active, None)
            )
            return head_accountings(self.anatomy, flops, whole, active)

        num_steps = self.schedule.num_steps
        spent = [0, 0, 0]
        firsts: dict[tuple[int, bool, bool, int], int] = {}
        kinds = [self._kind_of(step) for step in range(num_steps)]
        for step, kind in enumerate(kinds):
            firsts.setdefault(kind, step)
        for kind, number in Counter(kinds).items():
            step, is_update = firsts[kind], kind[1]
            before = self._before(step) if is_update else self.counts(step)
            one = cost(self.active(step, before, with_dense_gradients=is_update))
            for index, flops in enumerate((one.masked, one.dense, one.excluded)):
                spent[index] += number * flops
        dense = cost(None)
        return Shares(
            masked=spent[0] / (dense.dense * num_steps),
            dense=spent[1] / (dense.dense * num_steps),
            excluded=spent[2] / (dense.excluded * num_steps),
        )

    def planned(self) -> Callable[[int], Active | None]:
        """Return what says, for each step, what of the model takes part in it, one object for steps alike."""
        made: dict[tuple[int, bool, bool, int], Active] = {}

        def at(step: int) -> Active | None:
            if not self.ever_sparse and self.pattern is None:
                return None
            kind = self._kind_of(step)
            if kind not in made:
                before = self._before(step) if kind[1] else self.counts(step)
                made[kind] = self.active(step, before, with_dense_gradients=kind[1])
            return made[kind]

        return at

    def chooses_by_gradient(self, step: int) -> bool:
        """Whether units are chosen by gradient in a step, for which the whole model's must be computed."""
        return self.schedule.is_event(step) and self.needs_gradient(self.changes(step, self._before(step)))

    def _kind_of(self, step: int) -> tuple[int, bool, bool, int]:
        """Return what a step's cost depends on: stage, whether gradients are dense, pattern, and the stage before."""
        is_update, stage = self.chooses_by_gradient(step), self.schedule.stage(step)
        # A stage's first update still runs on the units of the stage before.
        before = self.schedule.stage(step - 1) if is_update and step else stage
        return stage, is_update, self.attends_by_pattern(step), before

    def _before(self, step: int) -> Counts:
        """Return the active units of a group before a step's update."""
        if step == 0:
            return {name: space.num_units for name, space in self.spaces.items()}
        return self.counts(step - 1)


@dataclass(frozen=True)
class Shares:
    """What a run costs in parts of a dense one.

    Args:
        masked: With the model's head as sparse as its blocks.
        dense: With its head whole.
        excluded: Without its head.
    """

    masked: float
    dense: float
    excluded: float
