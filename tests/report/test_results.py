"""The whole report over planted ledgers: savings, realised share, equal tokens, phases, warnings."""

from __future__ import annotations

import numpy as np
import pytest

from lit_accel.compute.table import FILE_NAME
from lit_accel.report import report
from tests.report.planted import REFERENCE, loss_at, write_arm, write_dense, write_ledger


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_dense(folder, deviation=0.003)
    write_arm(folder, "method", 1.6, 0.2, slow_down=1.1, deviation=0.003, sizes=(1000, 400, 1000))
    write_arm(folder, "no-op", 1.0, 0.0, deviation=0.003, seed=5)
    # Of another model: its full size costs twice as much a token.
    write_ledger(folder / "other", REFERENCE, 3.4, dense_flops=1.6 * REFERENCE, tokens=800_000)
    return report([folder], output=folder / "new" / "out")


def result(made, label):
    (found,) = [result for result in made.results if result.label == label]
    return found


def test_finds_the_planted_savings_in_flops_and_in_seconds(made):
    found = result(made, "method")
    assert found.in_flops.share == pytest.approx(0.2, abs=0.02)
    # Each FLOP took 1.1 times as long.
    assert found.in_seconds.share == pytest.approx(1 - 1.1 * 0.8, abs=0.02)
    for saving, truth in ((found.in_flops, 0.2), (found.in_seconds, 0.12)):
        assert saving.low < truth < saving.high
        assert saving.low < saving.median < saving.high
    assert found.in_flops.cost == pytest.approx(1.6 * REFERENCE)
    noop = result(made, "no-op")
    assert noop.in_flops.low < 0 < noop.in_flops.high
    assert abs(noop.in_flops.share) < 0.02


def test_what_arrives_of_the_counted_saving(made):
    found = result(made, "method")
    assert found.flops_ratio == pytest.approx(1.25)
    assert found.time_ratio == pytest.approx(1.25 / 1.1, rel=1e-3)
    assert found.realised_share == pytest.approx(np.log(1.25 / 1.1) / np.log(1.25), rel=1e-2)


def test_loss_at_equal_tokens_is_that_of_dense_runs_of_the_same_model(made):
    found = result(made, "method")
    assert found.tokens == 2_000_000
    dense = loss_at(2 * REFERENCE)
    assert found.loss_difference == pytest.approx(loss_at(1.6 * REFERENCE / 0.8) - dense, abs=0.006)
    # No dense run had as many tokens, or none was of this model.
    assert result(made, "no-op").loss_difference is None
    other = result(made, "other")
    assert other.time_ratio is other.realised_share is other.loss_difference is None


def test_no_realised_share_where_nothing_was_counted(tmp_path):
    write_dense(tmp_path)
    # As many FLOPs a token as the dense runs have at full size: their seconds compare.
    write_ledger(tmp_path / "no-op", REFERENCE, 3.5, dense_flops=1.04 * REFERENCE, tokens=1_040_000)
    (found,) = report([tmp_path], output=tmp_path).results
    assert found.flops_ratio == pytest.approx(1.04)
    assert found.time_ratio == pytest.approx(1.04, rel=1e-3)
    assert found.realised_share is None


def test_phases_are_differences_of_rows(made):
    assert len(made.phases) == 3
    phases = made.phases[0]
    assert "method" in phases.name
    assert [phase.num_parameters for phase in phases.phases] == [1000, 400, 1000]
    assert [phase.steps for phase in phases.phases] == [40, 40, 40]
    assert sum(phase.flops for phase in phases.phases) == phases.total.flops == 1.6 * REFERENCE
    assert sum(phase.tokens for phase in phases.phases) == phases.total.tokens == 2_000_000
    assert sum(phase.seconds for phase in phases.phases) == pytest.approx(phases.total.seconds)


def test_says_what_was_taken_as_dense(made):
    assert made.rests_on[0].startswith("Taken as dense: dense (12 runs).")
    assert "500 TFLOPs (3 runs), 1 PFLOPs (3 runs), 2 PFLOPs (3 runs), 4 PFLOPs (3 runs)" in made.rests_on[1]
    assert "not known to the report" in made.rests_on[2]


def test_a_dense_run_that_was_measured_in_mid_way_is_no_end(tmp_path):
    write_dense(tmp_path)
    file = tmp_path / "dense_seed0" / "version_3" / FILE_NAME
    *lines, last = file.read_text().splitlines()
    file.write_text("\n".join([*lines, last.rsplit(",", 1)[0] + ","]) + "\n")
    made = report([tmp_path], output=tmp_path)
    assert [len(cell.losses) for cell in made.in_flops.cells] == [3, 3, 3, 2]
    assert any("last measured its loss at step 110 of 120, in mid-way" in warning for warning in made.warnings)


def test_warns_of_dense_runs_of_several_sizes(tmp_path):
    write_dense(tmp_path)
    write_ledger(tmp_path / "small", REFERENCE, 3.5, sizes=(500,))
    (warning,) = report([tmp_path], output=tmp_path).warnings
    assert "several sizes make up one frontier, by parameters: 1k (12 runs), 500 (1 runs)" in warning
    assert report([tmp_path], dense=["dense"], output=tmp_path).warnings == ()


def test_without_dense_runs_there_is_a_report_without_savings(tmp_path):
    write_arm(tmp_path, "method", 1.6, 0.2)
    made = report([tmp_path], output=tmp_path)
    assert made.results[0].in_flops.reason == made.results[0].in_seconds.reason == "no dense frontier"
    assert "No run was taken as dense" in made.rests_on[0]
    assert made.page.is_file()
    assert made.picture.is_file()


def test_many_draws_outside_are_said(tmp_path):
    write_dense(tmp_path, deviation=0.02)
    write_arm(tmp_path, "method", 3.2, 0.09, deviation=0.02, seed=3)
    made = report([tmp_path], output=tmp_path)
    assert made.results[0].in_flops.share_outside > 0.05
    assert any("of the draws in FLOPs" in warning for warning in made.warnings)


def test_says_if_an_arm_scatters_more_than_the_dense_runs(tmp_path):
    write_dense(tmp_path, deviation=0.003)
    write_arm(tmp_path, "wild", 1.6, 0.2, deviation=0.03)
    write_arm(tmp_path, "tame", 1.2, 0.2, deviation=0.003)
    (warning,) = report([tmp_path], output=tmp_path).warnings
    assert "Seeds of wild scatter" in warning
