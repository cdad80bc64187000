"""The scatter of runs is the one that they were drawn with, and so is what all runs of a budget share."""

from dataclasses import dataclass

import numpy as np
import pytest

from lit_accel.report.frontier import fit_frontier
from lit_accel.report.noise import Cell, estimate_noise, fit_scatter
from lit_accel.report.saving import saving_against


@dataclass
class End:
    flops: float
    seconds: float
    loss: float


def cells(num_cells, slope, rng, num_seeds=4):
    means = rng.uniform(1.5, 2.5, num_cells)
    return [
        Cell(np.zeros(num_seeds), mean + 0.01 * np.exp(slope * (mean - 2)) * rng.standard_normal(num_seeds))
        for mean in means
    ]


@pytest.mark.parametrize("slope", [-1.0, 0.0, 2.0])
def test_how_the_scatter_depends_on_the_loss_is_found(slope):
    law = fit_scatter(cells(200, slope, np.random.default_rng(1)))
    assert law.slope == pytest.approx(slope, abs=0.35)
    losses = np.array([1.5, 2.0, 2.5])
    np.testing.assert_allclose(law.at(losses), 0.01 * np.exp(slope * (losses - 2)), rtol=0.2)
    assert law.num_free == 599


def test_few_seeds_have_one_scatter():
    few = cells(6, 3.0, np.random.default_rng(2))
    law = fit_scatter(few)
    assert (law.slope, law.num_free) == (0.0, 18)
    assert law.deviation == pytest.approx(np.sqrt(np.mean([cell.losses.var(ddof=1) for cell in few])))


def test_a_cell_is_drawn_with_the_scatter_of_its_loss():
    known = cells(200, 2.0, np.random.default_rng(3))
    noise = estimate_noise(known, (), None)
    rng = np.random.default_rng(4)
    low, high = (Cell(np.zeros(3), np.full(3, loss)) for loss in (1.6, 2.4))
    drawn = noise.draw([low, high], noise.scales(4000, rng), rng)
    np.testing.assert_allclose(
        drawn[:, :, 1].std(axis=0), 0.01 * np.exp(2 * np.array([-0.4, 0.4])) / np.sqrt(3), rtol=0.15
    )


def dense(offsets, rng):
    runs = []
    for budget, offset in zip(np.geomspace(1, 8, len(offsets)), offsets, strict=True):
        for _ in range(3):
            loss = 1 + budget**-0.5 + offset + 0.001 * rng.standard_normal()
            runs.append(End(flops=budget * 1e12, seconds=budget, loss=loss))
    return runs


def test_what_a_curve_misses_budgets_by_beyond_the_seeds_is_in_the_intervals():
    rng = np.random.default_rng(5)
    exact = fit_frontier(dense(np.zeros(12), rng), "flops")
    missed = fit_frontier(dense(0.01 * rng.standard_normal(12), rng), "flops")
    assert exact.shared[1] < 0.0005
    assert missed.shared[1] == pytest.approx(0.01, rel=0.5)
    arm = Cell(np.log(np.full(3, 2e12)), 1.6 + 0.001 * rng.standard_normal(3))
    widths = []
    for frontier in (exact, missed):
        saving = saving_against(frontier, arm, [arm])
        widths.append(saving.high - saving.low)
    assert widths[1] > 4 * widths[0]


def test_few_budgets_do_not_tell_what_a_curve_misses_them_by():
    assert fit_frontier(dense([0.0, 0.02, -0.02, 0.02, 0.0, 0.01, 0.0], np.random.default_rng(6)), "flops").shared == (
        0.0,
        0.0,
    )


def test_an_error_of_the_cost_that_runs_share_is_not_averaged_away():
    rng = np.random.default_rng(7)
    runs = dense(np.zeros(5), rng)
    arm = Cell(np.log(np.full(30, 2.0)), 1.6 + 0.001 * rng.standard_normal(30))
    plain, uncertain = (saving_against(fit_frontier(runs, "seconds", error), arm, [arm]) for error in (0.0, 0.1))
    assert uncertain.share == plain.share
    # In the logarithm of the cost; the arm's own error alone would reach that far.
    assert np.log1p(-uncertain.low) - np.log1p(-uncertain.high) > 2 * 1.96 * 0.1
