"""The fit of the dense curve: it finds what was planted, at any scale, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_accel.report.curve import Curves, fit_curves

BUDGETS = np.array([0.25, 0.5, 1.0, 2.0, 4.0])


def fit(costs, losses):
    return fit_curves(np.log([costs]), np.array([losses]), np.ones(len(costs)))


@settings(deadline=None, max_examples=60)
@given(
    floor=st.floats(0, 4),
    excess=st.floats(0.1, 5),
    exponent=st.floats(0.05, 1.5),
    reference=st.floats(9, 24),
)
def test_finds_the_planted_curve_at_any_scale(floor, excess, exponent, reference):
    costs = BUDGETS * 10**reference
    curve = fit(costs, floor + excess * BUDGETS**-exponent)
    assert curve.exists[0]
    assert curve.exponent[0] == pytest.approx(exponent, rel=2e-3, abs=1e-4)
    assert curve.floor[0] == pytest.approx(floor, abs=5e-3 * excess / exponent)
    assert np.exp(curve.log_reference[0]) == pytest.approx(10**reference)
    assert curve.excess[0] == pytest.approx(excess, abs=5e-3 * excess / exponent)


@settings(deadline=None, max_examples=30)
@given(factor=st.floats(-9, 9), noise=st.integers(0, 1000))
def test_scaling_the_costs_scales_what_is_read_off(factor, noise):
    losses = 3 + BUDGETS**-0.4 + 0.01 * np.random.default_rng(noise).normal(size=5)
    one, other = fit(BUDGETS * 1e15, losses), fit(BUDGETS * 1e15 * 10**factor, losses)
    shift = other.log_cost(np.array([4.0])) - one.log_cost(np.array([4.0]))
    assert shift[0] == pytest.approx(factor * np.log(10), abs=1e-5)


def test_cost_is_the_inverse_of_loss():
    curve = Curves(np.array([2.0]), np.array([1.5]), np.array([0.3]), np.array([30.0]))
    log_costs = np.linspace(25, 35, 7)
    assert curve.log_cost(curve.loss(log_costs)) == pytest.approx(log_costs)
    assert np.isinf(curve.log_cost(np.array([2.0, 1.9]))).all()


def test_the_floor_is_not_below_zero():
    # A straight line in the logarithm of the cost, which a floor of minus infinity would fit best.
    curve = fit(BUDGETS, 3 - np.log(BUDGETS))
    assert curve.floor[0] == 0
    assert curve.exists[0]


def test_there_is_no_curve_through_rising_losses():
    assert not fit(BUDGETS, 3 + 0.1 * BUDGETS).exists[0]


def test_a_budget_counts_by_its_weight():
    costs, losses = np.log([BUDGETS]), np.array([[4.6, 4.0, 3.6, 3.1, 2.9]])
    heavy = fit_curves(costs, losses, np.array([1, 1, 1e6, 1, 1]))
    assert heavy.loss(np.log(1.0))[0] == pytest.approx(3.6, abs=1e-4)
    assert abs(fit_curves(costs, losses, np.ones(5)).loss(np.log(1.0))[0] - 3.6) > 1e-2


def test_rows_do_not_see_each_other():
    rng = np.random.default_rng(0)
    losses = 3 + BUDGETS**-0.4 + 0.02 * rng.normal(size=(50, 5))
    together = fit_curves(np.tile(np.log(BUDGETS), (50, 1)), losses, np.ones(5))
    alone = [fit(BUDGETS, row) for row in losses]
    assert together.exponent == pytest.approx(np.concatenate([curve.exponent for curve in alone]), rel=1e-4)
