"""What was planned and what ran, in parts of the blocks' FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Tally:
    """Sums over optimizer steps.

    Args:
        planned: FLOPs of the blocks, each times its keep probability.
        kept: FLOPs of the blocks that ran.
        dense: FLOPs of all blocks.
        kept_blocks: Blocks that ran.
        planned_blocks: Keep probabilities of all blocks.
        steps: Optimizer steps.
    """

    planned: float = 0.0
    kept: int = 0
    dense: int = 0
    kept_blocks: int = 0
    planned_blocks: float = 0.0
    steps: int = 0

    def add(self, costs: Sequence[int], keep: Sequence[bool], keep_probabilities: Sequence[float]) -> None:
        """Add a step.

        Args:
            costs: FLOPs of each block.
            keep: Whether it ran.
            keep_probabilities: With which probability it was to run.
        """
        self.planned += sum(cost * p for cost, p in zip(costs, keep_probabilities, strict=True))
        self.kept += sum(cost for cost, runs in zip(costs, keep, strict=True) if runs)
        self.dense += sum(costs)
        self.kept_blocks += sum(keep)
        self.planned_blocks += sum(keep_probabilities)
        self.steps += 1

    @property
    def kept_share(self) -> float:
        """Share of the blocks' FLOPs that was spent; 1 before anything ran."""
        return self.kept / self.dense if self.dense else 1.0

    @property
    def planned_share(self) -> float:
        """Share of the blocks' FLOPs that was planned; 1 before anything ran."""
        return self.planned / self.dense if self.dense else 1.0

    def to_state(self) -> dict[str, Any]:
        """Return the sums as primitives."""
        return asdict(self)
