from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_accel.draws import generator

KEYS = st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4).map(tuple)


def draw(keys):
    return torch.rand(4, generator=generator(*keys)).tolist()


@given(KEYS, KEYS)
def test_a_stream_is_a_pure_function_of_its_keys(first, second):
    assert draw(first) == draw(first)
    assert (draw(first) == draw(second)) == (first == second)


def test_keys_with_the_same_digits_or_the_same_sum_are_others():
    """Which keys that are drawn at random hardly ever have."""
    keys = [(1, 23), (12, 3), (123,), (0, 1), (1, 0), (1,), (10,)]
    assert len({tuple(draw(each)) for each in keys}) == len(keys)


def test_global_randomness_is_untouched():
    state = torch.get_rng_state()
    draw((1, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_are_needed_and_are_integers():
    with pytest.raises(ValueError, match="at least one"):
        generator()
    with pytest.raises(TypeError):
        generator(0.5)  # type: ignore[arg-type]
