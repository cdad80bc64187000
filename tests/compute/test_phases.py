"""Counts of several ranks are added up exactly, however long the run."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_accel import RandomLTD
from lit_accel.compute.phases import Amounts, Phase, Phases, sum_over_ranks
from lit_accel.methods.token_dropping.books import TokenCount

NUM_COUNTS = 3


class Ranks:
    """A strategy whose ranks reduce one after the other: the last of them sees the sum."""

    root_device = torch.device("cpu")

    def __init__(self, num_replicas=None):
        self.sent = []
        if num_replicas is not None:
            # As Lightning's ModelParallelStrategy has it: the size of the data-parallel mesh.
            self.distributed_sampler_kwargs = {"num_replicas": num_replicas, "rank": 0}

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


@settings(deadline=None)
@given(st.lists(st.tuples(*[counts] * NUM_COUNTS), min_size=1, max_size=3), st.integers(1, 4))
def test_what_ranks_count_that_share_their_data_counts_once(groups, num_sharing):
    """Groups of tensor parallelism; each of their ranks counts the batch that the group computes together."""
    strategy = Ranks(num_replicas=len(groups))
    for own in [own for own in groups for _ in range(num_sharing)]:
        summed = sum_over_ranks(list(own), strategy, len(groups) * num_sharing)
    assert summed == [sum(each) for each in zip(*groups, strict=True)]


def test_a_strategy_that_does_not_know_its_devices_yet_shares_nothing():
    assert sum_over_ranks([3], Ranks(num_replicas=0), 2) == [3]


def test_the_ledger_and_token_dropping_count_a_shared_batch_once():
    """Two ranks, one group: the strategy's sum has everything twice."""
    strategy = Ranks(num_replicas=1)
    strategy.reduce = lambda tensor, reduce_op: 2 * tensor
    phases = Phases()
    phases.list.append(Phase())
    phases.count(Amounts(tokens=96, flops=2**70 + 1))
    phases.collect(strategy, 2)
    assert (phases.total.tokens, phases.total.flops) == (96, 2**70 + 1)
    callback = RandomLTD(start_tokens=4)
    callback._books.uncollected = TokenCount(layer_tokens=50)
    callback._collect(SimpleNamespace(strategy=strategy, world_size=2))
    assert callback.total.layer_tokens == 50
