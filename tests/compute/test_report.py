"""What is read from ledgers, and what is refused to be read from them; sums over ranks; numbers for people."""

from __future__ import annotations

import csv

import matplotlib.image
import pytest
import torch

from lit_accel.compute import plot_report, read_ledger, saving_at_equal_loss
from lit_accel.compute.phases import Amounts, Phase, Phases
from lit_accel.compute.table import COLUMNS, FILE_NAME
from lit_accel.compute.units import duration, with_prefix


def write(path, losses, flops_per_row=100, sizes=None):
    """A ledger with one measurement a row, ten steps and two seconds each."""
    sizes = sizes or [1000] * len(losses)
    phase = 0
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "val/loss"])
        for row, (loss, size) in enumerate(zip(losses, sizes, strict=True), 1):
            phase += row > 1 and size != sizes[row - 2]
            spent = row * flops_per_row
            writer.writerow([10 * row, phase, size, 50 * row, spent, 2 * spent, 2.0 * row, loss])
    return path


def test_reads_columns_with_gaps_where_nothing_was_measured(tmp_path):
    write(tmp_path / FILE_NAME, [5.0, "", 3.0])
    ledger = read_ledger(tmp_path)
    assert ledger.step.tolist() == [10, 20, 30]
    assert ledger.flops.tolist() == [100.0, 200.0, 300.0]
    assert ledger.measured("val/loss").tolist() == [0, 2]
    with pytest.raises(KeyError, match=r"no metric 'val/acc'; it has: val/loss"):
        ledger.measured("val/acc")


def test_reads_a_table_whose_writer_was_killed(tmp_path):
    path = write(tmp_path / FILE_NAME, [5.0, 4.0])
    path.write_text(path.read_text() + "30,0,10")
    assert read_ledger(path).step.tolist() == [10, 20]


def test_flops_beyond_64_bits_are_read(tmp_path):
    path = write(tmp_path / FILE_NAME, [5.0], flops_per_row=10**24)
    assert read_ledger(path).flops.tolist() == [1e24]


def test_refuses_another_table(tmp_path):
    (tmp_path / FILE_NAME).write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match="no column step"):
        read_ledger(tmp_path)


def test_saving_is_interpolated_where_the_dense_run_first_got_there(tmp_path):
    dense = read_ledger(write(tmp_path / "dense.csv", [5.0, 4.0, 3.0, 3.5, 2.0]))
    method = read_ledger(write(tmp_path / "method.csv", [4.5, 3.25], flops_per_row=50))
    saving = saving_at_equal_loss(dense, method)
    assert saving.reason is None
    assert (saving.loss, saving.method_flops, saving.dense_flops) == (3.25, 100.0, 275.0)
    assert (saving.method_seconds, saving.dense_seconds) == (4.0, 5.5)
    assert saving.flops_saved == pytest.approx(1 - 100 / 275)
    assert saving.seconds_saved == pytest.approx(1 - 4 / 5.5)


def test_nothing_is_saved_against_oneself(tmp_path):
    ledger = read_ledger(write(tmp_path / "dense.csv", [5.0, 4.0, 3.0]))
    assert saving_at_equal_loss(ledger, ledger).flops_saved == 0


@pytest.mark.parametrize(("final", "reason"), [(1.9, "never reached"), (5.1, "first measurement")])
def test_nothing_is_extrapolated(tmp_path, final, reason):
    dense = read_ledger(write(tmp_path / "dense.csv", [5.0, 4.0, 2.0]))
    method = read_ledger(write(tmp_path / "method.csv", [6.0, final]))
    saving = saving_at_equal_loss(dense, method)
    assert saving.dense_flops is saving.dense_seconds is saving.flops_saved is saving.seconds_saved is None
    assert reason in saving.reason


def test_draws_single_and_multi_phase_runs(tmp_path):
    full, half = 124_000_000, 38_000_000
    runs = {
        "dense": write(tmp_path / "dense.csv", [5.0, 4.0, 3.5, 3.2], flops_per_row=10**15),
        "cycle": write(tmp_path / "a.csv", [5.0, 4.0, 3.2], 10**15, sizes=[full, half, full]),
        "other": write(tmp_path / "b.csv", [5.0, 4.0, 3.2], 10**15, sizes=[full, half, full]),
    }
    for labels in (["dense"], ["dense", "cycle"], ["dense", "cycle", "other"]):
        picture = tmp_path / "new" / f"{len(labels)}.png"
        plot_report({label: runs[label] for label in labels}, picture)
        assert matplotlib.image.imread(picture).std() > 0.05


def test_says_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="no ledger was given"):
        plot_report({}, tmp_path / "report.png")
    with pytest.raises(ValueError, match="silent has no measurement of 'val/loss'"):
        plot_report({"silent": write(tmp_path / "silent.csv", ["", ""])}, tmp_path / "report.png")


class FourEqualRanks:
    root_device = torch.device("cpu")

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        return tensor * 4


def test_counts_of_all_ranks_are_summed_exactly_beyond_64_bits():
    phases = Phases()
    phases.list = [Phase(num_parameters=1), Phase(num_parameters=2)]
    phases.count(Amounts(tokens=7, flops=3**45 + 1, dense_flops=3**46))
    for _ in range(2):
        phases.collect(FourEqualRanks(), world_size=4)
    assert (phases.total.tokens, phases.total.flops) == (28, 4 * (3**45 + 1))
    assert phases.total.dense_flops == 4 * 3**46


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (999.7, "1k"), (12_345, "12.3k"), (124e6, "124M"), (38e6, "38M"), (1.5e24, "1.5Y")],
)
def test_numbers_have_three_digits_and_a_prefix(value, text):
    assert with_prefix(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.04, "3.0 s"), (59.96, "1:00"), (75, "1:15"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert duration(seconds) == text
