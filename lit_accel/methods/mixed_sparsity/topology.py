"""Which units are on: dropping by magnitude, growing by gradient and at random, in exact numbers.

Units are in groups of equal size, and every group has as many of them on as any other. So a mask has the shape
(groups, units of a group), whether the units are entries of a matrix, 2 of each 4 neighbours, tiles of a row of tiles,
neurons or heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What an update of a topology does in every group.

    Args:
        num_active: Units that are on afterwards.
        num_dropped: Units that are switched off.
        num_grown: Units that are switched on.
    """

    num_active: int
    num_dropped: int
    num_grown: int


def planned_change(num_units: int, num_before: int, num_after: int, drop_fraction: float) -> Change:
    """Work out how many units an update drops and grows (RigL, arXiv 1911.11134, algorithm 1; MST, section 2.3).

    Args:
        num_units: Units of a group.
        num_before: How many are on.
        num_after: How many are to be on.
        drop_fraction: Share of the active ones that is replaced. Fewer are, where not enough units are off.
    """
    removed = num_before - num_after
    # A unit that was just dropped does not come back at once: what grows was off before.
    most = max(removed, num_units - num_after)
    num_dropped = max(removed, min(math.floor(drop_fraction * num_before + 1e-9), most), 0)
    return Change(num_after, num_dropped, num_after - num_before + num_dropped)


def highest(scores: Tensor, count: int, candidates: Tensor) -> Tensor:
    """Choose the units with the highest scores in each group, the first ones where scores are equal.

    By partition and not by sorting, whose cost for every entry of a matrix is a hundred times that of a step's share.

    Args:
        scores: Shape (groups, units), finite.
        count: How many to choose in each group.
        candidates: Among which, same shape; in each group at least ``count``.

    Returns:
        The chosen ones, boolean, same shape.
    """
    if count == 0:
        return torch.zeros_like(candidates)
    scores = scores.masked_fill(~candidates, -math.inf)
    threshold = scores.kthvalue(scores.shape[1] - count + 1, dim=1, keepdim=True).values
    above = scores > threshold
    ties = (scores == threshold) & candidates
    missing = count - above.sum(1, keepdim=True)
    return above | (ties & (ties.cumsum(1) <= missing))


def updated(
    mask: Tensor,
    change: Change,
    magnitude: Tensor,
    gradient: Tensor | None,
    gradient_share: float,
    generator: torch.Generator,
) -> Tensor:
    """Drop the units of least magnitude and grow others, by gradient and at random (MST, "mixed growing").

    Args:
        mask: Which units are on, shape (groups, units), boolean.
        change: How many are dropped and grown.
        magnitude: Score of each unit by its weights.
        gradient: Score of each unit by the gradient of its weights; ``None`` to grow at random alone.
        gradient_share: Share of the grown units that are chosen by gradient, rounded down.
        generator: Chooses the others; on the CPU, so that it is the same on all ranks.

    Returns:
        The new mask, with exactly ``change.num_active`` units in every group.
    """
    kept = mask
    if change.num_dropped:
        kept = highest(_finite(magnitude), change.num_active - change.num_grown, mask)
    # Not among the candidates is what was just dropped.
    candidates = ~mask
    by_gradient = 0 if gradient is None else math.floor(gradient_share * change.num_grown + 1e-9)
    grown = torch.zeros_like(mask)
    if by_gradient:
        assert gradient is not None
        scores = _finite(gradient)
        # After an overflow none says anything, and the first units are no better than others: all are drawn.
        by_gradient = by_gradient if bool((scores > 0).any()) else 0
        grown = highest(scores, by_gradient, candidates)
    if change.num_grown > by_gradient:
        draws = torch.rand(mask.shape, generator=generator, device="cpu").to(mask.device)
        grown = grown | highest(draws, change.num_grown - by_gradient, candidates & ~grown)
    return kept | grown


def _finite(scores: Tensor) -> Tensor:
    """Return scores without infinities: of a step that overflowed nothing can be learnt."""
    return torch.nan_to_num(scores.float(), nan=0.0, posinf=0.0, neginf=0.0)
