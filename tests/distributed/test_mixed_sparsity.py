"""Mixed sparsity on several processes: the same units on each rank, the same weights, and nothing lost when killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_accel.compute.phases import AMOUNTS
from tests.distributed import sparsity
from tests.distributed.launch import launch

pytestmark = pytest.mark.processes

KINDS = pytest.mark.parametrize("kind", list(sparsity.KINDS))
# In each phase: before a step, within an update after its backward pass, and within one that has chosen its units
# already; at the first step of a stage and in its midst.
KILLS: list[tuple[int, str | None]] = [
    (1, None),
    (3, None),
    (6, "on_before_optimizer_step"),
    (9, None),
    (10, "on_after_backward"),
    (15, None),
    (16, "on_before_optimizer_step"),
    (19, "on_after_backward"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything that needs processes and ends by itself, in as few of them as possible."""
    folder = tmp_path_factory.mktemp("sparsity")
    launch(sparsity.on_one_process, folder, devices=1)
    launch(sparsity.on_two_processes, folder, devices=2)
    return folder


@pytest.fixture(scope="module", params=["single", "ddp"])
def killed(request, tmp_path_factory, folder) -> tuple[Path, Path]:
    """What a run that was killed again and again has left, and what one that was not."""
    mine, strategy = tmp_path_factory.mktemp("killed"), request.param
    devices = 1 if strategy == "single" else 2
    for index, kill in enumerate([*KILLS, None]):
        exitcode = 0 if kill is None else -signal.SIGKILL
        launch(sparsity.killed, mine, strategy, kill, index > 0, devices=devices, exitcode=exitcode)
    return mine / "killed", folder / f"{strategy}-all"


def notes(path: Path) -> list[list[Any]]:
    """What was seen after each step; see :class:`tests.distributed.sparsity.Watch`."""
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [line[0] for line in lines] == list(range(sparsity.STEPS))
    return lines


def choices(path: Path) -> list[list[Any]]:
    """Which units were on after each step, and how much the model held."""
    return [line[:5] for line in notes(path)]


def end(path: Path) -> dict[str, Any]:
    return torch.load(path.with_suffix(".pt"), weights_only=False)


def difference(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert expected.keys() == state.keys()
    return max((state[name].double() - value.double()).abs().max().item() for name, value in expected.items())


def totals(phases: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(phase[name] for phase in phases) for name in ("steps", *AMOUNTS)}


def same(state: Any, expected: Any) -> bool:
    """Whether two states are equal, tensors bit by bit."""
    if isinstance(expected, dict):
        return state.keys() == expected.keys() and all(same(state[key], value) for key, value in expected.items())
    if isinstance(expected, torch.Tensor):
        return torch.equal(state, expected)
    return state == expected


def require_equal_bits(path: Path, expected: Path) -> None:
    """The same units, weights and optimizer state after each step, and the same end."""
    assert notes(path) == notes(expected)
    mine, other = end(path), end(expected)
    assert difference(mine["weights"], other["weights"]) == 0
    for what in ("weights", "optimizer", "method"):
        assert same(mine[what], other[what]), what


@KINDS
def test_the_runs_go_through_all_phases(folder, kind):
    """The runs themselves see that ranks agree and that as many units are on as should be, after every step."""
    lines = notes(folder / f"ddp-{kind}")
    digests = [line[1] for line in lines]
    # With as many units as before, other ones: topology moves while sparsity is at its highest.
    assert len(set(digests[6:14])) >= 3
    assert len({digests[step] for step in (0, 2, 4, 6, 14, 16)}) == 6
    assert digests[0] == digests[1] == digests[18] == digests[19]
    # Only every second step.
    assert all(digests[step] == digests[step + 1] for step in range(0, sparsity.STEPS, 2))
    held = [line[4] for line in lines]
    assert held[0] == held[-1] == max(held)
    # Entries stay where they are; all other units are taken out.
    assert (min(held) < max(held)) is (kind != "elements")


@KINDS
def test_two_ranks_train_as_one_process_on_both_parts(folder, kind):
    assert choices(folder / f"ddp-{kind}") == choices(folder / f"single-{kind}")
    two, one = end(folder / f"ddp-{kind}"), end(folder / f"single-{kind}")
    # Both train, and each rank on its own part: it counts its batches.
    seen = "num_seen"
    assert two["weights"].pop(seen) == one["weights"].pop(seen) == sparsity.STEPS
    assert 0 < difference(two["weights"], one["weights"]) < 1e-6
    assert two["phases"] == one["phases"]


@KINDS
def test_a_repetition_is_the_same_to_the_bit(folder, kind):
    require_equal_bits(folder / f"again-{kind}", folder / f"ddp-{kind}")
    assert end(folder / f"again-{kind}")["phases"] == end(folder / f"ddp-{kind}")["phases"]


@pytest.mark.parametrize("option", [*sparsity.OPTIONS, "validated"])
def test_options_of_ddp_change_nothing(folder, option):
    require_equal_bits(folder / f"{option}-neurons", folder / "ddp-neurons")


def test_accumulated_gradients(folder):
    """An update falls on one optimizer step, whose batches all have the whole model's gradients."""
    assert choices(folder / "ddp-accumulated") == choices(folder / "single-accumulated")
    two, one = (end(folder / f"{name}-accumulated") for name in ("ddp", "single"))
    assert two["weights"]["num_seen"] == one["weights"]["num_seen"] == 2 * sparsity.STEPS
    assert 0 < difference(two["weights"], one["weights"]) < 1e-6
    assert two["phases"] == one["phases"]
    require_equal_bits(folder / "views-accumulated", folder / "ddp-accumulated")


def test_ranks_that_disagree_are_stopped(tmp_path):
    """All of them, before the first step or within the update, by an error and not by waiting for each other."""
    launch(sparsity.on_two_processes_that_disagree, tmp_path, devices=2)


@pytest.mark.parametrize("step", [9, 17], ids=["in the midst", "before all come back"])
def test_ranks_that_resume_with_other_units_are_stopped(tmp_path, step):
    """At once: the gradients of different units would be averaged, and where all come back nobody would ever know."""
    launch(sparsity.on_two_processes_with_checkpoints_of_their_own, tmp_path, step, devices=2)


def test_killed_and_resumed(killed):
    path, expected = killed
    require_equal_bits(path, expected)
    assert totals(end(path)["phases"]) == totals(end(expected)["phases"])


def test_the_ledger_of_a_resumed_run_has_the_phases_of_an_uninterrupted_one(killed):
    path, expected = killed
    assert end(path)["phases"] == end(expected)["phases"]
