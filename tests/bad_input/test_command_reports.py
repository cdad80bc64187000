"""Plans and reports that cannot be made."""

from __future__ import annotations

import pytest

from tests.bad_input.harness import run_command
from tests.bad_input.rows import wrong

LTD = "--trainer.callbacks+=lit_accel.RandomLTD"


ROWS = [
    wrong(
        "a plan of no sequences",
        "--num_sequences=0",
        "num_sequences is 0; it is a whole number, at least 1.",
        subcommand="plan",
    ),
    wrong(
        "a plan of negative tokens",
        "--num_tokens=-8",
        "num_tokens is -8; it is a whole number, at least 1.",
        subcommand="plan",
    ),
    wrong(
        "a plan of more tokens than positions",
        ("--num_sequences=2", "--num_tokens=99"),
        "num_tokens is 99, and this gpt2 model has positions for 16 tokens. Give",
        subcommand="plan",
    ),
    wrong(
        "a calibration that is neither",
        "--calibrate=perhaps",
        "calibrate is 'perhaps'; it must be true or false.",
        subcommand="plan",
        code=2,
    ),
    wrong(
        "a calibration without a value",
        "--calibrate",
        "--calibrate needs a value: --calibrate=VALUE.",
        subcommand="plan",
        code=2,
    ),
    wrong(
        "a picture of no known kind",
        "--picture=plan.pgn",
        "picture is 'plan.pgn'; it is a file called .png, .pdf, .svg, .jpg, or null",
        subcommand="plan",
    ),
    wrong(
        "a plan of a method that cannot be",
        (LTD, "--trainer.callbacks.start_tokens=100"),
        "start_tokens is 100, and sequences have no more than 8 tokens: nothing",
        subcommand="plan",
    ),
    wrong(
        "a report of nothing",
        (),
        "No run was given: give at least one folder of a run.",
        base=None,
        subcommand="report",
        code=2,
    ),
    wrong(
        "a report of what is not there",
        "runs/nope",
        "There is no runs/nope. Give a ledger, a run's folder or a folder above",
        base=None,
        subcommand="report",
    ),
    wrong(
        "a report of an empty folder",
        "runs",
        "There is no compute_ledger.csv in runs or below. Train with the",
        base=None,
        subcommand="report",
        files={"runs/readme.txt": ""},
    ),
    wrong(
        "a report of a file that is no ledger",
        "notes.csv",
        "notes.csv cannot be read as a compute ledger: notes.csv is no compute",
        base=None,
        subcommand="report",
        files={"notes.csv": "a,b\n1,2\n"},
    ),
    wrong(
        "a report of a picture",
        "runs",
        "runs/compute_ledger.csv cannot be read as a compute ledger: 'utf-8' codec",
        base=None,
        subcommand="report",
        files={"runs/compute_ledger.csv": b"\x89PNG\xff\xfe"},
    ),
    wrong(
        "a report of an empty ledger",
        "runs",
        "runs/compute_ledger.csv cannot be read as a compute ledger:",
        base=None,
        subcommand="report",
        files={"runs/compute_ledger.csv": ""},
    ),
    wrong(
        "a report with an unknown option",
        ("runs", "--metrik=val/loss"),
        "There is no argument metrik. Did you mean metric?",
        base=None,
        subcommand="report",
        code=2,
    ),
    wrong(
        "a report of a metric to be raised",
        ("runs", "--metric=val/accuracy"),
        "val/accuracy looks like a metric that is better when higher. Savings are",
        base=None,
        subcommand="report",
        files={"runs/x": ""},
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_before_training(row, tmp_path, monkeypatch, capsys, cache):
    run_command(row, tmp_path, cache, monkeypatch, capsys)
