"""What an arm saved at equal loss, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from lit_accel.report.curve import Curves
from lit_accel.report.frontier import NUM_DRAWS, Frontier
from lit_accel.report.noise import Cell, Noise, estimate_noise

_OUTSIDE = "outside the measured range"
_ROUNDING = 1e-6  # of the logarithm of a cost


@dataclass(frozen=True)
class Saving:
    """What an arm saved at one budget against dense training that ends at the same loss, in FLOPs or in seconds.

    Args:
        cost: What the arm spent; the geometric mean of its seeds.
        loss: Where it ended; the mean of its seeds.
        dense_cost: What dense training costs to end there; ``None`` if that cannot be said.
        reason: Why not, or ``None``.
        outside: ``"better"`` or ``"worse"`` where the loss is one of no measured budget: dense training would end there
            with more than the largest, or with less than the smallest.
        median: The median of the draws; ``None`` without an interval.
        low: Where the 95 % interval of the saving begins; minus infinity where draws left the measured range.
        high: Where it ends; infinity where draws left the measured range.
        interval: What the interval rests on, or why there is none.
        share_outside: The share of draws outside of the measured range.
        p_value: How often draws would lie as far on the other side of 0, of both sides; ``None`` without an interval.
    """

    cost: float
    loss: float
    dense_cost: float | None
    reason: str | None
    outside: Literal["better", "worse"] | None = None
    median: float | None = None
    low: float | None = None
    high: float | None = None
    interval: str = ""
    share_outside: float = 0.0
    p_value: float | None = None

    @property
    def share(self) -> float | None:
        """The share of the dense cost that was saved; negative if the arm cost more."""
        return None if self.dense_cost is None else 1 - self.cost / self.dense_cost


def saving_against(
    frontier: Frontier, cell: Cell, arm: Sequence[Cell], num_draws: int = NUM_DRAWS, seed: int = 0
) -> Saving:
    """Compare an arm at one budget with the dense frontier.

    Args:
        frontier: The frontier.
        cell: The arm's runs at the budget.
        arm: The arm's cells at all budgets, for what they say about the scatter of seeds.
        num_draws: Draws of the bootstrap.
        seed: Of the draws.
    """
    log_cost, loss = (float(value) for value in cell.mean)
    cost = float(np.exp(log_cost))
    if frontier.curve is None:
        return Saving(cost, loss, None, "no dense frontier")
    low, high = frontier.log_costs
    dense_log_cost = float(frontier.curve.log_cost(np.array([loss]))[0])
    # By the cost and not by the loss: one lucky seed at the largest budget measures nothing beyond that budget.
    if not low - _ROUNDING <= dense_log_cost <= high + _ROUNDING:
        if dense_log_cost > high:
            return Saving(cost, loss, None, f"{_OUTSIDE}: better than the dense curve at its largest budget", "better")
        return Saving(cost, loss, None, f"{_OUTSIDE}: worse than the dense curve at its smallest budget", "worse")
    dense_cost = float(np.exp(dense_log_cost))
    drawn = _draw_frontiers(frontier, tuple(arm), num_draws, seed)
    if drawn is None:
        return Saving(cost, loss, dense_cost, None, interval="one seed: no interval")
    noise, scales, curves = drawn
    drawn_means = noise.draw([cell], scales, np.random.default_rng([seed, 1]), frontier.shared)
    drawn_cost, drawn_loss = drawn_means[:, 0].T
    # Infinite at and below the floor: dense training would not get there at any cost, as far as this draw can tell.
    drawn_dense = curves.log_cost(drawn_loss)
    savings = -np.expm1(drawn_cost - drawn_dense)
    is_better, is_worse, is_unknown = drawn_dense > high, drawn_dense < low, ~curves.exists
    # Draws outside are not cut: they are worse or better than any number, and those without a curve may be either.
    at_worst = np.where(is_worse | is_unknown, -np.inf, np.where(is_better, np.inf, savings))
    at_best = np.where(is_better | is_unknown, np.inf, np.where(is_worse, -np.inf, savings))
    return Saving(
        cost,
        loss,
        dense_cost,
        None,
        median=_quantile(at_worst, 0.5),
        low=_quantile(at_worst, 0.025),
        high=_quantile(at_best, 0.975),
        interval=f"scatter from {noise.source}, {noise.num_free} degrees of freedom",
        share_outside=float(np.mean(is_better | is_worse | is_unknown)),
        # A draw of which nothing is known counts against either side.
        p_value=min(1.0, 2 * float(min(np.mean(at_worst <= 0), np.mean(at_best >= 0)))),
    )


@lru_cache(maxsize=4)
def _draw_frontiers(
    frontier: Frontier, arm: tuple[Cell, ...], num_draws: int, seed: int
) -> tuple[Noise, np.ndarray, Curves] | None:
    """Draw the frontiers that other seeds might have given; arms that share what is known of the scatter share them."""
    assert frontier.curve is not None
    noise = estimate_noise(frontier.cells, arm, frontier.curve)
    if noise is None:
        return None
    rng = np.random.default_rng(seed)
    scales = noise.scales(num_draws, rng)
    return noise, scales, frontier.fit(noise.draw(frontier.cells, scales, rng, frontier.shared))


def _quantile(values: np.ndarray, share: float) -> float:
    # Without interpolation: between a number and infinity there is none.
    return float(np.quantile(values, share, method="inverted_cdf"))
