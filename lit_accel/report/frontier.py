"""The dense frontier: what dense training costs to end at a loss, by the ends of completed dense runs only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_accel.compute.units import duration, prefix_for
from lit_accel.report.arms import SAME_BUDGET, by_budget
from lit_accel.report.curve import Curves, fit_curves
from lit_accel.report.noise import Cell, Cost, End, estimate_noise, fit_scatter, scatter

NUM_DRAWS = 2000
NUM_BUDGETS = 3
# What the curve may miss a budget by: standard errors of its mean, or a share of the range of losses.
_STANDARD_ERRORS, _SHARE_OF_RANGE = 3.0, 0.02
# With fewer budgets beyond those that the curve needs, nobody can say by how much it misses them.
_ENOUGH_BUDGETS = 5
# A power so steep is a step and then a plateau: no frontier to read costs from.
_STEEPEST = 8.0


@dataclass(frozen=True, eq=False)
class Frontier:
    """Loss against cost at the ends of the dense runs.

    Args:
        cost: What the cost is: ``flops`` or ``seconds``.
        cells: The dense runs by budget, by rising FLOPs.
        curve: The fitted curve, of shape (1,); ``None`` if there is none.
        reason: Why there is none, or ``None``.
        residuals: What each budget's mean loss is above the curve, of shape (budgets,).
        warnings: What to be careful about.
        shared: Standard deviations of what all runs of a cell share beyond the seeds. In log cost: how well the unit
            of seconds was known when they ran. In loss: by how much the curve misses budgets beyond what the scatter of
            seeds explains, if there are budgets enough to tell.
    """

    cost: Cost
    cells: tuple[Cell, ...]
    curve: Curves | None
    reason: str | None
    residuals: np.ndarray
    warnings: tuple[str, ...] = ()
    shared: tuple[float, float] = (0.0, 0.0)

    @property
    def log_costs(self) -> tuple[float, float]:
        """Natural logarithms of the lowest and the highest budget's cost: nothing is said outside."""
        means = [cell.mean[0] for cell in self.cells]
        return float(min(means)), float(max(means))

    def fit(self, means: np.ndarray) -> Curves:
        """Fit curves through means of the cells, of shape (draws, cells, 2)."""
        return fit_curves(means[:, :, 0], means[:, :, 1], _weights(self.cells))

    def band(self, log_costs: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
        """Return between which losses the curve lies in 95 % of the draws.

        Args:
            log_costs: Natural logarithms of costs, of shape (points,).
            seed: Of the draws.

        Returns:
            Lower and upper losses, each of shape (points,); ``None`` if nothing says how much runs scatter.
        """
        if self.curve is None or (noise := estimate_noise(self.cells, (), self.curve)) is None:
            return None
        rng = np.random.default_rng(seed)
        draws = self.fit(noise.draw(self.cells, noise.scales(NUM_DRAWS, rng), rng, self.shared))
        losses = Curves(
            draws.floor[:, None], draws.excess[:, None], draws.exponent[:, None], draws.log_reference[:, None]
        ).loss(log_costs)
        low, high = np.quantile(losses[draws.exists], [0.025, 0.975], axis=0)
        return low, high


def fit_frontier(dense: Sequence[End], cost: Cost, cost_error: float = 0.0) -> Frontier:
    """Fit the frontier of dense runs.

    Args:
        dense: Dense runs, each with its own completed learning-rate decay.
        cost: ``flops`` or ``seconds``.
        cost_error: Standard deviation of the error that runs of a budget share in their log cost.
    """
    cells = tuple(Cell.of(runs, cost) for runs in by_budget(dense))
    means = np.stack([cell.mean for cell in cells]) if cells else np.empty((0, 2))
    nothing = np.empty(0)
    if reason := _why_not(means, cost):
        return Frontier(cost, cells, None, reason, nothing)
    frontier = Frontier(cost, cells, None, None, nothing)
    curve = frontier.fit(means[None])
    if not curve.exists[0] or curve.exponent[0] > _STEEPEST:
        reason = (
            f"No power law goes through the dense ends: their loss does not fall steadily as {_NOUNS[cost]} grow. "
            "Tune the learning rate at each budget, or choose budgets further apart."
        )
        return Frontier(cost, cells, None, reason, nothing)
    residuals = means[:, 1] - curve.loss(means[:, 0])
    return Frontier(
        cost,
        cells,
        curve,
        None,
        residuals,
        _check(cells, means, residuals, cost),
        (cost_error, _misfit(cells, residuals)),
    )


def _misfit(cells: Sequence[Cell], residuals: np.ndarray) -> float:
    """Estimate by how much a curve misses its budgets beyond the scatter of seeds, by the method of moments."""
    num_free = len(cells) - NUM_BUDGETS
    law = fit_scatter(cells)
    if num_free < _ENOUGH_BUDGETS or not law.deviation > 0:
        return 0.0
    weights = np.array([len(cell.losses) / float(law.at(cell.mean[1])) ** 2 for cell in cells])
    excess = np.sum(weights * residuals**2) - num_free
    return float(np.sqrt(max(0.0, excess) / (weights.sum() - np.sum(weights**2) / weights.sum())))


def _weights(cells: Sequence[Cell]) -> np.ndarray:
    """Weight budgets by their runs, and by how little these scatter where that is known."""
    sizes = fit_scatter(cells).relative(np.array([cell.mean[1] for cell in cells]))
    return np.array([len(cell.losses) for cell in cells]) / sizes**2


_NOUNS = {"flops": "FLOPs", "seconds": "seconds"}


def amount(value: float, cost: Cost) -> str:
    """Write FLOPs or seconds for people."""
    if cost == "seconds":
        return duration(value)
    prefix, divisor = prefix_for(value)
    return f"{value / divisor:.3g} {prefix}FLOPs"


def _why_not(means: np.ndarray, cost: Cost) -> str | None:
    log_costs = np.sort(means[:, 0])
    distinct: list[float] = []
    for log_cost in log_costs:
        if not distinct or log_cost > distinct[-1] + np.log1p(SAME_BUDGET):
            distinct.append(float(log_cost))
    if len(distinct) < NUM_BUDGETS:
        found = ", ".join(amount(float(np.exp(log_cost)), cost) for log_cost in distinct) or "none"
        missing = NUM_BUDGETS - len(distinct)
        return (
            f"The dense frontier in {_NOUNS[cost]} needs completed dense runs at {NUM_BUDGETS} budgets or more. Found: "
            f"{found}. Train {missing} more, each with its own learning-rate decay, so that their losses lie around "
            "the method's."
        )
    if means[:, 1].min() <= 0:
        return "The curve is one of losses above zero, and a dense run ended at or below zero."
    return None


def _check(cells: Sequence[Cell], means: np.ndarray, residuals: np.ndarray, cost: Cost) -> tuple[str, ...]:
    allowed = np.maximum(
        _STANDARD_ERRORS * (scatter(cells) or 0.0) / np.sqrt([len(cell.losses) for cell in cells]),
        _SHARE_OF_RANGE * np.ptp(means[:, 1]),
    )
    against = "more than seeds explain" if scatter(cells) else "and there are no seeds to compare with"
    warnings = [
        f"The curve in {_NOUNS[cost]} misses the dense runs of {amount(float(np.exp(mean[0])), cost)} by "
        f"{residual:+.4f}, {against}: "
        "savings near there are not to be trusted. Was the learning rate tuned at each budget?"
        for mean, residual in zip(
            means[np.abs(residuals) > allowed], residuals[np.abs(residuals) > allowed], strict=True
        )
    ]
    if len(cells) == NUM_BUDGETS:
        warnings.append(
            "The dense curve has three parameters and goes through three budgets: nothing is left to check its shape "
            "with. A fourth budget would."
        )
    return tuple(warnings)
