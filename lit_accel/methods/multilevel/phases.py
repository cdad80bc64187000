"""When a run is at which level: pure functions of the optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

LearningRatePolicy = Literal["continue", "rewarm", "paper"]


@dataclass
class Level:
    """A smaller level, in relation to the level above it.

    Args:
        width: What the width (embedding, heads, feed-forward) is divided by.
        depth: What the number of blocks is divided by: one number, for all stages that it divides, or one a stage.
        merge_batches: How many micro-batches are computed as one at this level. It divides the Trainer's
            ``accumulate_grad_batches`` and leaves the optimizer step as it is; a small model uses the machine better
            with larger batches, and has the memory for them.
    """

    width: int = 2
    depth: int | list[int] = 2
    merge_batches: int = 1


def reduces_depth(level: Level) -> bool:
    """Whether a level has fewer blocks than the one above it."""
    return level.depth != 1 if isinstance(level.depth, int) else any(factor != 1 for factor in level.depth)


@dataclass
class Phase:
    """A part of the run that is spent at one level.

    Args:
        level: 0 is the full model, 1 the next smaller one, and so on.
        length: An integer is a number of optimizer steps, a fraction below 1 is a share of the run; ``None`` is
            the rest of the run, in the last phase.
        lr_scale: What the learning rate is multiplied by during this phase.
    """

    level: int
    length: int | float | None = None
    lr_scale: float = 1.0


# Hyper-parameters of a LightningModule land in its checkpoints, which torch reads with weights_only=True.
torch.serialization.add_safe_globals([Level, Phase])


@dataclass(frozen=True)
class ResolvedPhase:
    """A phase in optimizer steps: from ``start`` (included) to ``end`` (excluded)."""

    level: int
    start: int
    end: int
    lr_scale: float


def v_cycle(num_small_levels: int, initial: float = 0.05, small: float = 0.5) -> list[Phase]:
    """Return the phases of a V-cycle (arXiv 2404.07999, algorithm 1).

    Args:
        num_small_levels: How many levels there are below the full model.
        initial: The share of the run that each level gets on the way down.
        small: The share of the run that is spent in small levels on the way up, in equal parts.
    """
    down = [Phase(level, initial) for level in range(num_small_levels)]
    up = [Phase(level, small / num_small_levels) for level in range(num_small_levels, 0, -1)]
    return [*down, *up, Phase(0)]


def resolve_phases(phases: Sequence[Phase], num_levels: int, num_steps: int) -> tuple[ResolvedPhase, ...]:
    """Turn phase lengths into optimizer steps.

    Args:
        phases: In order; together they must last as long as the run.
        num_levels: Levels that exist, the full model included.
        num_steps: Optimizer steps of the whole run.

    Returns:
        Phases that cover the run without gaps.

    Raises:
        ValueError: If a level does not exist, a length is no positive number, a length is missing before the last
            phase, a phase would have no step, or the phases are longer or shorter than the run.
    """
    if not phases:
        raise ValueError("phases is empty; give at least one, or leave it out for a V-cycle.")
    resolved: list[ResolvedPhase] = []
    start = 0
    for index, phase in enumerate(phases):
        where = f"phase {index} (level {phase.level})"
        _require_level(phase.level, num_levels, where)
        if phase.lr_scale <= 0:
            raise ValueError(f"{where}: lr_scale is {phase.lr_scale}; it must be positive.")
        is_last = index == len(phases) - 1
        if phase.length is None:
            if not is_last:
                raise ValueError(f"{where}: only the last phase may leave out its length.")
            length = num_steps - start
        elif isinstance(phase.length, int):
            length = phase.length
        elif 0 < phase.length <= 1:
            length = max(1, round(phase.length * num_steps))
        else:
            raise ValueError(
                f"{where}: length is {phase.length}; give optimizer steps as an integer, or a share of the run "
                "between 0 and 1."
            )
        end = start + length
        if end > num_steps:
            raise ValueError(
                f"The phases are longer than the run: {where} would end at step {end}, the run at {num_steps}. "
                "Shorten the phases, or raise max_steps."
            )
        if is_last:
            # Shares are rounded to steps.
            if num_steps - end > len(phases):
                raise ValueError(
                    f"The phases are shorter than the run: {where} would end at step {end}, the run at "
                    f"{num_steps}. Leave out the length of the last phase to let it last to the end."
                )
            end = num_steps
        if end <= start:
            raise ValueError(
                f"{where} would have no optimizer step: it starts at step {start} of {num_steps}, "
                f"{'with nothing left' if phase.length is None else f'with length {phase.length}'}. Give it a longer "
                "share, shorten those before it, or lengthen the run."
            )
        resolved.append(ResolvedPhase(phase.level, start, end, phase.lr_scale))
        start = end
    return tuple(resolved)


def _require_level(level: int, num_levels: int, where: str) -> None:
    if not 0 <= level < num_levels:
        raise ValueError(f"{where}: there is no such level; levels are 0 (the full model) to {num_levels - 1}.")


def rehearse_phases(phases: Sequence[Phase], num_levels: int, num_steps: int) -> tuple[ResolvedPhase, ...]:
    """Return the phases at one optimizer step each, for Lightning's ``fast_dev_run``.

    Args:
        phases: In order; those that the run is too short for are left out.
        num_levels: Levels that exist, the full model included.
        num_steps: Optimizer steps of the run.
    """
    for index, phase in enumerate(phases):
        _require_level(phase.level, num_levels, f"phase {index} (level {phase.level})")
    steps = range(min(num_steps, len(phases)))
    return tuple(ResolvedPhase(phases[step].level, step, step + 1, phases[step].lr_scale) for step in steps)


def phase_at(phases: Sequence[ResolvedPhase], step: int) -> int:
    """Return the index of the phase that an optimizer step belongs to; steps past the end belong to the last."""
    for index, phase in enumerate(phases):
        if step < phase.end:
            return index
    return len(phases) - 1


def lr_factor(
    phases: Sequence[ResolvedPhase], step: int, policy: LearningRatePolicy, num_rewarm_steps: int, start_level: int = 0
) -> float:
    """Return what the learning rate is multiplied by at an optimizer step.

    Args:
        phases: The phases of the run.
        step: Optimizer steps done so far.
        policy: ``continue``: the phase's ``lr_scale`` alone. ``rewarm``: besides, a linear ramp over the first
            steps after each transition. ``paper``: each phase has its own schedule: the first ramps up linearly
            over its whole length, every later one decays linearly from its peak to zero, and so does the first of a
            run that is given a small model and changes its size at once.
        num_rewarm_steps: Length of the ramp of ``rewarm``.
        start_level: The level of the model that the module comes with. A first phase at another follows a transition.
    """
    index = phase_at(phases, step)
    phase = phases[index]
    done = step - phase.start
    changes_at_once = phases[0].level != start_level
    if policy == "paper":
        length = phase.end - phase.start
        # The published first stage ramps. A run that grows a given model at once begins with a later stage.
        ramps = index == 0 and not (changes_at_once and start_level > 0)
        return phase.lr_scale * ((done + 1) / length if ramps else max(0.0, 1 - done / length))
    if policy == "rewarm":
        while index > 0 and phases[index - 1].level == phase.level:
            index -= 1
        if index > 0 or changes_at_once:
            return phase.lr_scale * min(1.0, (step - phases[index].start + 1) / num_rewarm_steps)
    return phase.lr_scale
