"""A few attempts of the soak, one death of each kind among them; and that the soak finds what it is there to find."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lit_accel.methods.compatibility import MST, MULTI_LEVEL, PLD, RANDOM_LTD
from scripts.soak import dealt
from scripts.soaking.attempts import Soak
from scripts.soaking.cases import Case, cases
from scripts.soaking.comparing import PARTS, compare
from scripts.soaking.deaths import Death
from scripts.soaking.leftovers import check_checkpoint, count_temporary_files
from scripts.soaking.recording import is_bad, records_of
from scripts.soaking.training import CHECKPOINTS, FINAL, LOGS, WEIGHTS
from tests.distributed import launch  # noqa: F401  # the processes that it forks have done the imports

# Sizes change at 5 and 15, units from 16 on.
ONE = Case("gpt2", (MULTI_LEVEL, MST))
TWO = Case("deit", (PLD, RANDOM_LTD), "ddp")
PLANS = {
    "write, resize, update": (
        ONE,
        [
            Death("write", "bytes", step=4, share=0.6),
            Death("resize", "after rebuild", step=15),
            Death("update", "after", step=16),
        ],
    ),
    "between steps, validation, outside": (
        ONE,
        [
            Death("write", "before replace", step=6),
            Death("backward", step=9),
            Death("validation", step=10),
            Death("time", share=0.6),
        ],
    ),
    "one of two ranks": (TWO, [Death("step", step=5, rank=1, alone=True), Death("write", "after replace", step=9)]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Soak:
    """Where the uninterrupted runs are, once for all tests."""
    return Soak(tmp_path_factory.mktemp("soak"))


@pytest.mark.processes
@pytest.mark.parametrize("plan", PLANS)
def test_killed_and_resumed(place, tmp_path, plan):
    case, deaths = PLANS[plan]
    attempt = place.attempt(case, 0, tmp_path / "run", deaths)
    assert not attempt.broken
    assert attempt.comparison is not None
    assert attempt.comparison.differences == {part: [] for part in PARTS}
    # One from outside may come too late.
    assert len(attempt.fates) >= sum(death.kind != "time" for death in deaths)
    for fate in attempt.fates:
        assert not fate.lost
        assert not fate.hung
        assert fate.resumed_at is not None
        assert (fate.seconds_alone is not None) == fate.death.alone
    assert attempt.temporary_files == 0
    assert not any(map(is_bad, records_of(attempt, "test", 0)))


def copy_of(place: Soak, folder: Path) -> tuple[Path, Path]:
    """Return a run, to be tampered with, and what it is compared with."""
    reference = place.reference(ONE)
    shutil.copytree(reference, folder / "run")
    return folder / "run", reference


def found(run: Path, reference: Path, *resumed: int) -> dict[str, int]:
    """Return the parts that differ, and in how many places."""
    differences = compare(run, reference, resumed).differences
    return {part: len(places) for part, places in differences.items() if places}


@pytest.mark.processes
def test_a_run_is_equal_to_itself(place, tmp_path):
    assert found(*copy_of(place, tmp_path)) == {}


@pytest.mark.processes
def test_a_single_bit_is_found(place, tmp_path):
    run, reference = copy_of(place, tmp_path)
    weights = torch.load(run / WEIGHTS)
    weights["model.transformer.ln_f.weight"].view(torch.int32)[0] ^= 1
    torch.save(weights, run / WEIGHTS)
    assert found(run, reference) == {"weights": 1}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("part", "tamper"),
    [
        ("weights", lambda state: state["state_dict"].popitem()),
        ("optimizer", lambda state: state["optimizer_states"][0]["state"][0]["exp_avg"].add_(1e-12)),
        ("optimizer", lambda state: state["lr_schedulers"][0].update(last_epoch=23)),
        ("methods", lambda state: state["callbacks"]["MultiLevelTraining"].update(version=0)),
        ("ledger", lambda state: state["callbacks"]["ComputeLedger"]["phases"][0].update(flops=1)),
        ("data", lambda state: state["TextDataModule"].update(samples=-1)),
        ("progress", lambda state: state.update(global_step=23)),
    ],
)
def test_other_state_is_found(place, tmp_path, part, tamper):
    run, reference = copy_of(place, tmp_path)
    state = torch.load(run / FINAL)
    tamper(state)
    torch.save(state, run / FINAL)
    assert found(run, reference) == {part: 1}


@pytest.mark.processes
def test_a_log_that_lacks_or_changes_something_is_found(place, tmp_path):
    run, reference = copy_of(place, tmp_path)
    path = run / LOGS / "start_0" / "metrics.csv"
    header, *lines = path.read_text().splitlines(keepends=True)
    (late,) = (index for index, line in enumerate(lines) if is_loss_of(header, line, "4"))
    path.write_text("".join([header, *lines[:late], *lines[late + 1 :]]))
    assert found(run, reference)["metrics"] >= 1
    # Unless it went on from the checkpoint that was written just before.
    assert found(run, reference, 5) == {}
    path.write_text("".join([header, *lines[:late], lines[late].replace("5.", "6.", 1), *lines[late + 1 :]]))
    assert found(run, reference, 5) == {"metrics": 1}
    # A line that a process died in says nothing.
    path.write_text("".join([header, *lines, lines[late].replace("5.", "6.", 1).rstrip("\n")]))
    assert found(run, reference) == {}


def is_loss_of(header: str, line: str, step: str) -> bool:
    row = dict(zip(header.strip().split(","), line.strip().split(","), strict=True))
    return row["step"] == step and bool(row["train/loss"])


@pytest.mark.processes
def test_a_row_of_the_ledger_is_missed(place, tmp_path):
    run, reference = copy_of(place, tmp_path)
    path = run / LOGS / "start_0" / "compute_ledger.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert found(run, reference) == {"ledger": 1}


@pytest.mark.processes
def test_a_lost_checkpoint_is_found(place, tmp_path):
    run, _ = copy_of(place, tmp_path)
    last = run / CHECKPOINTS / "last.ckpt"
    assert check_checkpoint(run, 24) == []
    assert "of step 24, though that of 25" in check_checkpoint(run, 25)[0]
    last.write_bytes(last.read_bytes()[:-100])
    assert "cannot be read" in check_checkpoint(run, 24)[0]
    last.rename(last.with_name("last-v1.ckpt"))
    assert "no checkpoint of step 24" in check_checkpoint(run, 24)[0]
    assert count_temporary_files(run) == 1
    last.with_name("last-v1.ckpt").unlink()
    assert "no checkpoint of step 24" in check_checkpoint(run, 24)[0]
    assert check_checkpoint(run, None) == []


def test_every_case_has_its_turn():
    every = cases()
    assert len({case.name for case in every}) == len(every)
    first = [case for _, (_, case) in zip(range(len(every)), dealt(every, 3), strict=False)]
    assert sorted(case.name for case in first) == sorted(case.name for case in every)
    assert first != every
    assert [case for _, (_, case) in zip(range(len(every)), dealt(every, 3), strict=False)] == first
