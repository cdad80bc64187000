"""The ledger's table on disk: one CSV file a run, whose rows survive a killed process."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FILE_NAME = "compute_ledger.csv"
_INTEGERS = ("step", "phase", "num_parameters", "tokens")
_FLOATS = ("flops", "dense_flops", "seconds")
COLUMNS = (*_INTEGERS, *_FLOATS)
# Ledgers of earlier versions do not have them.
_BY_HEAD = ("head_masked_flops", "head_dense_flops", "head_excluded_flops", "dense_head_excluded_flops")


class TableWriter:
    """Appends rows to a ledger's file, each on the disk before the next step begins.

    Args:
        path: The file; it is replaced.
        metrics: Names of the metrics that get a column.
        rows: Rows to begin with, from :func:`read_rows`; columns that are no longer wanted are left out.
    """

    def __init__(self, path: Path, metrics: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()) -> None:
        self.path = path
        self.columns = [*COLUMNS, *_BY_HEAD, *metrics]
        self.last_step = int(rows[-1]["step"]) if rows else None
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; columns it lacks stay empty."""
        # Opened anew each time: nothing is left in a buffer, and the callback that holds this can be copied.
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        self.last_step = row["step"]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a ledger's file, or none if there is no such file.

    Args:
        path: The file.
    """
    if not path.is_file():
        return []
    return [row for row in csv.DictReader(_whole_lines(path)) if row.get("seconds")]


def rows_until(rows: Sequence[dict[str, str]], step: int, tokens: int) -> list[dict[str, str]]:
    """Return the rows up to a point of their run.

    Args:
        rows: The rows.
        step: The last step whose rows are wanted.
        tokens: The number of tokens after which none is: an evaluation within an accumulated step has a row of the step
            before, and comes again.
    """
    return [row for row in rows if int(row["step"]) <= step and int(row["tokens"]) <= tokens]


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that are complete: a process that was killed while it wrote leaves a part of one."""
    with path.open(newline="") as file:
        return [line for line in file if line.endswith("\n")]


@dataclass(frozen=True)
class Ledger:
    """A ledger as columns, one entry a row; counters are cumulative over the run and over all ranks.

    Args:
        step: Optimizer steps done.
        phase: How often the model's size, or the stage of its sparsity, had changed.
        num_parameters: Parameters of the transformer.
        tokens: Training tokens.
        flops: FLOPs, as float64: an int64 ends at 9.2e18.
        dense_flops: FLOPs of the full-size model on the same batches, as float64.
        seconds: Seconds of training, without validation.
        metrics: Values by metric, NaN in rows where it was not measured.
        by_head: FLOPs by ways to count the model's head: ``head_masked_flops``, ``head_dense_flops``,
            ``head_excluded_flops``, and the full-size model's ``dense_head_excluded_flops``.
    """

    step: np.ndarray
    phase: np.ndarray
    num_parameters: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    dense_flops: np.ndarray
    seconds: np.ndarray
    metrics: dict[str, np.ndarray]
    by_head: dict[str, np.ndarray] = field(default_factory=dict)

    def measured(self, metric: str) -> np.ndarray:
        """Return the indices of the rows in which a metric was measured.

        Raises:
            KeyError: If the ledger has no such column.
        """
        if metric not in self.metrics:
            known = ", ".join(self.metrics) or "none"
            raise KeyError(
                f"The ledger has no metric {metric!r}; it has: {known}. Name it in ComputeLedger(monitor=[...])."
            )
        return np.flatnonzero(~np.isnan(self.metrics[metric]))


def read_ledger(path: str | Path) -> Ledger:
    """Read what a :class:`~lit_accel.compute.ComputeLedger` wrote.

    Args:
        path: A ``compute_ledger.csv``, or the folder of a run that holds one.

    Raises:
        FileNotFoundError: If there is no ledger.
        ValueError: If the file is no ledger.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    reader = csv.DictReader(_whole_lines(path))
    columns = list(reader.fieldnames or ())
    rows = [row for row in reader if row.get("seconds")]
    if missing := [column for column in COLUMNS if column not in columns]:
        raise ValueError(f"{path} is no compute ledger: it has no column {', '.join(missing)}.")

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name] or "nan") for row in rows], dtype=np.float64)

    return Ledger(
        **{name: np.array([int(row[name]) for row in rows], dtype=np.int64) for name in _INTEGERS},
        **{name: np.array([float(row[name]) for row in rows], dtype=np.float64) for name in _FLOATS},
        metrics={name: column(name) for name in columns if name not in (*COLUMNS, *_BY_HEAD)},
        by_head={name: column(name) for name in _BY_HEAD if name in columns},
    )
