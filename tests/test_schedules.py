import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_accel.schedules import decay_factor, num_steps_of, warmup_decay_factor, warmup_factor

DECAYS = st.sampled_from(["linear", "cosine", "constant"])
DECAYS_TO_ZERO = st.sampled_from(["linear", "cosine"])


@st.composite
def runs(draw):
    num_total_steps = draw(st.integers(1, 10**7))
    return {"num_total_steps": num_total_steps, "num_warmup_steps": draw(st.integers(0, num_total_steps))}


@given(runs(), DECAYS, st.integers(0, 2 * 10**7))
def test_factor_lies_between_zero_and_one(run, decay, step):
    assert 0 <= warmup_decay_factor(step, decay=decay, **run) <= 1


@given(runs(), DECAYS)
def test_first_step_learns(run, decay):
    assert warmup_decay_factor(0, decay=decay, **run) == 1 / max(run["num_warmup_steps"], 1)


@given(runs(), DECAYS_TO_ZERO)
def test_last_step_learns_and_the_one_after_would_not(run, decay):
    num_total_steps = run["num_total_steps"]
    assert warmup_decay_factor(num_total_steps - 1, decay=decay, **run) > 0
    assert warmup_decay_factor(num_total_steps, decay=decay, **run) == 0
    assert warmup_decay_factor(num_total_steps + 1, decay=decay, **run) == 0


@given(runs(), DECAYS, st.data())
def test_factor_rises_to_one_and_then_only_falls(run, decay, data):
    num_total_steps, num_warmup_steps = run["num_total_steps"], run["num_warmup_steps"]
    step = data.draw(st.integers(0, num_total_steps - 1))
    here, next_ = (warmup_decay_factor(s, decay=decay, **run) for s in (step, step + 1))
    assert next_ >= here if step + 1 < num_warmup_steps else next_ <= here
    if num_warmup_steps:
        assert warmup_decay_factor(num_warmup_steps - 1, decay=decay, **run) == 1


@given(runs(), st.data())
def test_cosine_is_half_a_period(run, data):
    num_total_steps, num_warmup_steps = run["num_total_steps"], run["num_warmup_steps"]
    step = data.draw(st.integers(num_warmup_steps, num_total_steps))
    if step < num_total_steps:
        progress = (step - num_warmup_steps) / (num_total_steps - num_warmup_steps)
        textbook = (1 + math.cos(math.pi * progress)) / 2
        assert warmup_decay_factor(step, decay="cosine", **run) == pytest.approx(textbook, abs=1e-12)


@given(st.floats(0, 1), st.integers(0, 10**9))
def test_a_share_is_a_share_and_a_count_a_count(share, num_total_steps):
    assert num_steps_of(share, num_total_steps) == round(share * num_total_steps)
    assert num_steps_of(num_total_steps, 17) == num_total_steps


@pytest.mark.parametrize("duration", [-1, -0.1, 1.5, math.nan, math.inf, True, "10%"])
def test_impossible_durations_are_refused(duration):
    with pytest.raises(ValueError, match="duration"):
        num_steps_of(duration, 100)


def test_warmup_by_hand():
    assert [warmup_factor(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmup_factor(0, 0) == 1


def test_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="'exponential'"):
        decay_factor(0.5, "exponential")
