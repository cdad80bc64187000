"""Layer dropping on several processes is that of one, and an interrupted run is the uninterrupted one."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.methods.strategy_checks import check_unused_parameters
from lit_accel.strategies import ResizableModelParallelStrategy
from tests.distributed import dropping
from tests.distributed.launch import launch

IN_A_MEASUREMENT = dropping.MEASURED_AT + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything that needs processes and ends by itself, in as few of them as possible."""
    folder = tmp_path_factory.mktemp("dropping")
    launch(dropping.on_one_process, folder, devices=1)
    launch(dropping.on_two_processes, folder, devices=2)
    return folder


def notes(folder: Path, name: str) -> list[tuple[int, list[bool], list[float]]]:
    """Step, mask and keep probabilities of every step."""
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert [step for step, _, _ in lines] == list(range(dropping.STEPS))
    return lines


def difference(folder: Path, name: str, other: str) -> float:
    (state, sensitivities), (expected, others) = (torch.load(folder / f"{each}.pt") for each in (name, other))
    assert state.keys() == expected.keys()
    if sensitivities is not None:
        assert sensitivities == pytest.approx(others, rel=1e-5, abs=1e-6)
        assert len(set(sensitivities)) == dropping.NUM_BLOCKS
    return max((state[key].double() - expected[key].double()).abs().max().item() for key in state)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("pld-ddp", "pld-single"),
        ("pld-fsdp", "pld-single"),
        ("ablate-ddp", "ablate-single"),
        ("ablate-fsdp", "ablate-single"),
        ("taylor-ddp", "taylor-single"),
        ("taylor-fsdp", "taylor-single"),
        # Through a phase of half the size, with the callbacks in both orders.
        ("cycle-ddp", "cycle-single"),
        ("cycle-fsdp", "cycle-single"),
    ],
)
def test_two_processes_train_as_one(folder, name, other):
    """The runs themselves see that decisions and replicas are equal on all ranks, and gradients None if dropped."""
    assert difference(folder, name, other) < 1e-6
    mine, theirs = notes(folder, name), notes(folder, other)
    assert [(step, mask) for step, mask, _ in mine] == [(step, mask) for step, mask, _ in theirs]
    for (_, _, probabilities), (_, _, expected) in zip(mine, theirs, strict=True):
        assert probabilities == pytest.approx(expected, abs=1e-5)
    dropped = {tuple(mask) for _, mask, _ in mine if not all(mask)}
    assert len(dropped) > 3
    share_of_steps = sum(not all(mask) for _, mask, _ in mine) / (dropping.STEPS - 1)
    assert share_of_steps >= {"pld": 1.0, "cycle": 0.9, "ablate": 0.6, "taylor": 0.4}[name.partition("-")[0]]
    assert {len(mask) for _, mask, _ in mine} == ({6, 3} if "cycle" in name else {6})


@pytest.mark.processes
@pytest.mark.parametrize("other", ["pld-ddp-again", "pld-fsdp-again", "pld-fsdp-checkpointing", "pld-fsdp-compile"])
def test_a_repetition_is_bitwise_equal(folder, other):
    """Also where activations are computed once more, and where blocks are compiled without changing them."""
    assert difference(folder, other.rpartition("-")[0], other) == 0


@pytest.mark.processes
def test_a_dropped_block_is_neither_gathered_nor_reduced(folder):
    """Each block is gathered forward and backward and reduced once; what is outside of them, once."""
    counts, gradients = torch.load(folder / "collectives-fsdp.pt")
    assert counts == {"1111": (9, 5), "1011": (7, 4), "0110": (5, 3)}
    none, expected = torch.load(folder / "collectives-single.pt")
    assert set(none.values()) == {(0, 0)}
    for mask in dropping.MASKS:
        assert gradients[mask].keys() == expected[mask].keys()
        assert {name.split(".")[3] for name in gradients[mask] if ".h." in name} == {
            str(index) for index, bit in enumerate(mask) if bit == "1"
        }
        for name, gradient in gradients[mask].items():
            torch.testing.assert_close(gradient, expected[mask][name], rtol=0, atol=1e-6, msg=f"{mask} {name}")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("strategy", "about", "options", "step"),
    [
        # Those of step 1 happen to be the same.
        ("fsdp", "masks", {"gamma": 5.0, "check_ranks_every": 1}, 2),
        ("resizable_ddp", "masks", {"gamma": 5.0, "check_ranks_every": 1}, 2),
        # Found before the first step, and long before the masks differ.
        ("fsdp", "seeds", {"gamma": 1e-3}, 0),
    ],
)
def test_ranks_that_disagree_are_told_so_instead_of_waiting(tmp_path, strategy, about, options, step):
    launch(dropping.disagreeing, tmp_path, strategy, about, options, devices=2)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [step, step]


@pytest.mark.processes
@pytest.mark.parametrize("estimator", ["ablate", "taylor"])
def test_ranks_with_sequences_of_different_lengths_measure_at_the_same_steps(tmp_path, estimator):
    """Their prices differ: what one can afford just so, the other could not."""
    affordable = [dropping.num_affordable(estimator, length) for length in dropping.LENGTHS]
    launch(dropping.ragged, tmp_path, estimator, 2 / math.sqrt(math.prod(affordable)), devices=2)
    mine, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert mine == theirs
    assert mine
    assert any(not all(mask) for _, mask, _ in notes(tmp_path, "ragged"))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "strategy", "kills"),
    [
        ("pld", "resizable_ddp", [4, 11]),
        ("ablate", "single", [dropping.MEASURED_AT, IN_A_MEASUREMENT, IN_A_MEASUREMENT + 3]),
        ("taylor", "single", [IN_A_MEASUREMENT, IN_A_MEASUREMENT + 3]),
        ("ablate", "resizable_ddp", [IN_A_MEASUREMENT]),
        ("pld", "fsdp", [7]),
    ],
)
def test_killed_and_resumed(tmp_path, folder, name, strategy, kills):
    devices = 1 if strategy == "single" else 2
    for step, resume in zip([*kills, None], [False, *[True] * len(kills)], strict=True):
        exitcode = 0 if step is None else -signal.SIGKILL
        launch(dropping.killed, tmp_path, name, strategy, step, resume, devices=devices, exitcode=exitcode)
    whole = f"{name}-{strategy.removeprefix('resizable_')}"
    assert notes(tmp_path, name) == notes(folder, whole)
    (state, sensitivities), (expected, others) = (
        torch.load(f"{path}.pt") for path in (tmp_path / name, folder / whole)
    )
    assert sensitivities == others
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


# What needs no process


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_flat_buffers_are_refused(kind):
    trainer = SimpleNamespace(strategy=object.__new__(kind))
    with pytest.raises(MisconfigurationException, match=rf"{kind.__name__} keeps them in flat.*resizable_model_paral"):
        check_unused_parameters(trainer, "My method")


def test_sharding_by_fsdp2_is_not_refused():
    check_unused_parameters(SimpleNamespace(strategy=ResizableModelParallelStrategy()), "My method")
