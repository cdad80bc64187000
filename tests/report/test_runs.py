"""Which runs are found, what they are called, and which are taken as dense."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_accel.compute.table import FILE_NAME
from lit_accel.report.arms import by_budget, group
from lit_accel.report.runs import ReportError, default_label, find_runs
from tests.report.planted import write_arm, write_dense, write_ledger

LOSS = "val/loss"


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("runs/dense/version_0", "dense"),
        ("runs/dense_seed3/version_12", "dense"),
        ("runs/dense-seed3/version_0", "dense"),
        ("runs/vit_s16/version_0", "vit_s16"),
        ("runs/dense_seed_3", "dense"),
        ("runs/random-LTD/seed3/version_0", "random-LTD"),
        ("runs/dense/lightning_logs/version_2", "dense"),
        ("runs/sparse-s3-dense/version_0", "sparse-s3-dense"),
        ("runs/gpt2s", "gpt2s"),
    ],
)
def test_an_arm_is_named_by_its_folder(folder, label):
    assert default_label(Path(folder) / FILE_NAME) == label


def test_a_ledger_a_run_and_a_folder_above_give_the_same(tmp_path):
    run = write_ledger(tmp_path / "deep" / "dense" / "version_0", 1e12, 3.0)
    for path in (run / FILE_NAME, run, str(tmp_path)):
        (found,), left_out = find_runs([path], LOSS)
        assert (found.label, found.loss, found.flops, found.steps) == ("dense", 3.0, 1e12, 120)
        assert left_out == []


def test_a_given_label_counts_and_no_ledger_counts_twice(tmp_path):
    write_ledger(tmp_path / "a=b" / "version_0", 1e12, 3.0)
    write_ledger(tmp_path / "other" / "version_0", 1e12, 3.0)
    for given in ([tmp_path, f"mine={tmp_path / 'other'}"], [f"mine={tmp_path / 'other'}", tmp_path]):
        assert sorted(run.label for run in find_runs(given, LOSS)[0]) == ["a=b", "mine"]
    # A path that exists is a path, whatever is in its name.
    assert find_runs([tmp_path / "a=b"], LOSS)[0][0].label == "a=b"


def test_errors_say_what_was_found_and_what_to_do(tmp_path):
    write_ledger(tmp_path / "runs" / "dense", 1e12, 3.0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("epoch,loss\n1,2\n")
    for given, message in (
        ([tmp_path / "nowhere"], r"There is no .*nowhere\. Give a ledger"),
        ([tmp_path / "empty"], r"no compute_ledger.csv in .*empty or below\. Train with the ComputeLedger callback"),
        ([tmp_path / "table.csv"], "table.csv cannot be read as a compute ledger"),
        ([], "No run was given"),
    ):
        with pytest.raises(ReportError, match=message):
            find_runs(given, LOSS)
    with pytest.raises(ReportError, match=r"No run has the metric val/perplexity\. The 1 ledgers found have: val/loss"):
        find_runs([tmp_path / "runs"], "val/perplexity")


@pytest.mark.parametrize("metric", ["val/acc", "val_accuracy", "val/acc1", "top5", "val/f1", "val/auroc", "Val/Acc"])
def test_a_metric_that_is_better_when_higher_is_refused(tmp_path, metric):
    with pytest.raises(ReportError, match="better when higher"):
        find_runs([tmp_path], metric)


@pytest.mark.parametrize("metric", ["val/loss", "val/perplexity", "val/bits_per_byte", "val/mlm_loss", "val/backwards"])
def test_losses_are_not_taken_for_accuracies(tmp_path, metric):
    with pytest.raises(ReportError, match="no compute_ledger"):
        find_runs([tmp_path], metric)


def test_runs_without_an_end_are_left_out_and_named(tmp_path):
    write_ledger(tmp_path / "good", 1e12, 3.0)
    silent = write_ledger(tmp_path / "silent", 1e12, 3.0) / FILE_NAME
    heading, *table = silent.read_text().splitlines()
    silent.write_text("\n".join([heading, *(row.rsplit(",", 1)[0] + "," for row in table)]) + "\n")
    endless = write_ledger(tmp_path / "endless", 1e12, 3.0)
    table = (endless / FILE_NAME).read_text().splitlines()
    table[-1] = table[-1].rsplit(",", 1)[0] + ",inf"
    (endless / FILE_NAME).write_text("\n".join(table) + "\n")
    runs, left_out = find_runs([tmp_path], LOSS)
    assert [run.label for run in runs] == ["good"]
    assert any("silent was left out: it never measured val/loss" in sentence for sentence in left_out)
    assert any(f"{endless} was left out: its last val/loss is inf" in sentence for sentence in left_out)


def continue_as(folder, other, *, steps=30, loss="2.5", column="val/loss"):
    """A ledger that takes over the rows of another but the last three, and goes on."""
    heading, *table = (other / FILE_NAME).read_text().splitlines()
    folder.mkdir(parents=True)
    table = table[:-3]
    for _ in range(steps // 10 + 3):
        step, *costs = table[-1].split(",")[:7]
        costs[2:] = [str(float(cost) * 1.1) for cost in costs[2:]]
        costs[2] = str(round(float(costs[2])))
        table.append(",".join([str(int(step) + 10), *costs, loss]))
    (folder / FILE_NAME).write_text("\n".join([heading.replace("val/loss", column), *table]) + "\n")


def test_a_run_that_was_resumed_into_a_new_folder_is_one_run(tmp_path):
    first = write_ledger(tmp_path / "dense" / "version_0", 1e12, 3.0)
    continue_as(tmp_path / "dense" / "version_1", first)
    (run,), (sentence,) = find_runs([tmp_path], LOSS)
    assert (run.folder.name, run.steps) == ("version_1", 150)
    assert sentence.endswith("version_1 goes on from it.")


@pytest.mark.parametrize("broken", [{"loss": "inf"}, {"column": "val/other"}])
def test_a_continuation_that_says_nothing_does_not_replace_the_run(tmp_path, broken):
    first = write_ledger(tmp_path / "dense" / "version_0", 1e12, 3.0)
    continue_as(tmp_path / "dense" / "version_1", first, **broken)
    (run,), (sentence,) = find_runs([tmp_path], LOSS)
    assert run.folder.name == "version_0"
    assert "version_1 was left out: it" in sentence


def test_runs_that_branch_off_one_another_all_count(tmp_path):
    short = write_ledger(tmp_path / "short_seed0", 1e12, 3.0)
    continue_as(tmp_path / "long_seed0", short)
    runs, (sentence,) = find_runs([tmp_path], LOSS)
    assert sorted(run.label for run in runs) == ["long", "short"]
    assert "begin as one run" in sentence


# --- arms


def arms(folder, dense=None):
    made, warnings = group(find_runs([folder], LOSS)[0], dense)
    return {arm.label: arm for arm in made}, warnings


def test_runs_that_cost_what_they_would_have_cost_are_dense(tmp_path):
    write_dense(tmp_path)
    write_arm(tmp_path, "method", 1.5, 0.1)
    # In a size that changes and comes back, at the same cost: no dense run.
    write_ledger(tmp_path / "resized", 1e15, 3.0, sizes=(1000, 500))
    made, warnings = arms(tmp_path)
    assert {label: arm.is_dense for label, arm in made.items()} == {"dense": True, "method": False, "resized": False}
    assert [len(budget) for budget in made["dense"].budgets] == [3, 3, 3, 3]
    assert warnings == []
    assert next(iter(made)) == "dense"


def test_the_same_run_again_is_no_other_seed(tmp_path):
    """Its loss scatters by nothing, which would be taken for how little seeds scatter."""
    write_arm(tmp_path, "method", 1.5, 0.1, num_seeds=2, deviation=0.01)
    write_arm(tmp_path / "again", "method", 1.5, 0.1, num_seeds=1, deviation=0.01)
    runs, (said,) = find_runs([tmp_path], LOSS)
    assert len(runs) == 2
    assert "was left out: it is" in said
    assert "again, to the last digit of its losses, and no other seed" in said
    # Of another arm it may well be the same.
    write_arm(tmp_path / "again", "other", 1.5, 0.1, num_seeds=1, deviation=0.01)
    assert len(find_runs([tmp_path], LOSS)[0]) == 3


def test_a_metric_that_is_a_loss_by_name_is_lower_when_better(tmp_path):
    with pytest.raises(ReportError, match="better when higher"):
        find_runs([tmp_path], "val/dice")
    write_arm(tmp_path, "method", 1.5, 0.1)
    with pytest.raises(ReportError, match="No run has the metric val/dice_loss"):
        find_runs([tmp_path], "val/dice_loss")


def test_a_method_that_does_nothing_can_be_told_from_dense_runs(tmp_path):
    write_dense(tmp_path)
    write_ledger(tmp_path / "no-op_seed1", 1e15, 3.5)
    assert arms(tmp_path)[0]["no-op"].is_dense
    made, _ = arms(tmp_path, dense=["dense"])
    assert made["dense"].is_dense
    assert not made["no-op"].is_dense
    with pytest.raises(ReportError, match=r"no arm plain to take as dense; there are: dense, no-op"):
        arms(tmp_path, dense=["plain"])


def test_an_arm_of_dense_and_other_runs_is_a_method_and_says_so(tmp_path):
    write_ledger(tmp_path / "mixed" / "version_0", 1e15, 3.5)
    write_ledger(tmp_path / "mixed" / "version_1", 1e15, 3.5, dense_flops=2e15)
    made, (warning,) = arms(tmp_path)
    assert not made["mixed"].is_dense
    assert "1 of the 2 runs of mixed cost what dense training costs" in warning
    made, (warning,) = arms(tmp_path, dense=["mixed"])
    assert made["mixed"].is_dense
    assert "1 of its 2 runs did not cost" in warning


def test_budgets_are_two_percent_wide(tmp_path):
    for index, flops in enumerate((100, 101.9, 102.1, 103)):
        write_ledger(tmp_path / "a" / f"version_{index}", flops * 1e10, 3.0)
    assert [len(budget) for budget in by_budget(find_runs([tmp_path], LOSS)[0])] == [2, 2]
