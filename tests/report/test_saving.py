"""Savings at equal loss: planted ones are found, their intervals are honest, and nothing is extrapolated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_accel.report import saving as module
from lit_accel.report.curve import Curves, fit_curves
from lit_accel.report.frontier import Frontier, _check, _misfit, fit_frontier
from lit_accel.report.noise import Cell, Noise, Scatter, estimate_noise
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
    # Rounding may put the largest budget beyond itself; one in the middle of the range has a number.
    assert budget == 2 or found.reason is None
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


# --- what an interval and a p-value say of draws that are known

NUM_DRAWS = 201


@pytest.fixture
def judged(monkeypatch):
    """Returns a comparison whose draws are given: the saving of each, or NaN where it has no curve."""

    def judge(savings):
        dense, arm = planted(0.0, 1, 0.0, np.random.default_rng(0))
        log_cost, loss = arm.mean
        nothing, one = np.zeros(len(savings)), np.ones(len(savings))
        # The arm always ends the same; what dense training costs to end there is another in each draw.
        curves = Curves(nothing, np.where(np.isnan(savings), np.nan, loss), one, log_cost - np.log1p(-savings))
        noise = Noise(np.zeros((1, 2)), Scatter(0.0, 0.0, 0.0, 3), 3, "seeds")
        monkeypatch.setattr(module, "_draw_frontiers", lambda *_: (noise, one[:, None], curves))
        return saving_against(frontier_of(dense), arm, [arm])

    return judge


@pytest.mark.parametrize("num_below", [0, 1, 5, 6, 60, 100, 101, 150, 195, 196, 200, 201])
def test_the_interval_leaves_out_one_draw_of_forty_at_either_end(judged, num_below):
    savings = (np.arange(NUM_DRAWS) - num_below + 0.5) / 1000
    found = judged(np.random.default_rng(0).permutation(savings))
    # 2.5 % of 201 draws are five of them, and a little of the sixth.
    assert (found.low, found.median, found.high) == pytest.approx(tuple(savings[[5, 100, 195]]))
    assert found.p_value == pytest.approx(2 * min(num_below, NUM_DRAWS - num_below) / NUM_DRAWS)
    # One cannot say that an arm saves where the other says that it may not.
    assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
    assert found.share_outside == 0


@pytest.mark.parametrize(
    ("saving", "worst", "best"),
    # Dense training of twice the largest budget, of half the smallest, and no curve to read from.
    [(1 - 1.5 / 8, np.inf, np.inf), (1 - 1.5 / 0.25, -np.inf, -np.inf), (np.nan, -np.inf, np.inf)],
    ids=["better", "worse", "unknown"],
)
@pytest.mark.parametrize("num_outside", [5, 6])
def test_draws_without_a_number_are_the_worst_or_the_best(judged, saving, worst, best, num_outside):
    """Those of which nothing is known are both: left out, they would leave an interval of the lucky draws."""
    inside = (1 + np.arange(NUM_DRAWS - num_outside)) / 1000
    found = judged(np.append(inside, np.full(num_outside, saving)))
    at_worst, at_best = (np.sort(np.append(inside, np.full(num_outside, value))) for value in (worst, best))
    assert (found.low, found.median, found.high) == pytest.approx((at_worst[5], at_worst[100], at_best[195]))
    assert np.isinf([found.low, found.high]).any() == (num_outside == 6)
    assert found.share_outside == num_outside / NUM_DRAWS
    # All that have a number are above zero.
    assert found.p_value == pytest.approx(2 * num_outside * (worst < 0) / NUM_DRAWS)
    assert (found.p_value < 0.05) == (found.low > 0)


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


def test_the_band_holds_what_other_seeds_would_have_given_in_95_of_100_cases(tmp_path):
    frontier = fit_frontier(dense_runs(tmp_path, deviation=0.005), "flops")
    log_costs = np.linspace(*frontier.log_costs, 5)
    low, high = frontier.band(log_costs)
    noise, rng = estimate_noise(frontier.cells, (), frontier.curve), np.random.default_rng(1)
    others = frontier.fit(noise.draw(frontier.cells, noise.scales(2000, rng), rng))
    losses = np.stack([others.loss(log_cost) for log_cost in log_costs], axis=1)
    for outside in (losses < low, losses > high):
        assert outside.mean(axis=0) == pytest.approx(np.full(5, 0.025), abs=0.015)


def test_a_step_and_a_plateau_are_no_frontier(tmp_path):
    """A curve goes through them, and what it says of costs between the first two budgets is made up."""
    for index, loss in enumerate((4.0, 3.0, 3.0, 3.0)):
        write_ledger(tmp_path / f"dense-s{index}", 2**index * REFERENCE, loss)
    frontier = fit_frontier(find_runs([tmp_path], "val/loss")[0], "flops")
    assert frontier_of(frontier.cells).curve.exists[0]
    assert frontier.curve is None
    assert "does not fall steadily" in frontier.reason


def seeds(num, deviation, loss=3.0):
    """A budget whose losses scatter by a known deviation around their mean."""
    sides = np.resize([-1.0, 1.0], num)
    return Cell(np.zeros(num), loss + (deviation * np.sqrt((num - 1) / num) * sides if num > 1 else 0 * sides))


def test_each_run_counts_once_in_the_curve():
    """The curve through the means of budgets of one seed and of many is the one through all of the runs."""
    rng = np.random.default_rng(2)
    cells = [cell(flops, loss_at(flops), num, 0.05, rng) for flops, num in zip(BUDGETS, (1, 4, 1, 9), strict=True)]
    log_costs, losses = (np.concatenate([getattr(one, name) for one in cells]) for name in ("log_costs", "losses"))
    through_all = fit_curves(log_costs[None], losses[None], np.ones(len(losses)))
    assert frontier_of(cells).curve.loss(np.log(BUDGETS)) == pytest.approx(through_all.loss(np.log(BUDGETS)), abs=1e-5)


@pytest.mark.parametrize("num_seeds", [2, 4, 16])
def test_a_budget_may_miss_the_curve_by_three_standard_errors_of_its_mean(num_seeds):
    cells = [seeds(num_seeds, 0.1) for _ in range(5)]
    means = np.stack([one.mean for one in cells])
    error = 0.1 / np.sqrt(num_seeds)
    assert _check(cells, means, 2.9 * error * np.array([1, -1, 1, -1, 0]), "flops") == ()
    (warning,) = _check(cells, means, 3.1 * error * np.array([0, 0, -1, 0, 0]), "flops")
    assert f"by {-3.1 * error:+.4f}, more than seeds explain" in warning


def test_without_seeds_a_budget_may_miss_the_curve_by_a_fiftieth_of_the_losses():
    cells = [seeds(1, 0.0, loss) for loss in (5.0, 4.0, 3.5, 3.2, 3.0)]
    means = np.stack([one.mean for one in cells])
    assert _check(cells, means, np.full(5, 0.039), "flops") == ()
    (warning,) = _check(cells, means, np.array([0, 0, 0, 0.041, 0]), "flops")
    assert "by +0.0410, and there are no seeds to compare with" in warning


def test_what_a_curve_misses_budgets_by_is_what_the_seeds_leave_unexplained():
    """Of eight budgets with four seeds: three parameters took three, and the mean of four scatters by half."""
    cells = [seeds(4, 0.02) for _ in range(8)]
    error = 0.02 / 2
    # The scatter alone, with as many degrees of freedom as there are, leaves nothing.
    for residual in (0.5 * error, np.sqrt(5 / 8) * error):
        assert _misfit(cells, np.full(8, residual)) == pytest.approx(0, abs=1e-6)
    residuals = 2 * error * np.array([1, -1, 1, -1, 1, -1, 1, -1])
    assert _misfit(cells, residuals) == pytest.approx(error * np.sqrt((8 * 4 - 5) / 7))
