"""Ledgers with a known truth: dense runs that end on a known curve, and arms of known saving."""

from __future__ import annotations

import csv
import itertools

import numpy as np

from lit_accel.compute.table import COLUMNS, FILE_NAME
from lit_accel.report.noise import Cell

FLOOR, EXCESS, EXPONENT, REFERENCE = 2.5, 1.0, 0.3, 1e15
SECONDS_PER_FLOP = 1e-12
_NUMBERS = itertools.count(1)


def loss_at(flops):
    return FLOOR + EXCESS * (np.asarray(flops) / REFERENCE) ** -EXPONENT


def write_ledger(folder, flops, loss, *, dense_flops=None, seconds=None, tokens=1_000_000, sizes=(1000,), num_rows=12):
    """A run that ends at a loss; its curve falls steeply at first, and its sizes take equal parts of it."""
    folder.mkdir(parents=True, exist_ok=True)
    # No two runs take the same time to the microsecond, by which a resumed one is known.
    own = 1e-6 * next(_NUMBERS)
    seconds = flops * SECONDS_PER_FLOP if seconds is None else seconds
    with (folder / FILE_NAME).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "val/loss"])
        for row in range(1, num_rows + 1):
            share, phase = row / num_rows, (row - 1) * len(sizes) // num_rows
            now = loss + (7 - loss) * (np.exp(-6 * share) - np.exp(-6))
            costs = (round(flops * share), round((dense_flops or flops) * share), seconds * share + own)
            writer.writerow([10 * row, phase, sizes[phase], round(tokens * share), *costs, now])
    return folder


def write_dense(folder, budgets=(0.5, 1, 2, 4), num_seeds=3, deviation=1e-9, seed=0):
    """Dense runs, each token of which costs the same."""
    rng = np.random.default_rng(seed)
    for number in range(num_seeds):
        for index, budget in enumerate(budgets):
            flops = budget * REFERENCE
            loss = loss_at(flops) + deviation * rng.normal()
            write_ledger(folder / f"dense_seed{number}" / f"version_{index}", flops, loss, tokens=round(flops / 1e9))


def write_arm(folder, label, budget, saving, *, slow_down=1.0, num_seeds=3, deviation=1e-9, seed=1, sizes=(1000,)):
    """An arm that has the full-size model's tokens at a budget of 80 % of it, and saves so much at equal loss."""
    rng = np.random.default_rng(seed)
    flops = budget * REFERENCE
    for number in range(num_seeds):
        loss = loss_at(flops / (1 - saving)) + deviation * rng.normal()
        write_ledger(
            folder / f"{label}_seed{number}" / "version_0",
            flops,
            loss,
            dense_flops=flops / 0.8,
            seconds=flops * SECONDS_PER_FLOP * slow_down,
            tokens=round(flops / 0.8 / 1e9),
            sizes=sizes,
        )


def cell(flops, loss, num_seeds, deviation, rng, cost_deviation=0.0):
    """The same as a cell, without files."""
    return Cell(
        np.log(flops) + cost_deviation * rng.normal(size=num_seeds), loss + deviation * rng.normal(size=num_seeds)
    )
