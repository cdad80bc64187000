"""Exact counters of a run, by phase: a phase is a stretch of training at one size of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy

from lit_accel.anatomy import Anatomy

_LOW_BITS = 31


@dataclass
class Phase:
    """What was done and spent at one size of the model, by all ranks together.

    Args:
        size: The size, as :meth:`lit_accel.anatomy.Size.to_state` writes it.
        num_parameters: Parameters of the transformer, tied ones once.
        steps: Optimizer steps.
        tokens: Tokens that went through the transformer in training, padding included.
        flops: FLOPs of forward and backward.
        dense_flops: FLOPs that the full-size model would have spent on the same batches.
        seconds: Wall time, without validation.
    """

    size: dict[str, Any]
    num_parameters: int
    steps: int = 0
    tokens: int = 0
    flops: int = 0
    dense_flops: int = 0
    seconds: float = 0.0
    uncollected: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Tokens, FLOPs and dense FLOPs of this rank that :meth:`Phases.collect` has not summed over the ranks yet."""

    @property
    def is_used(self) -> bool:
        """Whether anything was done in it."""
        return bool(self.steps or self.tokens or self.uncollected[0])


class Phases:
    """The phases of a run so far; each rank counts for itself until :meth:`collect` adds the ranks up."""

    def __init__(self) -> None:
        self.list: list[Phase] = []

    def ends_with(self, anatomy: Anatomy) -> bool:
        """Whether the present phase is over: it was used, and the model has another size now."""
        return bool(self.list) and self.list[-1].is_used and self.list[-1].size != anatomy.size.to_state()

    def enter(self, anatomy: Anatomy) -> None:
        """Open a phase for the model's size, unless the present phase has it or has not been used yet."""
        size = anatomy.size.to_state()
        if self.list and not self.list[-1].is_used:
            self.list[-1].size, self.list[-1].num_parameters = size, anatomy.num_parameters
        elif not self.list or self.list[-1].size != size:
            self.list.append(Phase(size, anatomy.num_parameters))

    def count(self, tokens: int, flops: int, dense_flops: int) -> None:
        """Add what this rank has just done to the present phase."""
        mine = self.list[-1].uncollected
        for index, amount in enumerate((tokens, flops, dense_flops)):
            mine[index] += amount

    def collect(self, strategy: Strategy, world_size: int) -> None:
        """Sum over the ranks what they have counted since the last call. A collective: every rank must call it."""
        counts = [amount for phase in self.list for amount in phase.uncollected]
        summed = iter(sum_over_ranks(counts, strategy, world_size))
        for phase in self.list:
            phase.tokens += next(summed)
            phase.flops += next(summed)
            phase.dense_flops += next(summed)
            phase.uncollected = [0, 0, 0]

    @property
    def total(self) -> Phase:
        """All phases together, at the size of the present one."""
        present = self.list[-1]
        total = Phase(present.size, present.num_parameters)
        for phase in self.list:
            total.steps += phase.steps
            total.tokens += phase.tokens
            total.flops += phase.flops
            total.dense_flops += phase.dense_flops
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


def saved_share(flops: float, dense_flops: float) -> float:
    """Return which share of the full-size model's FLOPs was not spent; 0 before anything was counted."""
    return 1 - flops / dense_flops if dense_flops else 0.0


def sum_over_ranks(counts: list[int], strategy: Strategy, world_size: int) -> list[int]:
    """Add up integers of all ranks, exactly. A collective: every rank must call it.

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
    return [(high << _LOW_BITS) + low for high, low in summed.tolist()]
