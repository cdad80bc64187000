"""The command line, over planted ledgers and over runs of Lightning."""

from __future__ import annotations

import os
import re

import matplotlib.image
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_accel.compute import ComputeLedger
from lit_accel.compute.table import FILE_NAME
from lit_accel.report import command
from lit_accel.report.runs import find_runs
from tests.report.planted import write_arm, write_dense, write_ledger
from tests.training import TinyModule, loader, make_trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    write_dense(folder, deviation=0.003)
    write_arm(folder, "[bold]method", 1.6, 0.2, deviation=0.003, sizes=(1000, 400, 1000))
    write_arm(folder, "bad", 0.3, 0.0)
    return folder


def test_prints_and_writes(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert command([str(runs), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    words = " ".join(printed.split())
    for expected in (
        "Taken as dense: dense (12 runs)",
        "Dense frontier in FLOPs: val/loss = ",
        "Dense frontier in seconds: val/loss = ",
        "FLOPs saved",
        "time saved",
        "counted: measured: realised",
        "Phases of [bold]method",
        "otherwise idle machine",
        "report.html",
    ):
        assert expected in words
    # A label is text, whatever brackets are in it.
    assert sum(line.startswith(" [bold]method ") for line in printed.splitlines()) == 2
    assert "worse" in printed
    assert re.search(r"\b(19|20|21)\.\d%", printed)
    assert (tmp_path / "out" / "report.html").stat().st_size > 1e6
    assert matplotlib.image.imread(tmp_path / "out" / "report.png").std() > 0.05


def test_the_current_folder_is_the_default(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command([str(runs / "dense_seed0")]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "report.png"}
    assert "Every run was taken as dense" in capsys.readouterr().out


def test_costs_over_a_decade_are_drawn_too(tmp_path):
    write_dense(tmp_path, budgets=(0.1, 1, 10, 100))
    assert command([str(tmp_path), "--output", str(tmp_path)]) == 0


def test_dense_arms_can_be_named(runs, tmp_path, capsys):
    write_ledger(tmp_path / "no-op" / "version_0", 1e15, 3.5)
    given = [str(runs), f"nothing={tmp_path / 'no-op'}", "--output", str(tmp_path)]
    assert command(given) == 0
    assert "Taken as dense: dense, nothing" in capsys.readouterr().out
    # Before the runs, too: the option takes one label.
    for named in ([*given, "--dense", "dense"], ["--dense", "dense", *given]):
        assert command(named) == 0
        assert "Taken as dense: dense (12 runs)" in capsys.readouterr().out
    assert command([*given, "--dense", "dense", "--dense", "nothing"]) == 0
    assert "Taken as dense: dense, nothing" in capsys.readouterr().out


def test_a_first_loss_that_is_not_finite_is_drawn_around(tmp_path):
    write_dense(tmp_path)
    path = write_arm_with_first(tmp_path, "inf")
    assert command([str(tmp_path), "--output", str(tmp_path)]) == 0
    assert path.exists()


def write_arm_with_first(folder, loss):
    path = write_ledger(folder / "method" / "version_0", 1e15, 3.5) / FILE_NAME
    heading, first, *table = path.read_text().splitlines()
    path.write_text("\n".join([heading, first.rsplit(",", 1)[0] + f",{loss}", *table]) + "\n")
    return path


def test_the_output_is_a_folder(runs, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert command([str(runs), "--output", str(tmp_path / "taken")]) == 1
    assert "taken cannot be a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "There is no nowhere"),
        (["."], "Train with the ComputeLedger callback"),
        (["{runs}", "--metric", "val/acc"], "better when higher"),
        (["{runs}", "--metric", "val/other"], "have: val/loss"),
        (["{runs}", "--dense", "plain"], "no arm plain"),
        ([], "No run was given"),
        (["{runs}", "--colour", "red"], "colour"),
    ],
)
def test_errors_are_one_line_and_a_status(runs, tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    is_unreadable = message in ("No run was given", "colour")
    assert command([arg.format(runs=runs) for arg in args]) == (2 if is_unreadable else 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lit-accel report: ")
    assert message in err
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_reads_the_folders_of_lightnings_loggers(tmp_path, capsys, logger):
    for steps in (2, 4, 6):
        trainer = make_trainer(
            tmp_path,
            callbacks=[ComputeLedger(print_table=False)],
            logger=logger(tmp_path, name="tiny_seed1"),
            max_steps=steps,
            val_check_interval=2,
            limit_val_batches=1,
        )
        trainer.fit(TinyModule(), loader(), loader(num_samples=8))
    found, left_out = find_runs([tmp_path], "val/loss")
    assert [(run.label, run.steps, run.is_measured_at_its_end) for run in found] == [
        ("tiny", 2, True),
        ("tiny", 4, True),
        ("tiny", 6, True),
    ]
    assert left_out == []
    assert command([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "Taken as dense: tiny (3 runs)" in capsys.readouterr().out
