"""Three methods on two processes are what they are on one."""

from __future__ import annotations

import json

import pytest
import torch

from tests.composition import ranks
from tests.distributed.launch import launch

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(ranks.on_one_process, folder, devices=1)
    launch(ranks.on_two_processes, folder, devices=2)
    return folder


def notes(folder, name):
    """Tokens of a sequence that each block ran on, by micro-batch."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(folder):
    """The runs themselves see that both ranks have the same weights after every step, and ran the same."""
    (state, counts), (expected, expected_counts) = (torch.load(folder / f"{name}.pt") for name in ("two", "one"))
    assert state.keys() == expected.keys()
    for key in state.keys() - {"num_seen"}:
        assert (state[key].double() - expected[key].double()).abs().max() < 1e-6, key
    assert counts == expected_counts
    assert [phase["steps"] for phase in counts] == [3, 5, 6]
    assert sum(phase["flops"] for phase in counts) < 0.7 * sum(phase["dense_flops"] for phase in counts)


def test_the_same_blocks_ran_on_as_many_tokens(folder):
    two, one = notes(folder, "two"), notes(folder, "one")
    assert one[::2] == one[1::2] == two
    rows = dict(two)
    assert [len(rows[step]) for step in range(ranks.STEPS)] == [6] * 3 + [3] * 5 + [6] * 6
    assert sum(0 in row for row in rows.values()) >= 8
    assert len({max(set(row) - {0, 12}, default=12) for row in rows.values()}) >= 5
    assert all(set(rows[step]) == {12} for step in (12, 13))


def test_a_repetition_is_bitwise_equal_in_any_order(folder):
    (state, counts), (expected, expected_counts) = (torch.load(folder / f"{name}.pt") for name in ("again", "two"))
    assert counts == expected_counts
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
