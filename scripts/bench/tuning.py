"""Choosing learning rates: the same trials for every arm, on a seed that is not reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from scripts.bench.study import EXTENSIONS, GRID

_STEP = 2.0


def next_trial(losses: Mapping[float, float], refined: bool = False, grid: Sequence[float] = GRID) -> float | None:
    """Return a learning rate that is to be tried, or ``None`` if the optimum is found.

    Args:
        losses: Held-out losses of the trials so far.
        refined: Whether there are trials half a step on both sides of the best of the grid, too.
        grid: Learning rates that are tried in any case, each twice the one before.
    """
    for rate in grid:
        if rate not in losses:
            return rate
    on_grid = {rate: loss for rate, loss in losses.items() if _is_on_grid(rate, grid)}
    best = min(on_grid, key=lambda rate: on_grid[rate])
    if len(on_grid) < len(grid) + EXTENSIONS:
        if best == max(on_grid):
            return best * _STEP
        if best == min(on_grid):
            return best / _STEP
    if refined:
        halves = (_three_digits(best / _STEP**0.5), _three_digits(best * _STEP**0.5))
        return next((rate for rate in halves if rate not in losses), None)
    return None


def is_interior(losses: Mapping[float, float]) -> bool:
    """Whether there are trials on both sides of the best one."""
    best = min(losses, key=lambda rate: losses[rate])
    return min(losses) < best < max(losses)


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the optimum: the lowest point of a parabola in log2 of the learning rate through the best and its two.

    At an end of what was tried it is the end.

    Args:
        losses: Held-out losses of the trials, infinite where they diverged.

    Returns:
        The learning rate to three digits: what is written in the log is what is trained with.
    """
    best = min(losses, key=lambda rate: losses[rate])
    if not is_interior(losses):
        return best
    below = max(rate for rate in losses if rate < best)
    above = min(rate for rate in losses if rate > best)
    left, right = math.log2(below / best), math.log2(above / best)
    rise_left, rise_right = losses[below] - losses[best], losses[above] - losses[best]
    if math.isinf(rise_right):
        # A trial that diverged has no loss: beside it, the parabola is as steep as can be.
        shift = left / 2
    else:
        shift = (rise_right * left**2 - rise_left * right**2) / (2 * (rise_right * left - rise_left * right))
    return _three_digits(best * 2**shift)


def between(rates: Mapping[float, float], budget: float) -> float:
    """Return the learning rate at a budget, by a power law through the two next budgets at which it was tuned.

    Args:
        rates: Learning rates by budget; if it was tuned at one alone, that is the one of all.
        budget: The budget; beyond the tuned ones the law of the last two goes on.
    """
    if budget in rates:
        return rates[budget]
    if len(rates) == 1:
        return next(iter(rates.values()))
    tuned = sorted(rates)
    low, high = next((pair for pair in pairwise(tuned) if budget <= pair[1]), (tuned[-2], tuned[-1]))
    low_rate, high_rate = rates[low], rates[high]
    power = math.log(high_rate / low_rate) / math.log(high / low)
    return _three_digits(low_rate * (budget / low) ** power)


def _is_on_grid(rate: float, grid: Sequence[float]) -> bool:
    steps = math.log(rate / grid[0], _STEP)
    return abs(steps - round(steps)) < 1e-6


def _three_digits(rate: float) -> float:
    return float(f"{rate:.3g}")
