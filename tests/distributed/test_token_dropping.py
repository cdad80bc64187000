"""Token dropping on several processes: as many tokens on each rank, others of them, and the same weights."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import tokens
from tests.distributed.launch import launch

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything that needs processes and ends by itself, in as few of them as possible."""
    folder = tmp_path_factory.mktemp("tokens")
    launch(tokens.on_one_process, folder, devices=1)
    launch(tokens.on_two_processes, folder, devices=2)
    return folder


def notes(folder: Path, name: str) -> list[list[Any]]:
    """Step, learning rate, kept tokens by rank and block, and which ones, of every step."""
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert [line[0] for line in lines] == list(range(tokens.STEPS))
    return lines


def difference(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert expected.keys() <= state.keys()
    return max((state[name].double() - value.double()).abs().max().item() for name, value in expected.items())


def of_blocks(num_kept: int, num_tokens: int) -> list[int]:
    return [num_tokens, *[num_kept] * (tokens.NUM_BLOCKS - 2), num_tokens]


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp", "ragged"])
def test_each_rank_keeps_what_is_due_and_follows_the_same_rate(folder, name):
    """The runs themselves see that the sets differ, weights do not, and counts and gradients are complete."""
    lengths = tokens.LENGTHS if name == "ragged" else (tokens.NUM_TOKENS,) * (1 if name == "single" else 2)
    for step, rate, by_rank, _ in notes(folder, name):
        assert by_rank == [of_blocks(tokens.kept(step, length), length) for length in lengths]
        assert rate == pytest.approx(1e-2 * tokens.rate(step), rel=1e-12)
    assert len({tokens.kept(step) for step in range(tokens.STEPS)}) >= 5
    _, total, _ = torch.load(folder / f"{name}.pt", weights_only=False)
    of_one = tokens.STEPS * tokens.GLOBAL_BATCH
    assert total.tokens == of_one * sum(lengths) // len(lengths)
    assert total.dense_layer_tokens == total.tokens * tokens.NUM_BLOCKS
    assert total.layer_tokens < total.dense_layer_tokens


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_train_as_a_plain_loop_over_both_parts(folder, name):
    state, _, _ = torch.load(folder / f"{name}.pt", weights_only=False)
    assert difference(state, torch.load(folder / "by-hand.pt")) < 1e-6


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("how", ["reentrant", "not-reentrant"])
def test_checkpointing_changes_nothing_but_the_cost(folder, strategy, how):
    (state, total, flops), (expected, expected_total, less) = (
        torch.load(folder / f"{name}.pt", weights_only=False) for name in (f"{strategy}-{how}", strategy)
    )
    assert difference(state, expected) == 0
    assert total == expected_total
    assert notes(folder, f"{strategy}-{how}") == notes(folder, strategy)
    # One more forward pass of the blocks, where there were three, and of nothing else.
    assert less < flops < less * 4 / 3


# In mid-epoch, at the first step of an epoch, and when nothing is dropped any more.
@pytest.mark.parametrize(("strategy", "kills"), [("ddp", [8]), ("single", [3, 6, 12])])
def test_killed_and_resumed(tmp_path, folder, strategy, kills):
    devices = 1 if strategy == "single" else 2
    for step, resume in zip([*kills, None], [False, *[True] * len(kills)], strict=True):
        exitcode = 0 if step is None else -signal.SIGKILL
        launch(tokens.killed, tmp_path, strategy, step, resume, devices=devices, exitcode=exitcode)
    assert notes(tmp_path, "killed") == notes(folder, strategy)
    (state, *counts), (expected, *expected_counts) = (
        torch.load(path, weights_only=False) for path in (tmp_path / "killed.pt", folder / f"{strategy}.pt")
    )
    assert counts == expected_counts
    assert difference(state, expected) == 0
