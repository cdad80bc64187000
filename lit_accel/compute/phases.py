"""Exact counters of a run, by phase: a stretch of training at one size of the model, or at one of its sparsities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy

from lit_accel.anatomy import Anatomy
from lit_accel.compute.active import Active
from lit_accel.data_parallel import num_sharing

_LOW_BITS = 31


@dataclass
class Amounts:
    """What can be counted, each without an upper limit.

    Args:
        tokens: Tokens that went through the transformer in training, padding included.
        flops: FLOPs of forward and backward.
        dense_flops: FLOPs that the full-size model would have spent on the same batches.
        head_masked_flops: FLOPs, were the model's head as sparse as its blocks.
        head_dense_flops: FLOPs, were its head whole.
        head_excluded_flops: FLOPs without those of its head.
        dense_head_excluded_flops: The full-size model's without those of its head.
    """

    tokens: int = 0
    flops: int = 0
    dense_flops: int = 0
    head_masked_flops: int = 0
    head_dense_flops: int = 0
    head_excluded_flops: int = 0
    dense_head_excluded_flops: int = 0

    def add(self, other: Amounts) -> None:
        """Add other amounts to these."""
        for name in AMOUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


AMOUNTS = tuple(entry.name for entry in fields(Amounts))


@dataclass
class Phase(Amounts):
    """What was done and spent at one size of the model, by all ranks together.

    Args:
        size: The size, as :meth:`lit_accel.anatomy.Size.to_state` writes it; with a ``stage`` where units are off.
        num_parameters: Parameters of the transformer that take part, tied ones once.
        steps: Optimizer steps.
        seconds: Wall time, without validation.
        uncollected: What this rank has counted and :meth:`Phases.collect` has not summed over the ranks yet.
    """

    size: dict[str, Any] = field(default_factory=dict)
    num_parameters: int = 0
    steps: int = 0
    seconds: float = 0.0
    uncollected: Amounts = field(default_factory=Amounts)

    @property
    def is_used(self) -> bool:
        """Whether anything was done in it."""
        return bool(self.steps or self.tokens or self.uncollected.tokens)


class Phases:
    """The phases of a run so far; each rank counts for itself until :meth:`collect` adds the ranks up."""

    def __init__(self) -> None:
        self.list: list[Phase] = []

    def ends_with(self, anatomy: Anatomy, active: Active | None = None) -> bool:
        """Whether the present phase is over: it was used, and the model has another size or sparsity now."""
        return bool(self.list) and self.list[-1].is_used and self.list[-1].size != phase_size(anatomy, active)

    def enter(self, anatomy: Anatomy, active: Active | None = None) -> None:
        """Open a phase for the model's size, unless the present phase has it or has not been used yet."""
        size = phase_size(anatomy, active)
        num_parameters = anatomy.num_parameters if active is None else active.num_parameters
        if self.list and not self.list[-1].is_used:
            self.list[-1].size, self.list[-1].num_parameters = size, num_parameters
        elif not self.list or self.list[-1].size != size:
            self.list.append(Phase(size=size, num_parameters=num_parameters))

    def count(self, amounts: Amounts) -> None:
        """Add what this rank has just done to the present phase."""
        self.list[-1].uncollected.add(amounts)

    def collect(self, strategy: Strategy, world_size: int) -> None:
        """Sum over the ranks what they have counted since the last call. A collective: every rank must call it."""
        counts = [getattr(phase.uncollected, name) for phase in self.list for name in AMOUNTS]
        summed = iter(sum_over_ranks(counts, strategy, world_size))
        for phase in self.list:
            phase.add(Amounts(**{name: next(summed) for name in AMOUNTS}))
            phase.uncollected = Amounts()

    @property
    def total(self) -> Phase:
        """All phases together, at the size of the present one."""
        present = self.list[-1]
        total = Phase(size=present.size, num_parameters=present.num_parameters)
        for phase in self.list:
            total.add(phase)
            total.steps += phase.steps
            total.seconds += phase.seconds
        return total

    def to_state(self) -> list[dict[str, Any]]:
        """Return the phases as dictionaries of primitives, for a checkpoint."""
        states = [asdict(phase) for phase in self.list]
        for state in states:
            del state["uncollected"]
        return states

    def load_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Take over what :meth:`to_state` wrote."""
        self.list = [Phase(**state) for state in states]
        for phase, state in zip(self.list, states, strict=True):
            if "head_dense_flops" not in state:
                # Of an earlier version, in whose runs every unit was on; what is without the head counts from now on.
                phase.head_masked_flops = phase.head_dense_flops = phase.flops


def phase_size(anatomy: Anatomy, active: Active | None) -> dict[str, Any]:
    """Return what makes a phase one: the model's size and, where units are switched, the stage of their schedule.

    Args:
        anatomy: The model.
        active: Which of its units are on; ``None`` where none is ever off.
    """
    size = anatomy.size.to_state()
    return size if active is None else {**size, "stage": active.stage}


def saved_share(flops: float, dense_flops: float) -> float:
    """Return which share of the full-size model's FLOPs was not spent; 0 before anything was counted."""
    return 1 - flops / dense_flops if dense_flops else 0.0


def sum_over_ranks(counts: list[int], strategy: Strategy, world_size: int) -> list[int]:
    """Add up integers of all ranks, exactly. A collective: every rank must call it.

    Ranks that share their data, as those of one tensor-parallel group do, have counted the same; they count as one.

    Args:
        counts: Non-negative integers, or differences that are so in sum.
        strategy: The Trainer's strategy.
        world_size: Number of ranks.
    """
    if world_size == 1:
        return counts
    # FLOPs of a long run pass 2^63, and a float64 would round them: summed as two 64-bit integers each.
    low_mask = (1 << _LOW_BITS) - 1
    parts = [[count >> _LOW_BITS, count & low_mask] for count in counts]
    summed = strategy.reduce(torch.tensor(parts, dtype=torch.int64, device=strategy.root_device), reduce_op="sum")
    num_counted = num_sharing(strategy, world_size)
    return [((high << _LOW_BITS) + low) // num_counted for high, low in summed.tolist()]
