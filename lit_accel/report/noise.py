"""How much runs scatter from seed to seed, and draws of what other seeds would have given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from scipy.optimize import minimize_scalar

from lit_accel.report.curve import Curves

Cost = Literal["flops", "seconds"]
# With fewer degrees of freedom, how the scatter depends on the loss would be guessed.
_ENOUGH = 20


class End(Protocol):
    """What a completed run cost and where it ended."""

    @property
    def flops(self) -> float:
        """FLOPs that were spent."""
        ...

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        ...

    @property
    def loss(self) -> float:
        """The last held-out loss."""
        ...


@dataclass(frozen=True, eq=False)
class Cell:
    """The runs of one arm at one budget, as points.

    Args:
        log_costs: Natural logarithms of FLOPs or of seconds, of shape (runs,).
        losses: Final held-out losses, of shape (runs,).
    """

    log_costs: np.ndarray
    losses: np.ndarray

    @staticmethod
    def of(runs: Sequence[End], cost: Cost) -> Cell:
        """Take the ends of runs."""
        return Cell(np.log([getattr(run, cost) for run in runs]), np.array([run.loss for run in runs]))

    @property
    def mean(self) -> np.ndarray:
        """The mean logarithm of the cost and the mean loss, of shape (2,)."""
        return np.array([self.log_costs.mean(), self.losses.mean()])

    @property
    def deviations(self) -> np.ndarray:
        """What each run differs by from the mean, of shape (runs, 2)."""
        return np.stack([self.log_costs, self.losses], axis=1) - self.mean


def scatter(cells: Sequence[Cell]) -> float | None:
    """Return the standard deviation of losses between seeds of one budget; ``None`` if there is one seed each."""
    num_free = sum(len(cell.losses) - 1 for cell in cells)
    squares = sum(float(np.sum(cell.deviations[:, 1] ** 2)) for cell in cells)
    return float(np.sqrt(squares / num_free)) if num_free else None


@dataclass(frozen=True)
class Scatter:
    """How much losses scatter from seed to seed, as a function of the loss: runs that end early scatter by more.

    Args:
        deviation: The standard deviation at a loss.
        loss: That loss.
        slope: By how much the deviation's logarithm grows with the loss.
        num_free: Degrees of freedom of the estimate.
    """

    deviation: float
    loss: float
    slope: float
    num_free: int

    def relative(self, loss: float | np.ndarray) -> np.ndarray:
        """Return the standard deviation at losses, in parts of the one that is known."""
        return np.exp(self.slope * (np.asarray(loss) - self.loss))

    def at(self, loss: float | np.ndarray) -> np.ndarray:
        """Return the standard deviation at losses."""
        return self.deviation * self.relative(loss)


def fit_scatter(cells: Sequence[Cell]) -> Scatter:
    """Estimate the scatter from cells with several seeds, by maximum likelihood of their variances.

    With fewer than 20 degrees of freedom it is the same at all losses.

    Args:
        cells: The cells; those of one seed are left out.
    """
    repeated = [cell for cell in cells if len(cell.losses) > 1]
    pooled = scatter(repeated)
    if pooled is None:
        return Scatter(float("nan"), 0.0, 0.0, 0)
    num_free = np.array([len(cell.losses) - 1 for cell in repeated])
    squares = np.array([float(np.sum(cell.deviations[:, 1] ** 2)) for cell in repeated])
    losses = np.array([cell.mean[1] for cell in repeated])
    middle, total = float(np.average(losses, weights=num_free)), int(num_free.sum())
    if total < _ENOUGH or pooled == 0 or np.ptp(losses) == 0:
        return Scatter(pooled, middle, 0.0, total)

    # For a given slope the best deviation has a closed form; what is left is convex.
    def variance(slope: float) -> float:
        return float(np.sum(squares * np.exp(-2 * slope * (losses - middle))) / total)

    slope = float(minimize_scalar(lambda slope: np.log(variance(slope))).x)
    return Scatter(float(np.sqrt(variance(slope))), middle, slope, total - 1)


@dataclass(frozen=True, eq=False)
class Noise:
    """What is known of the scatter of runs.

    Args:
        deviations: Deviations in log cost and in loss to draw from, of shape (deviations, 2), of unbiased variance;
            those in loss as they are at the loss of ``scatter``.
        scatter: How they depend on the loss.
        num_free: Degrees of freedom: how many of them are independent.
        source: Where they come from, in words.
    """

    deviations: np.ndarray
    scatter: Scatter
    num_free: int
    source: str

    def scales(self, num_draws: int, rng: np.random.Generator) -> np.ndarray:
        """Draw how large the scatter is.

        A few seeds do not say that well. So each draw has its own size of it, by the chi-squared distribution of a
        variance that was estimated with so many degrees of freedom; without that, and without sharing the deviations
        of all budgets, what is meant as 95 % covers about 75 % with three seeds a budget.

        Args:
            num_draws: How many draws.
            rng: The generator.

        Returns:
            Factors of the deviations, of shape (draws, 1).
        """
        return np.sqrt(self.num_free / rng.chisquare(self.num_free, size=(num_draws, 1)))

    def draw(
        self,
        cells: Sequence[Cell],
        scales: np.ndarray,
        rng: np.random.Generator,
        shared: tuple[float, float] = (0.0, 0.0),
    ) -> np.ndarray:
        """Draw the means that other seeds might have given: budgets are kept, each of its runs gets a deviation.

        Args:
            cells: The cells.
            scales: How large the scatter is in each draw; from :meth:`scales`.
            rng: The generator.
            shared: Standard deviations of what all runs of a cell share beyond the seeds, in log cost and in loss.

        Returns:
            Mean log costs and mean losses, of shape (draws, cells, 2).
        """
        means = np.empty((len(scales), len(cells), 2))
        for index, cell in enumerate(cells):
            chosen = rng.integers(len(self.deviations), size=(len(scales), len(cell.losses)))
            size = np.array([1.0, self.scatter.relative(cell.mean[1])])
            means[:, index] = cell.mean + scales * size * self.deviations[chosen].mean(axis=1)
        if any(shared):
            means += np.array(shared) * rng.standard_normal(means.shape)
        return means


def estimate_noise(dense: Sequence[Cell], arm: Sequence[Cell], curve: Curves) -> Noise | None:
    """Estimate the scatter from seeds of one budget, or else from what the dense curve misses.

    Args:
        dense: The dense cells.
        arm: Those of the arm that is compared, or none.
        curve: The curve through the dense cells.

    Returns:
        The noise; ``None`` if nothing says how large it is.
    """
    repeated = [cell for cell in (*dense, *arm) if len(cell.losses) > 1]
    if repeated:
        law = fit_scatter(repeated)
        deviations = np.concatenate([cell.deviations / [1.0, float(law.relative(cell.mean[1]))] for cell in repeated])
        num_free, source = len(deviations) - len(repeated), "seeds"
    else:
        means = np.stack([cell.mean for cell in dense])
        num_free, source = len(dense) - 3, "residuals of the fit"
        if num_free < 1:
            return None
        residuals = means[:, 1] - curve.loss(means[:, 0])
        deviations = np.stack([np.zeros(len(dense)), residuals], axis=1)
        law = Scatter(float(np.sqrt(np.sum(residuals**2) / num_free)), 0.0, 0.0, num_free)
    return Noise(deviations * np.sqrt(len(deviations) / num_free), law, num_free, source)
