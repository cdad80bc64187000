"""Choosing learning rates: the same trials for every arm, on a seed that is not reported."""

from __future__ import annotations

import math
from collections.abc import Mapping

from scripts.bench.study import EXTENSIONS, GRID

_STEP = 2.0


def next_trial(losses: Mapping[float, float]) -> float | None:
    """Return a learning rate that is to be tried, or ``None`` if the optimum is found.

    Args:
        losses: Held-out losses of the trials so far.
    """
    for rate in GRID:
        if rate not in losses:
            return rate
    best = min(losses, key=lambda rate: losses[rate])
    if len(losses) >= len(GRID) + EXTENSIONS:
        return None
    if best == max(losses):
        return best * _STEP
    return best / _STEP if best == min(losses) else None


def is_interior(losses: Mapping[float, float]) -> bool:
    """Whether there are trials on both sides of the best one."""
    best = min(losses, key=lambda rate: losses[rate])
    return min(losses) < best < max(losses)


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the optimum: the lowest point of a parabola in log2 of the learning rate through the best and its two.

    At an end of the grid it is the end.

    Args:
        losses: Held-out losses of the trials, infinite where they diverged; the grid is one of factors of 2.

    Returns:
        The learning rate to three digits: what is written in the log is what is trained with.
    """
    best = min(losses, key=lambda rate: losses[rate])
    if not is_interior(losses):
        return best
    below, here, above = losses[best / _STEP], losses[best], losses[best * _STEP]
    # A trial that diverged has no loss: beside it, the parabola is as steep as can be.
    shift = -0.5 if math.isinf(above) else (below - above) / (2 * (below - 2 * here + above))
    return _three_digits(best * _STEP**shift)


def between(rates: Mapping[float, float], budget: float) -> float:
    """Return the learning rate at a budget, by a power law through the two budgets at which it was tuned.

    Args:
        rates: Learning rates by budget; if it was tuned at one alone, that is the one of all.
        budget: The budget; beyond the two the law goes on.
    """
    if budget in rates:
        return rates[budget]
    if len(rates) == 1:
        return next(iter(rates.values()))
    (low, low_rate), (high, high_rate) = sorted(rates.items())
    power = math.log(high_rate / low_rate) / math.log(high / low)
    return _three_digits(low_rate * (budget / low) ** power)


def _three_digits(rate: float) -> float:
    return float(f"{rate:.3g}")
