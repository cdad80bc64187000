"""Savings at equal loss: planted ones are found, their intervals are honest, and nothing is extrapolated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_accel.report.frontier import Frontier, fit_frontier
from lit_accel.report.noise import Cell, estimate_noise
from lit_accel.report.runs import find_runs
from lit_accel.report.saving import saving_against
from tests.report.planted import REFERENCE, cell, loss_at, write_dense, write_ledger

BUDGETS = REFERENCE * np.array([0.5, 1, 2, 4])


def frontier_of(cells, cost="flops"):
    bare = Frontier(cost, tuple(cells), None, None, np.empty(0))
    return Frontier(cost, tuple(cells), bare.fit(np.stack([cell.mean for cell in cells])[None]), None, np.empty(0))


def planted(saving, num_seeds, deviation, rng, cost_deviation=0.0):
    """Dense cells, and one of an arm of a known saving between the second and the third budget."""
    dense = [cell(flops, loss_at(flops), num_seeds, deviation, rng, cost_deviation) for flops in BUDGETS]
    flops = 1.5 * REFERENCE * (1 - saving)
    return dense, cell(flops, loss_at(flops / (1 - saving)), num_seeds, deviation, rng, cost_deviation)


@pytest.mark.parametrize("saving", [-0.25, 0.0, 0.1, 0.4])
def test_finds_a_planted_saving_without_noise(saving):
    dense, arm = planted(saving, 1, 0.0, np.random.default_rng(0))
    found = saving_against(frontier_of(dense), arm, [arm])
    assert found.share == pytest.approx(saving, abs=1e-4)
    assert found.dense_cost == pytest.approx(1.5 * REFERENCE, rel=1e-4)


# As FLOPs, which are the same for all seeds, and as seconds, which scatter by themselves. 0 is an arm without effect.
@pytest.mark.parametrize("cost_deviation", [0.0, 0.02])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(cost_deviation):
    covered, estimates, widths = [], [], []
    for number in range(150):
        rng = np.random.default_rng(number)
        truth = (-0.2, 0.0, 0.3)[number % 3]
        dense, arm = planted(truth, 3, 0.005, rng, cost_deviation)
        found = saving_against(frontier_of(dense), arm, [arm], num_draws=250)
        covered.append(found.low <= truth <= found.high)
        estimates.append(np.log1p(-found.share) - np.log1p(-truth))
        widths.append(np.log1p(-found.low) - np.log1p(-found.high))
    # Of 150 intervals of 95 %, fewer than 133 or all of them cover with a probability below 0.1 %.
    assert 0.886 <= np.mean(covered) < 1
    assert abs(np.mean(estimates)) < 0.005
    # An interval that covers because it is endless says nothing: the truth scatters by about 0.017 and 0.026.
    assert np.median(widths) < (0.1 if cost_deviation == 0 else 0.18)


@settings(deadline=None, max_examples=15)
@given(factor=st.floats(-6, 9), seed=st.integers(0, 100))
def test_the_unit_of_the_cost_does_not_matter(factor, seed):
    dense, arm = planted(0.2, 2, 0.005, np.random.default_rng(seed))
    moved = [Cell(one.log_costs + factor * np.log(10), one.losses) for one in (*dense, arm)]
    one = saving_against(frontier_of(dense), arm, [arm], num_draws=50)
    other = saving_against(frontier_of(moved[:-1]), moved[-1], [moved[-1]], num_draws=50)
    assert other.share == pytest.approx(one.share, abs=1e-4)
    assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=1e-3)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), budget=st.integers(1, 2))
def test_dense_training_saves_nothing_against_itself(seed, budget):
    # Three budgets, through which the curve goes exactly.
    dense, _ = planted(0.0, 3, 0.002, np.random.default_rng(seed))
    found = saving_against(frontier_of(dense[:3]), dense[budget], [], num_draws=50)
    assert found.share == pytest.approx(0, abs=1e-3) or found.reason is not None
    dense, _ = planted(0.0, 1, 0.0, np.random.default_rng(seed))
    assert saving_against(frontier_of(dense), dense[budget], []).share == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("budget", "side"),
    [(0.45, "worse"), (4.4, "better")],
)
def test_nothing_is_extrapolated(budget, side):
    dense, _ = planted(0.0, 2, 0.0, np.random.default_rng(0))
    arm = Cell(np.log([REFERENCE]), np.array([loss_at(budget * REFERENCE)]))
    found = saving_against(frontier_of(dense), arm, [arm])
    assert found.share is None
    assert found.low is found.high is found.median is None
    assert found.outside == side
    assert found.reason is not None and found.reason.startswith(
        f"outside the measured range: {side} than the dense curve"
    )


def test_a_lucky_seed_at_the_largest_budget_measures_nothing_beyond_it():
    dense, _ = planted(0.0, 2, 0.0, np.random.default_rng(0))
    largest = dense[-1]
    lucky = Cell(np.repeat(largest.log_costs, 2)[:3], largest.mean[1] + np.array([-0.2, 0.1, 0.1]))
    arm = Cell(np.log(np.full(3, np.exp(largest.mean[0]))), np.full(3, largest.mean[1] - 0.1))
    found = saving_against(frontier_of([*dense[:-1], lucky]), arm, [arm])
    assert lucky.losses.min() < arm.mean[1]
    assert found.outside == "better" and found.share is None


def test_draws_outside_of_the_range_are_counted_and_open_the_interval():
    rng = np.random.default_rng(1)
    dense = [cell(flops, loss_at(flops), 3, 0.02, rng) for flops in BUDGETS]
    frontier = frontier_of(dense)
    lowest = float(frontier.curve.loss(np.array(frontier.log_costs[1]))[0])
    arm = Cell(np.log(np.full(3, 3 * REFERENCE)), lowest + 0.001 + np.array([-0.02, 0.0, 0.02]))
    found = saving_against(frontier, arm, [arm])
    assert 0.3 < found.share_outside < 0.7
    assert found.high == np.inf
    assert np.isfinite(found.low)


def test_one_seed_and_three_budgets_give_no_interval():
    dense, arm = planted(0.1, 1, 0.0, np.random.default_rng(0))
    found = saving_against(frontier_of(dense[:3]), arm, [arm])
    assert found.share == pytest.approx(0.1, abs=1e-3)
    assert found.interval == "one seed: no interval"
    assert found.low is found.high is None


def test_one_seed_a_budget_takes_the_residuals_of_the_fit():
    budgets = REFERENCE * 2.0 ** np.arange(-2, 5)
    covered = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        dense = [cell(flops, loss_at(flops), 1, 0.003, rng) for flops in budgets]
        arm = cell(REFERENCE, loss_at(1.25 * REFERENCE), 1, 0.003, rng)
        found = saving_against(frontier_of(dense), arm, [arm], num_draws=200)
        assert found.interval == "scatter from residuals of the fit, 4 degrees of freedom"
        covered.append(found.low <= 0.2 <= found.high)
    assert np.mean(covered) >= 0.8


def test_seeds_are_preferred_to_residuals_and_those_of_the_arm_count():
    dense, arm = planted(0.1, 1, 0.0, np.random.default_rng(0))
    several = Cell(np.log(np.full(4, REFERENCE)), 3.4 + np.array([-0.3, -0.1, 0.1, 0.3]))
    noise = estimate_noise(dense, [arm, several], frontier_of(dense).curve)
    assert (noise.source, noise.num_free) == ("seeds", 3)
    # The estimate of the variance is unbiased, so that of the deviations drawn is that of the seeds.
    assert np.mean(noise.deviations[:, 1] ** 2) == pytest.approx(np.var(several.losses, ddof=1))


def test_draws_are_the_same_each_time():
    dense, arm = planted(0.1, 3, 0.005, np.random.default_rng(0))
    assert saving_against(frontier_of(dense), arm, [arm]) == saving_against(frontier_of(dense), arm, [arm])


# --- the frontier of runs


def dense_runs(folder, **kwargs):
    write_dense(folder, **kwargs)
    return find_runs([folder], "val/loss")[0]


def test_fewer_than_three_budgets_give_no_frontier(tmp_path):
    # Budgets within 2 % are one.
    runs = dense_runs(tmp_path, budgets=(1, 1.015, 2))
    for cost in ("flops", "seconds"):
        frontier = fit_frontier(runs, cost)
        assert frontier.curve is None
        assert "needs completed dense runs at 3 budgets or more" in frontier.reason
        assert "Train 1 more" in frontier.reason
    assert "Found: 1.01 PFLOPs, 2 PFLOPs" in fit_frontier(runs, "flops").reason
    found = saving_against(frontier, frontier.cells[0], [])
    assert (found.share, found.reason) == (None, "no dense frontier")


def test_the_frontier_is_that_of_the_ends(tmp_path):
    frontier = fit_frontier(dense_runs(tmp_path, deviation=0.002), "flops")
    assert frontier.reason is None
    assert frontier.curve.exponent[0] == pytest.approx(0.3, abs=0.1)
    assert frontier.curve.loss(np.log(BUDGETS)) == pytest.approx(loss_at(BUDGETS), abs=0.005)
    assert frontier.log_costs == pytest.approx((np.log(BUDGETS[0]), np.log(BUDGETS[-1])))
    assert frontier.warnings == ()


def test_says_that_three_budgets_cannot_be_checked(tmp_path):
    (warning,) = fit_frontier(dense_runs(tmp_path, budgets=(1, 2, 4)), "flops").warnings
    assert "A fourth budget" in warning


def test_a_budget_off_the_curve_is_named(tmp_path):
    dense_runs(tmp_path, deviation=0.001)
    for number in range(3):
        flops = 2 * REFERENCE
        write_ledger(tmp_path / f"dense_seed{number}" / "version_2", flops, loss_at(flops) + 0.1)
    warnings = fit_frontier(find_runs([tmp_path], "val/loss")[0], "flops").warnings
    assert any("misses the dense runs of 2 PFLOPs by +" in warning for warning in warnings)


def test_losses_that_do_not_fall_give_no_frontier(tmp_path):
    for index in range(4):
        write_ledger(tmp_path / f"dense-s{index}", (index + 1) * REFERENCE, 3 + 0.1 * index)
    frontier = fit_frontier(find_runs([tmp_path], "val/loss")[0], "flops")
    assert frontier.curve is None
    assert "does not fall" in frontier.reason


def test_the_band_holds_the_curve_and_needs_seeds(tmp_path):
    frontier = fit_frontier(dense_runs(tmp_path / "a", deviation=0.005), "flops")
    log_costs = np.linspace(*frontier.log_costs, 9)
    low, high = frontier.band(log_costs)
    assert (low < frontier.curve.loss(log_costs)).all()
    assert (frontier.curve.loss(log_costs) < high).all()
    assert fit_frontier(dense_runs(tmp_path / "b", budgets=(1, 2, 4), num_seeds=1), "flops").band(log_costs) is None
