"""What multi-level training does in which step: pure functions of its settings and of the length of the run."""

from __future__ import annotations

from collections.abc import Sequence

from lit_accel.anatomy import Anatomy, Size
from lit_accel.methods.compatibility import MULTI_LEVEL
from lit_accel.methods.method import Method, Span
from lit_accel.methods.multilevel.maps import DepthGrouping, DepthMode, LevelMap, WidthGrouping, level_map
from lit_accel.methods.multilevel.phases import Level, Phase, ResolvedPhase, phase_at


class PlannedLevels(Method):
    """Base of :class:`~lit_accel.MultiLevelTraining`: the levels of the model, and when it is at which."""

    title = MULTI_LEVEL
    decides = "size"
    changes_size = True

    levels: list[Level]
    phases: list[Phase]
    start_level: int
    width_grouping: WidthGrouping
    depth_grouping: DepthGrouping
    depth_mode: DepthMode
    schedule: tuple[ResolvedPhase, ...]
    """The phases in optimizer steps; empty until the length of the run is known."""
    maps: list[LevelMap]

    @property
    def is_neutral(self) -> bool:
        """Whether the model keeps its size."""
        return not self.start_level and all(phase.level == 0 for phase in self.phases)

    @property
    def is_planned(self) -> bool:
        """Whether the phases are known in optimizer steps."""
        return bool(self.schedule)

    def spans(self) -> Sequence[Span]:
        """Return the steps at smaller levels."""
        return [(phase.start, phase.end) for phase in self.schedule if phase.level]

    def begins_phase(self, step: int) -> bool:
        """Whether the model changes its size before this optimizer step."""
        return step in self.resize_steps

    def transition(self, step: int) -> str | None:
        """Return between which levels the model changes before an optimizer step."""
        if step not in self.resize_steps:
            return None
        before = self.level_at(step - 1) if step else self.start_level
        after = self.level_at(step)
        sizes = [self.maps[0].large, *(level.small for level in self.maps)]
        return (
            f"{type(self).__name__} has changed the model from level {before} to level {after}, from "
            f"{sizes[before].num_parameters:,} to {sizes[after].num_parameters:,} parameters"
        )

    def level_at(self, step: int) -> int:
        """Return the level at an optimizer step."""
        return self.schedule[phase_at(self.schedule, step)].level

    def plan_levels(self, anatomy: Anatomy) -> list[LevelMap]:
        """Return the maps between the levels of a model, without building any of them.

        Args:
            anatomy: The anatomy of the full model.

        Returns:
            One map a smaller level, from the largest down.

        Raises:
            AnatomyError: If a factor does not divide the size it is for.
        """
        maps = []
        for level in self.levels:
            step = level_map(
                anatomy,
                width=level.width,
                depth=level.depth,
                width_grouping=self.width_grouping,
                depth_grouping=self.depth_grouping,
                depth_mode=self.depth_mode,
            )
            maps.append(step)
            anatomy = step.small
        return maps

    @property
    def resize_steps(self) -> tuple[int, ...]:
        """The optimizer steps before which the model changes its size; known once the length of the run is."""
        levels = [self.start_level, *(phase.level for phase in self.schedule)]
        return tuple(phase.start for before, phase in zip(levels, self.schedule, strict=False) if phase.level != before)

    def steps_at_level(self, step: int) -> tuple[int, int, int]:
        """Return how many steps the present level has had before an optimizer step, has in all, and the run has."""
        level = self.level_at(step)
        phases = [phase for phase in self.schedule if phase.level == level]
        done = sum(min(max(step - phase.start, 0), phase.end - phase.start) for phase in phases)
        return done, sum(phase.end - phase.start for phase in phases), self.schedule[-1].end

    def level_of(self, size: Size) -> int:
        """Return the level at which the model has a size; 0 where that is not known yet."""
        return next((number for number, step in enumerate(self.maps, 1) if step.small.size == size), 0)

    def sources_of_blocks(self, before: Size, after: Size) -> list[tuple[int, ...]]:
        """Return for each block of one level those blocks of another that it is made from.

        Args:
            before: The size of the level that the model comes from.
            after: The size of the level that it has come to.
        """
        sizes = [self.maps[0].large.size, *(step.small.size for step in self.maps)]
        here, there = sizes.index(before), sizes.index(after)
        sources: list[tuple[int, ...]] = [(index,) for index in range(sum(before.depths))]
        while here != there:
            contracts = here < there
            step = self.maps[here if contracts else here - 1]
            related = step.related_blocks(contracts=contracts)
            sources = [tuple(each for index in indices for each in sources[index]) for indices in related]
            here += 1 if contracts else -1
        return sources
