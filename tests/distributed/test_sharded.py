"""A sharded V-cycle is the one of a single device, on any number of processes, wherever it was interrupted."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.distributed import sharded
from tests.distributed.launch import launch

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything that needs processes, in as few of them as possible."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(sharded.on_one_process, folder, devices=1)
    launch(sharded.on_two_processes, folder, devices=2)
    launch(sharded.on_one_process_again, folder, devices=1)
    return folder


def difference(folder: Path, name: str, other: str) -> float:
    state, expected = (torch.load(folder / f"{each}.pt") for each in (name, other))
    assert state.keys() == expected.keys()
    return max((state[key].double() - expected[key].double()).abs().max().item() for key in state)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("one", "single"),
        # Another run, whose checkpoints are single files.
        ("file", "two"),
        ("file-to-file", "two"),
        # What is recomputed, and what is compiled without changing it, computes the same.
        ("checkpointing", "two"),
        ("compile", "two"),
    ],
)
def test_bitwise_equal(folder, name, other):
    assert difference(folder, name, other) == 0


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("two", "single"),
        # No moments carried over; accumulated and clipped gradients.
        ("two-reset", "single-reset"),
        # Resumed on another number of processes, or on a single device.
        ("one-to-two-4", "single"),
        ("one-to-two-6", "single"),
        ("two-to-one-4", "single"),
        ("two-to-one-6", "single"),
        ("file-to-single", "single"),
        # Checkpoints of the small phase, evaluated.
        ("validate-two", "validate-single"),
        ("validate-file", "validate-single"),
    ],
)
def test_equal_but_for_rounding(folder, name, other):
    assert difference(folder, name, other) < 1e-6


def test_mixed_precision_keeps_single_precision_weights(folder):
    state = torch.load(folder / "bf16.pt")
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
    assert 0 < difference(folder, "bf16", "single") < 0.1


def test_killed_and_resumed(folder):
    """Before and after each transition, and in the small phase."""
    resume = None
    for step in (sharded.SWITCHES[0], sharded.INSIDE_SMALL, sharded.SWITCHES[1]):
        launch(sharded.killed, folder, step, resume, devices=2, exitcode=-signal.SIGKILL)
        resume = f"killed/step={step}.ckpt"
    launch(sharded.killed, folder, None, resume, devices=2)
    assert difference(folder, "killed", "two") == 0
