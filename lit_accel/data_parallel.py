"""Which process sees which part of the data: those that compute parts of one model see the same."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.strategies import Strategy


def data_rank(trainer: L.Trainer) -> int:
    """Return which part of the data this process sees; processes that share a sequence have the same.

    Args:
        trainer: The Trainer.
    """
    return int(_sharing_out(trainer.strategy).get("rank", trainer.global_rank))


def num_sharing(strategy: Strategy, world_size: int) -> int:
    """Return how many processes see the same part of the data, such as those of a tensor-parallel group.

    Args:
        strategy: The Trainer's strategy.
        world_size: The number of processes.
    """
    return max(1, world_size // (_sharing_out(strategy).get("num_replicas") or world_size))


def _sharing_out(strategy: Strategy) -> dict[str, Any]:
    # Where Lightning's own samplers look for it; a strategy of one process has none.
    return getattr(strategy, "distributed_sampler_kwargs", {})
