"""What is said of the seconds of mixed sparsity holds in the file that they were written to (spec, invariant 24)."""

from __future__ import annotations

import json

import pytest

from scripts.measure_mixed_sparsity import RESULTS

RECORD = json.loads(RESULTS.read_text())
SETTINGS = sorted({(row["batch_size"], row["keeps_memory"]) for row in RECORD["steps"]})


@pytest.mark.parametrize("setting", SETTINGS)
def test_units_that_are_taken_out_save_seconds_and_masks_do_not(setting):
    """A speed-up that a masked control has too would be one of something else."""
    rows = {row["arm"]: row for row in RECORD["steps"] if (row["batch_size"], row["keeps_memory"]) == setting}
    compact, masked = rows["neurons and heads"], rows["the same neurons and heads, masked"]
    assert compact["flops_ratio"] == masked["flops_ratio"]
    assert compact["realised_share"] >= 0.9
    assert compact["time_ratio"] < 0.95 * masked["time_ratio"]
    assert min(masked["time_ratio"], rows["entries, masked"]["time_ratio"]) > 0.9
    assert rows["neurons and heads, window attention"]["time_ratio"] < 1 / 3


def test_whole_default_runs_take_less_than_half_the_time():
    assert {run["keeps_memory"] for run in RECORD["runs"]} == {False, True}
    assert all(run["time_ratio"] < 0.5 for run in RECORD["runs"])


def test_window_attention_is_faster_than_dense_from_512_tokens_on():
    windows = [row for row in RECORD["attention"] if row["pattern"] == "window" and row["num_tokens"] >= 512]
    assert {row["dtype"] for row in windows} == {"float32", "bfloat16"}
    assert all(row["speed"] > 1 for row in windows)
