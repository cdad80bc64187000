"""The law that dense training follows: loss = floor + excess, where the excess falls as a power of the cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import elementwise

# Exponents that are tried. Measured ones lie between 0.02 and 1; the ends only keep the search finite.
_EXPONENTS = np.geomspace(1e-3, 10.0, 121)


@dataclass(frozen=True)
class Curves:
    """Curves ``floor + excess * (cost / reference) ** -exponent``, one an entry; a single one has entries of shape ().

    Written around a reference cost, the geometric mean of the fitted ones, the numbers stay near one at any scale.

    Args:
        floor: The loss that no cost gets below, at least 0.
        excess: What is above it at the reference cost; NaN where losses do not fall with the cost.
        exponent: How fast the excess falls.
        log_reference: The natural logarithm of the reference cost.
    """

    floor: np.ndarray
    excess: np.ndarray
    exponent: np.ndarray
    log_reference: np.ndarray

    def loss(self, log_cost: np.ndarray) -> np.ndarray:
        """Return the losses at costs given by their natural logarithms, broadcast against the curves."""
        return self.floor + self.excess * np.exp(-self.exponent * (log_cost - self.log_reference))

    def log_cost(self, loss: np.ndarray) -> np.ndarray:
        """Return the natural logarithms of the costs at which losses are reached; infinite at or below the floor."""
        above = np.maximum(loss - self.floor, 0)
        with np.errstate(divide="ignore"):
            return self.log_reference - np.log(above / self.excess) / self.exponent

    @property
    def exists(self) -> np.ndarray:
        """Whether losses fell with the cost, so that there is a curve."""
        return np.isfinite(self.excess)


def fit_curves(log_costs: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> Curves:
    """Fit one curve to each row by weighted least squares.

    For a given exponent the best floor and excess have a closed form, so only the exponent is searched for: on a grid,
    then between the grid's neighbours of the best. All rows are done at once, which is what makes a bootstrap cheap.

    Args:
        log_costs: Natural logarithms of costs, of shape (rows, points) with three different ones a row or more.
        losses: Losses of that shape, above zero.
        weights: Weights of the points, of shape (points,).

    Returns:
        Curves of shape (rows,).
    """
    log_reference = np.average(log_costs, axis=1, weights=weights)
    distances = log_costs - log_reference[:, None]
    rows = np.arange(len(losses))

    def squares(log_exponent: np.ndarray, row: np.ndarray) -> np.ndarray:
        floor, excess, powers = _solve(np.exp(log_exponent), distances[row], losses[row], weights)
        return np.sum(weights * (floor[:, None] + excess[:, None] * powers - losses[row]) ** 2, axis=-1)

    grid = np.log(_EXPONENTS)
    on_grid = np.stack([squares(np.full(len(rows), value), rows) for value in grid])
    # The best of the inner points: a minimum at an end of the grid is as good as there.
    best = 1 + on_grid[1:-1].argmin(axis=0)
    left, middle, right = on_grid[best - 1, rows], on_grid[best, rows], on_grid[best + 1, rows]
    log_exponent = grid[best]
    inside = (left >= middle) & (middle <= right) & ((left > middle) | (right > middle))
    if inside.any():
        at = best[inside]
        found = elementwise.find_minimum(squares, (grid[at - 1], grid[at], grid[at + 1]), args=(rows[inside],))
        log_exponent[inside] = found.x
    exponent = np.exp(log_exponent)
    floor, excess, _ = _solve(exponent, distances, losses, weights)
    return Curves(floor, np.where(excess > 0, excess, np.nan), exponent, log_reference)


def _solve(
    exponent: np.ndarray, distances: np.ndarray, losses: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best floor (at least 0) and excess at given exponents, and the powers that the excess multiplies."""
    powers = np.exp(-exponent[:, None] * distances)
    mean_power = np.average(powers, axis=1, weights=weights)
    mean_loss = np.average(losses, axis=1, weights=weights)
    deviations = powers - mean_power[:, None]
    spread = np.sum(weights * deviations**2, axis=1)
    excess = np.sum(weights * deviations * losses, axis=1) / spread
    floor = mean_loss - excess * mean_power
    through_zero = np.sum(weights * powers * losses, axis=1) / np.sum(weights * powers**2, axis=1)
    return np.maximum(floor, 0), np.where(floor < 0, through_zero, excess), powers
