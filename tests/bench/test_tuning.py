"""Learning rates are chosen by the same rule for all arms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.bench.jobs import Study, smaller
from scripts.bench.study import BERT, EXTENSIONS, GPT, GRID, RUNGS
from scripts.bench.tuning import best_rate, between, is_interior, next_trial


def losses_around(optimum: float, curvature: float = 0.05) -> dict[float, float]:
    return {rate: 2.0 + curvature * math.log2(rate / optimum) ** 2 for rate in GRID}


@given(st.floats(math.log2(GRID[0]) + 0.51, math.log2(GRID[-1]) - 0.51), st.floats(0.01, 1.0))
def test_the_optimum_of_a_parabola_is_found_between_the_trials(log_optimum, curvature):
    losses = losses_around(2**log_optimum, curvature)
    assert is_interior(losses)
    assert next_trial(losses) is None
    assert best_rate(losses) == pytest.approx(2**log_optimum, rel=0.006)  # three digits are written


@pytest.mark.parametrize("grid", [rung.grid for rung in RUNGS.values()], ids=list(RUNGS))
def test_all_of_a_rungs_grid_is_tried_before_anything_else(grid):
    tried: dict[float, float] = {}
    for rate in (*grid, *(2**more * grid[-1] for more in range(1, EXTENSIONS + 1))):
        assert next_trial(tried, grid=grid) == rate
        tried[rate] = 2.0 - rate
    assert next_trial(tried, grid=grid) is None


@pytest.mark.parametrize("optimum", [GRID[0] / 100, GRID[-1] * 100])
def test_a_grid_whose_best_lies_at_its_end_is_extended_so_far_and_no_further(optimum):
    losses = losses_around(optimum)
    for _ in range(EXTENSIONS):
        rate = next_trial(losses)
        assert rate not in losses
        losses[rate] = 2.0 + 0.05 * math.log2(rate / optimum) ** 2
    assert next_trial(losses) is None
    assert not is_interior(losses)
    assert best_rate(losses) == min(losses, key=lambda rate: abs(math.log(rate / optimum)))


@given(st.floats(1e-4, 1e-1), st.floats(-1, 1), st.floats(0.1, 10))
def test_rates_follow_a_power_law_through_both_tuned_budgets(rate, power, budget):
    rates = {at: rate * at**power for at in (0.5, 2.0)}
    assert between(rates, 0.5) == rates[0.5]
    assert between(rates, budget) == pytest.approx(rate * budget**power, rel=0.006)


@given(st.floats(1e-4, 1e-1), st.floats(-1, 1), st.floats(-1, 1), st.floats(0.1, 10))
def test_between_more_budgets_each_pair_has_a_law_of_its_own(rate, power, other, budget):
    def law(at):
        return rate * at ** (power if at < 1 else other)

    rates = {at: law(at) for at in (0.25, 1.0, 0.5, 4.0, 2.0)}
    assert between(rates, budget) == pytest.approx(law(budget), rel=0.006)
    assert all(between(rates, at) == rates[at] for at in rates)


@given(st.floats(math.log2(GRID[0]) + 0.51, math.log2(GRID[-1]) - 0.51), st.floats(0.01, 1.0))
def test_a_refined_tuning_has_two_trials_more_and_finds_the_same_optimum(log_optimum, curvature):
    losses = losses_around(2**log_optimum, curvature)
    while (rate := next_trial(losses, refined=True)) is not None:
        losses[rate] = 2.0 + curvature * math.log2(rate / 2**log_optimum) ** 2
    assert len(losses) == len(GRID) + 2
    assert best_rate(losses) == pytest.approx(2**log_optimum, rel=0.006)


def test_a_trial_that_diverged_is_a_neighbour_too():
    losses = losses_around(4e-3)
    losses[8e-3] = losses[16e-3] = math.inf
    assert next_trial(losses) is None
    assert best_rate(losses) == pytest.approx(4e-3 / 2**0.5, rel=0.006)


@given(st.floats(1e-4, 1e-1), st.floats(-3, 3))
def test_rates_of_smaller_models_follow_a_power_law_in_depth_down_to_the_tuned_one(dense, power):
    class Tuned(Study):
        def tuned(self, arm, budget):
            depth = arm.changes.get(self.rung.depth, 8)
            assert depth in (5, 8)
            return dense * (depth / 8) ** power

    bert, gpt = (Tuned(rung, []) for rung in (BERT, GPT))
    for depth in range(1, 9):
        rate = bert.learning_rate(smaller(BERT, depth), 1.0)
        assert rate == pytest.approx(dense * (max(depth, 5) / 8) ** power, rel=0.006)
        assert gpt.learning_rate(smaller(GPT, depth), 1.0) == gpt.learning_rate(smaller(GPT, 5), 1.0)
