"""Keep probabilities that meet a compute budget: which blocks pay for it, and how much each.

Sensitivity-based layer dropping (SBLD; Zeng et al., AAAI 2023) has no released code, and none of the public sources
about it that we could read gives its formulas. What stands here is a reconstruction of its idea, not a reproduction.

Under unbiased gating (a kept block's update is scaled by ``1 / p``), block ``u`` adds a variance in proportion to
``s_u * (1 / p_u - 1)``, with its sensitivity ``s_u`` as the proxy for its weight. The allocation minimises the sum of
it at a fixed cost. Setting the derivative of ``sum(s_u / p_u) + lambda * sum(c_u * p_u)`` to zero, within the bounds,
gives ``p_u = clip(sqrt(s_u / (lambda * c_u)), min_keep, 1)``. Without that scale the rule is used as it is.
"""

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from typing import Literal, get_args

Allocation = Literal["sensitivity", "depth", "uniform"]

_MAX_SKEW = 20.0
_SMALLEST_SHARE_OF_MEDIAN = 0.01
# A block without sensitivity is one with hardly any: it still shares what the others cannot take up at p = 1.
_LOG_SMALLEST_RATIO = math.log(1e-12)


def floor_of(costs: Sequence[float], min_keep: float, always: Collection[int] = ()) -> float:
    """Return the smallest share of the blocks' compute that can be kept.

    Args:
        costs: Cost of every block, in any unit (FLOPs), positive.
        min_keep: Smallest keep probability, in (0, 1].
        always: Indices of the blocks that are never dropped.

    Returns:
        The share of ``sum(costs)`` that is left with keep probability 1 in ``always`` and ``min_keep`` elsewhere, in
        (0, 1]. Exactly ``min_keep`` where ``always`` is empty.

    Raises:
        ValueError: If there are no blocks, a cost is not positive and finite, ``min_keep`` is outside (0, 1], or
            ``always`` names a block that does not exist.

    Example::

        >>> floor_of([2.0, 1.0, 1.0], min_keep=0.5, always={0})
        0.75
    """
    if not costs:
        raise ValueError("costs is empty; give the cost of every block.")
    for index, cost in enumerate(costs):
        if not (cost > 0 and math.isfinite(cost)):
            raise ValueError(
                f"Block {index} costs {cost}; costs must be positive and finite. A block that costs nothing saves "
                "nothing: leave it out, or count its FLOPs."
            )
    if not 0 < min_keep <= 1:
        raise ValueError(
            f"min_keep is {min_keep}; it must be in (0, 1]. Name blocks that shall never be dropped in always."
        )
    unknown = sorted(index for index in always if not 0 <= index < len(costs))
    if unknown:
        raise ValueError(f"always names the blocks {unknown}; there are {len(costs)}, 0 to {len(costs) - 1}.")
    total = sum(costs)
    droppable = sum(cost for index, cost in enumerate(costs) if index not in always)
    return min_keep * (droppable / total) + (total - droppable) / total


def allocate(
    kept: float,
    costs: Sequence[float],
    *,
    sensitivities: Sequence[float] | None = None,
    min_keep: float,
    always: Collection[int] = (),
    allocation: Allocation = "sensitivity",
) -> list[float]:
    """Return a keep probability for every block, such that the expected cost is a given share of the full one.

    Args:
        kept: Share of ``sum(costs)`` to keep, in (0, 1]. Below ``floor_of`` the floor is returned, which costs more
            than was asked for: refuse such a budget before training.
        costs: Cost of every block, in execution order and any unit (FLOPs), positive.
        sensitivities: What each block is worth, 0 or more, in any unit; as many as ``costs``. Only their ratios
            matter. Needed for ``"sensitivity"`` and not used otherwise. All zeros are the same as all ones times the
            costs: a uniform allocation.
        min_keep: Smallest keep probability, in (0, 1].
        always: Indices of the blocks that are never dropped.
        allocation: ``"sensitivity"`` gives the least noise for the budget (see the module's docstring), so that
            what is kept rises with sensitivity over cost. ``"uniform"`` keeps every droppable block alike.
            ``"depth"`` has the shape of progressive layer dropping: the probability to be dropped grows linearly with
            the position among the droppable blocks, counted from 1.

    Returns:
        Keep probabilities, one a block, in [``min_keep``, 1], and exactly 1 in ``always``. All exactly 1 where
        ``kept`` is 1.

    Raises:
        ValueError: As ``floor_of``; if ``kept`` is outside (0, 1], the allocation is unknown, or the sensitivities
            are missing, not as many as the costs, negative or not finite.

    Example::

        >>> allocate(0.75, [1.0, 1.0, 1.0, 1.0], min_keep=0.4, always={0}, allocation="depth")
        [1.0, 0.8333333333333333, 0.6666666666666666, 0.5]
    """
    floor = floor_of(costs, min_keep, always)
    if not 0 < kept <= 1:
        raise ValueError(f"kept is {kept}; it is the share of the blocks' compute to keep and must be in (0, 1].")
    if allocation not in get_args(Allocation):
        raise ValueError(f"allocation must be one of {', '.join(get_args(Allocation))}, got {allocation!r}.")
    if allocation == "sensitivity":
        _require_sensitivities(sensitivities, len(costs))
    if kept == 1:
        return [1.0] * len(costs)
    droppable = [index for index in range(len(costs)) if index not in always]
    keep = [1.0] * len(costs)
    if kept <= floor:
        for index in droppable:
            keep[index] = min_keep
        return keep

    own_costs = [costs[index] for index in droppable]
    budget = sum(own_costs) - (1 - kept) * sum(costs)
    if allocation == "uniform":
        own_keep = [min(max(budget / sum(own_costs), min_keep), 1.0)] * len(droppable)
    elif allocation == "depth":
        own_keep = _by_depth(budget, own_costs, min_keep)
    else:
        assert sensitivities is not None  # for the type checker
        own_keep = _by_sensitivity(budget, own_costs, [sensitivities[index] for index in droppable], min_keep)
    for index, probability in zip(droppable, own_keep, strict=True):
        keep[index] = probability
    return keep


def _require_sensitivities(sensitivities: Sequence[float] | None, num_blocks: int) -> None:
    if sensitivities is None:
        raise ValueError(
            "allocation='sensitivity' needs sensitivities. Measure them, or use 'uniform' or 'depth' until they are."
        )
    if len(sensitivities) != num_blocks:
        raise ValueError(f"There are {len(sensitivities)} sensitivities for {num_blocks} costs; give one a block.")
    for index, sensitivity in enumerate(sensitivities):
        if not (sensitivity >= 0 and math.isfinite(sensitivity)):
            raise ValueError(
                f"The sensitivity of block {index} is {sensitivity}; it must be finite and not negative. "
                "robust() makes a raw measurement fit."
            )


def _by_sensitivity(
    budget: float, costs: Sequence[float], sensitivities: Sequence[float], min_keep: float
) -> list[float]:
    if not any(sensitivities):
        ratios = [0.0] * len(costs)
    else:
        # In logarithms, so that no ratio of a tiny to a huge number leaves the range of a float.
        ratios = [
            math.log(sensitivity) - math.log(cost) if sensitivity else -math.inf
            for sensitivity, cost in zip(sensitivities, costs, strict=True)
        ]
        smallest = max(ratios) + _LOG_SMALLEST_RATIO
        ratios = [max(ratio, smallest) for ratio in ratios]

    def keep_at(log_price: float) -> list[float]:
        # The price is 1 / lambda of the module's docstring, so that more is kept at a higher one.
        return [min(max(math.exp(min((ratio + log_price) / 2, 0.0)), min_keep), 1.0) for ratio in ratios]

    return _meet(budget, costs, keep_at, low=2 * math.log(min_keep) - max(ratios), high=-min(ratios))


def _by_depth(budget: float, costs: Sequence[float], min_keep: float) -> list[float]:
    def keep_at(slope: float) -> list[float]:
        return [max(1 + slope * position, min_keep) for position in range(1, len(costs) + 1)]

    return _meet(budget, costs, keep_at, low=min_keep - 1, high=0.0)


def _meet(
    budget: float, costs: Sequence[float], keep_at: Callable[[float], list[float]], low: float, high: float
) -> list[float]:
    """Bisect between ``low``, where keeping costs less than the budget, and ``high``, where it costs more."""
    while low < (middle := (low + high) / 2) < high:
        if sum(cost * keep for cost, keep in zip(costs, keep_at(middle), strict=True)) < budget:
            low = middle
        else:
            high = middle
    return keep_at(high)


def robust(sensitivities: Sequence[float]) -> list[float] | None:
    """Make raw measurements fit for an allocation.

    A measurement is noisy: small differences of losses come out negative, and one block may outweigh all others by
    orders of magnitude. What is not a positive, finite number becomes zero, and the rest is divided by the largest.
    Where that exceeds 20 times the median, square roots are taken. At last, everything is raised to at least 1 % of
    the median. The median is that of the positive values, which alone tell the scale of a measurement, also where
    most of it is zero.

    Args:
        sensitivities: One a block, in any unit; may contain NaN, infinities and negative numbers.

    Returns:
        As many positive numbers without a unit, the largest 1, in the same order (different ones may become equal,
        never the other way round), or ``None`` where nothing positive was measured, as in a SwinV2 whose norms still
        are zero: such a measurement says nothing, fall back to a uniform allocation. The scale of the input has no
        influence.

    Example::

        >>> robust([4.0, 1.0, -0.5, float("nan")])
        [1.0, 0.25, 0.00625, 0.00625]
    """
    clean = [value if value > 0 and math.isfinite(value) else 0.0 for value in sensitivities]
    largest = max(clean, default=0.0)
    if largest == 0:
        return None
    clean = [value / largest for value in clean]
    if _MAX_SKEW * _median_of_positive(clean) < 1:
        clean = [math.sqrt(value) for value in clean]
    smallest = _SMALLEST_SHARE_OF_MEDIAN * _median_of_positive(clean)
    return [max(value, smallest) for value in clean]


def _median_of_positive(values: Sequence[float]) -> float:
    return statistics.median(value for value in values if value > 0)


def noise(sensitivities: Sequence[float], keep_probabilities: Sequence[float]) -> float:
    """Return what dropping adds: ``sum(s * (1 / p - 1))``, which ``allocate`` minimises at a fixed cost.

    Args:
        sensitivities: One a block.
        keep_probabilities: As many, in (0, 1].

    Returns:
        The sum, in the unit of the sensitivities; 0 where nothing is dropped.

    Raises:
        ValueError: If the lengths differ.
    """
    return sum(s * (1 / p - 1) for s, p in zip(sensitivities, keep_probabilities, strict=True))
