"""Killed in every phase and at every switch, on one process and on two: the result is the uninterrupted one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.distributed import cycle
from tests.distributed.launch import launch
from tests.distributed.schedule import PHASES, STEPS, SWITCHES

# Each switch exactly, and the inside of each phase.
KILLS = sorted({*SWITCHES, 1, 4, 8, 11, STEPS - 2})


def run(folder: Path, devices: int, kill_at: int | None = None) -> None:
    """Run the cycle, one process a rank, and see that each ended as it should."""
    folder.mkdir(exist_ok=True)
    launch(cycle.main, folder, devices, kill_at, devices=devices, exitcode=0 if kill_at is None else -signal.SIGKILL)


@pytest.mark.processes
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_anywhere_and_resumed(tmp_path, devices):
    """One run is killed again and again until it is through; each resume must be exact for the end to be.

    The runs themselves see that replicas are equal after every step.
    """
    run(tmp_path / "whole", devices)
    for step in KILLS:
        run(tmp_path / "killed", devices, kill_at=step)
    run(tmp_path / "killed", devices)
    whole, killed = (torch.load(tmp_path / name / "final.pt") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for key, value in whole.items():
        assert torch.equal(killed[key], value), key


def test_kills_are_in_every_phase():
    starts = [0, *SWITCHES]
    ends = [*SWITCHES, STEPS]
    assert len(starts) == len(PHASES)
    for start, end in zip(starts, ends, strict=True):
        assert any(start < step < end for step in KILLS)
        assert start == 0 or start in KILLS
