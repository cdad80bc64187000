"""The runner may be killed at any time, and two of them never make the same run."""

import json
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from scripts.bench.__main__ import check_data
from scripts.bench.data import data_hash, data_of
from scripts.bench.jobs import jobs, row_key
from scripts.bench.log import append, read_log
from scripts.bench.study import ARMS, DENSE, GPT, RUNGS, SEEDS, TUNING_SEED
from scripts.bench.train import Job, run_job
from scripts.soaking.processes import start_ranks
from tests.bench import small_study

FIELDS = {"commit", "config", "data", "seed", "flops", "cpu_seconds", "wall_seconds", "val_loss", "reference_step"}


def start(folder: Path) -> BaseProcess:
    (process,) = start_ranks(small_study.work, (folder, 600), devices=1)
    return process


def rows_of(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(folder: Path, num_rows: int, processes: list[BaseProcess]) -> None:
    for _ in range(1200):
        if len(rows_of(folder)) >= num_rows:
            return
        assert any(process.is_alive() for process in processes), "the runners ended too early"
        time.sleep(0.1)
    pytest.fail(f"{len(rows_of(folder))} of {num_rows} runs after two minutes")


def test_a_killed_runner_is_taken_up_by_two_that_share_the_rest(tmp_path):
    first = start(tmp_path)
    wait_for(tmp_path, 1, [first])
    time.sleep(0.3)  # into the second run
    first.kill()
    first.join()
    before = rows_of(tmp_path)
    others = [start(tmp_path), start(tmp_path)]
    wait_for(tmp_path, len(before) + 4, others)
    for process in others:
        process.kill()
        process.join()
    after = rows_of(tmp_path)
    assert after[: len(before)] == before
    keys = [row_key(row) for row in after]
    assert len(set(keys)) == len(keys)
    assert all(set(row) >= FIELDS for row in after)
    assert {row["commit"] for row in after} == {"of a test"}


def test_a_run_that_is_made_anew_ends_bitwise_where_it_would_have():
    job = Job(small_study.SMALL, DENSE, "report", 1.0, 60, 4e-3, 0)
    one, other = run_job(job, "of a test"), run_job(job, "of a test")
    assert one["val_loss"] == other["val_loss"]
    assert one["flops"] == other["flops"] == one["dense_flops"]
    assert one["config"] == other["config"] == job.config_hash
    assert one["tokens"] == 60 * small_study.SMALL.tokens_per_step


def test_steps_that_evaluations_do_not_divide_are_refused_before_anything_runs():
    Job(GPT, DENSE, "report", 1.5, 1624, 4e-3, 0, curve=True)
    with pytest.raises(ValueError, match="1620 steps, which 8 evaluations do not divide"):
        Job(GPT, DENSE, "report", 1.5, 1620, 4e-3, 0, curve=True)


def test_other_data_than_those_of_the_log_are_refused_before_anything_runs():
    data = data_of(GPT, 0)
    data.prepare_data()
    data.setup("fit")
    check_data([{"rung": "gpt", "data": data_hash(data)}])
    with pytest.raises(SystemExit, match="standard library differs between versions of Python"):
        check_data([{"rung": "gpt", "data": "another"}])


def test_a_line_that_was_cut_off_is_made_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"rung": "gpt", "data": "x", "number": number} for number in range(3)]
    append(rows[0], path)
    append(rows[1], path)
    path.write_bytes(path.read_bytes()[:-7])
    assert read_log(path) == rows[:1]
    append(rows[2], path)
    assert read_log(path) == [rows[0], rows[2]]


def test_nothing_is_reported_before_it_was_tuned():
    first = list(jobs([]))
    assert {job.stage for job in first} == {"tune"}
    assert {job.seed for job in first} == {TUNING_SEED}


@pytest.mark.parametrize("rung", RUNGS.values(), ids=list(RUNGS))
def test_the_null_method_shares_no_seed_with_dense_training_or_with_the_trials(rung):
    seeds = {arm.role: set(arm.seeds) for arm in ARMS[rung.name] if arm.role == "null"}
    assert len(seeds["null"]) == 6
    assert not seeds["null"] & {*rung.dense_seeds, *SEEDS, TUNING_SEED}
    assert TUNING_SEED not in (*SEEDS, *rung.dense_seeds)


def test_an_arm_that_changes_is_another_configuration():
    job = Job(GPT, DENSE, "report", 1.0, 60, 4e-3, 0)
    assert job.config_hash == Job(GPT, DENSE, "report", 1.0, 60, 4e-3, 1).config_hash
    for other in (
        Job(GPT, DENSE, "report", 1.0, 61, 4e-3, 0),
        Job(GPT, DENSE, "report", 1.0, 60, 5e-3, 0),
        Job(small_study.SMALL, DENSE, "report", 1.0, 60, 4e-3, 0),
    ):
        assert other.config_hash != job.config_hash
