"""An update of a topology: exact numbers, the least dropped, the best and some drawn ones grown."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_accel.draws import generator
from lit_accel.methods.mixed_sparsity import Change, highest, planned_change, updated

SHARES = st.fractions(0, 1, max_denominator=20)


@st.composite
def numbers(draw, max_units=30):
    """Units of a group, how many are on before and afterwards, and the share that is replaced."""
    num_units = draw(st.integers(1, max_units))
    before, after = (draw(st.integers(0, num_units)) for _ in range(2))
    return num_units, before, after, float(draw(SHARES))


@st.composite
def updates(draw):
    """All that an update goes by; scores of few values, so that many are equal."""
    num_units, before, after, fraction = draw(numbers())
    shape = draw(st.integers(1, 4)), num_units
    random = generator(draw(st.integers(0, 10_000)))
    mask = torch.rand(shape, generator=random).argsort(1) < before
    magnitude, gradient = (torch.randint(0, draw(st.sampled_from([3, 100])), shape, generator=random) for _ in range(2))
    change = planned_change(num_units, before, after, fraction)
    return mask, change, magnitude.float(), gradient.float(), float(draw(SHARES))


def best(scores, candidates, count):
    """The reference: a stable sort by falling score, of one group."""
    return set(sorted(sorted(candidates), key=lambda unit: -scores[unit])[:count])


def sets(mask):
    return [set(row.nonzero().flatten().tolist()) for row in mask]


def grown_by_gradient(num_grown, share):
    return math.floor(Fraction(share).limit_denominator(20) * num_grown)


# How many


@given(numbers())
def test_what_is_dropped_and_grown_adds_up_exactly(case):
    num_units, before, after, fraction = case
    change = planned_change(*case)
    assert change.num_active == after == before - change.num_dropped + change.num_grown
    assert 0 <= change.num_dropped <= before
    # What grows was off before: what was just dropped is not among it.
    assert 0 <= change.num_grown <= num_units - before
    if before == after:
        assert change.num_dropped == change.num_grown


@given(numbers())
def test_the_share_is_replaced_where_enough_units_are_off(case):
    num_units, before, after, fraction = case
    share = math.floor(Fraction(fraction).limit_denominator(20) * before)
    # As many as are removed for good; besides, as many as there are to take their place.
    least, most = max(before - after, 0), max(before - after, num_units - after)
    assert planned_change(*case).num_dropped == min(max(share, least), most)


def test_numbers_by_hand():
    assert planned_change(100, 20, 20, 0.3) == Change(20, 6, 6)
    # A jump that is larger than the share drops and grows nothing besides; a smaller one is part of the share.
    assert planned_change(100, 100, 70, 0.3) == Change(70, 30, 0)
    assert planned_change(100, 60, 50, 0.3) == Change(50, 18, 8)
    # Restoration.
    assert planned_change(100, 10, 40, 0.0) == Change(40, 0, 30)
    # Of ten units one is off, and one at most is replaced.
    assert planned_change(10, 9, 9, 0.5) == Change(9, 1, 1)
    assert planned_change(10, 10, 10, 0.5) == Change(10, 0, 0)
    # Where a product is a whole number but for its last bit, it is that number.
    assert planned_change(100, 10, 10, 0.7 - 0.4) == Change(10, 3, 3)


# Which


@given(updates(), st.data())
def test_the_highest_are_those_of_a_stable_sort(case, data):
    mask, _, scores, _, _ = case
    count = data.draw(st.integers(0, int(mask.sum(1).min())))
    chosen = highest(scores, count, mask)
    expected = [best(row.tolist(), units, count) for row, units in zip(scores, sets(mask), strict=True)]
    assert sets(chosen) == expected


@given(updates())
def test_an_update_against_its_definition(case):
    mask, change, magnitude, gradient, share = case
    old_magnitude, old_gradient, old_mask = magnitude.clone(), gradient.clone(), mask.clone()
    after = updated(mask, change, magnitude, gradient, share, generator(1))
    assert after.dtype == torch.bool and after.shape == mask.shape
    assert (after.sum(1) == change.num_active).all()
    for group, (old, new) in enumerate(zip(sets(mask), sets(after), strict=True)):
        kept, dropped, grown = old & new, old - new, new - old
        assert len(dropped) == change.num_dropped and len(grown) == change.num_grown
        assert kept == best(magnitude[group].tolist(), old, len(kept))
        off = set(range(mask.shape[1])) - old
        assert best(gradient[group].tolist(), off, grown_by_gradient(change.num_grown, share)) <= grown <= off
        if not change.num_dropped:
            assert old <= new
    assert torch.equal(magnitude, old_magnitude) and torch.equal(gradient, old_gradient) and torch.equal(mask, old_mask)


@given(updates())
def test_without_gradients_all_that_grow_are_drawn(case):
    mask, change, magnitude, gradient, share = case
    drawn = updated(mask, change, magnitude, None, share, generator(1))
    assert torch.equal(drawn, updated(mask, change, magnitude, gradient, 0.0, generator(1)))
    assert (drawn.sum(1) == change.num_active).all()


@given(updates())
def test_draws_are_those_of_the_generator_and_no_other(case):
    state = torch.get_rng_state()
    first, again = (updated(*case, generator(2)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_three_of_four_by_gradient_and_one_of_the_others_by_chance():
    num_units, num_draws = 12, 4_000
    mask = torch.zeros(num_draws, num_units, dtype=torch.bool)
    mask[:, :2] = True
    gradient = torch.arange(num_units, 0.0, -1).repeat(num_draws, 1)
    change = planned_change(num_units, 2, 8, 0.0)
    grown = updated(mask, change, torch.zeros_like(gradient), gradient, 0.75, generator(3)) & ~mask
    # Four of six are the best of those that are off, 2 to 5; two are drawn among the other six.
    assert grown[:, 2:6].all()
    counts, share = grown[:, 6:].sum(0).double(), 2 / 6
    assert ((counts - num_draws * share).abs() < 5 * (num_draws * share * (1 - share)) ** 0.5).all()
    pair, both = (grown[:, 6] & grown[:, 7]).sum(), 1 / 15
    assert abs(pair - num_draws * both) < 5 * (num_draws * both * (1 - both)) ** 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_step_that_overflowed_teaches_nothing(bad, share):
    """Scores that are not finite count as zero: the least there is."""
    mask = torch.tensor([[True, True, True, True, False, False, False, False]])
    magnitude = torch.tensor([[1.0, bad, 2.0, bad, 9.0, 9.0, 9.0, 9.0]])
    gradient = torch.tensor([[9.0, 9.0, 9.0, 9.0, bad, 3.0, bad, 4.0]])
    after = updated(mask, planned_change(8, 4, 4, 0.5), magnitude, gradient, share, generator(4))
    assert after.sum() == 4
    assert sets(after & mask) == [{0, 2}]
    by_gradient = {0.0: set(), 0.5: {7}, 1.0: {5, 7}}[share]
    assert by_gradient <= sets(after)[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_counts_are_exact_where_every_score_is_bad(bad):
    mask = torch.tensor([[True, True, False, False, False, True]]).expand(3, -1)
    scores = torch.full((3, 6), bad)
    after = updated(mask, planned_change(6, 3, 4, 0.5), scores, scores, 0.75, generator(5))
    assert (after.sum(1) == 4).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_of_any_precision(dtype):
    mask = torch.tensor([[True, True, False, False]])
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=dtype)
    after = updated(mask, planned_change(4, 2, 2, 0.5), scores, scores, 1.0, generator(6))
    assert sets(after) == [{1, 3}]


@pytest.mark.parametrize("value", [float("nan"), 0.0, float("inf")])
def test_gradients_that_say_nothing_choose_nothing(value):
    """Not the first units: after an overflow they are no better than others."""
    mask = torch.zeros(1, 400, dtype=torch.bool)
    mask[0, :40] = True
    draws = torch.Generator().manual_seed(0)
    change = Change(num_active=60, num_dropped=0, num_grown=20)
    new = updated(mask, change, torch.ones(1, 400), torch.full((1, 400), value), 1.0, draws)
    grown = (new & ~mask)[0].nonzero().flatten()
    assert len(grown) == 20
    assert grown.max() > 200
