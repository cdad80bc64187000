"""Counts of several ranks are added up exactly, however long the run."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_accel.compute.phases import sum_over_ranks

NUM_COUNTS = 3


class Ranks:
    """A strategy whose ranks reduce one after the other: the last of them sees the sum."""

    root_device = torch.device("cpu")

    def __init__(self):
        self.sent = []

    def reduce(self, tensor, reduce_op):
        assert (tensor.dtype, reduce_op) == (torch.int64, "sum")
        self.sent.append(tensor)
        return torch.stack(self.sent).sum(dim=0)


# FLOPs of the longest runs are below 2^90; those that one rank takes back from another are negative.
counts = st.one_of(st.integers(0, 2**90), st.integers(-(2**90), 0), st.integers(0, 92).map(lambda bit: 2**bit - 1))


@settings(deadline=None)
@given(st.lists(st.tuples(*[counts] * NUM_COUNTS), min_size=2, max_size=4))
def test_sums_over_ranks_are_exact(ranks):
    strategy = Ranks()
    for own in ranks:
        summed = sum_over_ranks(list(own), strategy, len(ranks))
    assert summed == [sum(each) for each in zip(*ranks, strict=True)]


@settings(deadline=None)
@given(counts)
def test_every_bit_of_a_count_arrives(count):
    alone, doubled = Ranks(), Ranks()
    assert sum_over_ranks([count], alone, 2) == [count]
    assert [sum_over_ranks([count], doubled, 2) for _ in range(2)] == [[count], [2 * count]]
    # A single process asks nobody.
    assert sum_over_ranks([count], None, 1) == [count]
