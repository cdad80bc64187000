"""Finding the runs: ledgers under the given paths, their labels, and what each run ended with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lit_accel.compute.table import FILE_NAME, Ledger, read_ledger

# Folders that say nothing about what was run: a logger's versions, its default name, a seed of its own folder.
_MEANINGLESS = re.compile(r"version_\d+|lightning_logs|seed[_-]?\d+", re.IGNORECASE)
_SEED_MARKER = re.compile(r"[_.-]seed[_-]?\d+$", re.IGNORECASE)
_HIGHER_IS_BETTER = re.compile(
    r"(^|[^a-z0-9])(acc|accuracy|top\d+|f1|auc|auroc|precision|recall|bleu|rouge\w*|iou|dice|r2|score)\d*($|[^a-z0-9])",
    re.IGNORECASE,
)
# A last measurement so much before the end of the run, as a share of its steps, is one in mid-way.
_END = 0.02


class ReportError(ValueError):
    """What was given cannot be reported on; the message says what was found and what to do."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run with a measured end.

    Args:
        label: The arm that it belongs to.
        folder: Where its ledger lies.
        metric: The held-out loss, by its name in the ledger.
        ledger: Its ledger.
    """

    label: str
    folder: Path
    metric: str
    ledger: Ledger

    @cached_property
    def rows(self) -> np.ndarray:
        """Indices of the ledger's rows in which the loss was measured, of shape (measurements,)."""
        return self.ledger.measured(self.metric)

    @property
    def loss(self) -> float:
        """The last held-out loss."""
        return float(self.ledger.metrics[self.metric][self.rows[-1]])

    @property
    def steps(self) -> int:
        """Optimizer steps until the last measurement, as are all that follow."""
        return int(self.ledger.step[self.rows[-1]])

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return int(self.ledger.tokens[self.rows[-1]])

    @property
    def flops(self) -> float:
        """FLOPs that were spent."""
        return float(self.ledger.flops[self.rows[-1]])

    @property
    def dense_flops(self) -> float:
        """FLOPs that the full-size model would have spent on the same batches."""
        return float(self.ledger.dense_flops[self.rows[-1]])

    @property
    def seconds(self) -> float:
        """Seconds of training, without validation."""
        return float(self.ledger.seconds[self.rows[-1]])

    @property
    def dense_flops_per_token(self) -> float:
        """What tells models of different sizes apart, whatever a method did to them."""
        return self.dense_flops / self.tokens

    @property
    def costs_as_dense(self) -> bool:
        """Whether the ledger says that nothing was saved or added in any row."""
        ledger = self.ledger
        return bool(np.array_equal(ledger.flops, ledger.dense_flops) and ledger.phase[-1] == 0)

    @property
    def is_measured_at_its_end(self) -> bool:
        """Whether the last measurement is that of the end of the run."""
        return self.steps >= (1 - _END) * self.ledger.step[-1]


def find_runs(paths: Sequence[str | Path], metric: str) -> tuple[list[Run], list[str]]:
    """Read the ledgers under some paths.

    Args:
        paths: Ledger files, folders of runs, or folders above runs; each may be written ``LABEL=PATH``.
        metric: The held-out loss to read.

    Returns:
        The runs, and a sentence about each that was left out.

    Raises:
        ReportError: If a path does not exist, holds no ledger or a file that is none, if the metric is one that is
            better when higher, or if no run has it.
    """
    if _HIGHER_IS_BETTER.search(metric) and not metric.lower().endswith("loss"):
        raise ReportError(
            f"{metric} looks like a metric that is better when higher. Savings are read at equal loss: give a loss "
            "with --metric, such as val/loss."
        )
    if not paths:
        raise ReportError("No run was given. Give ledgers, folders of runs or folders above runs.")
    # By the file itself: `runs dense=runs/b` gives runs/b twice, and the label that was given counts.
    labels: dict[Path, str] = {}
    files: dict[Path, Path] = {}
    for given in paths:
        label, path = _split(given)
        for file in _ledgers(path):
            key = file.resolve()
            files.setdefault(key, file)
            if label or key not in labels:
                labels[key] = label or default_label(file)
    runs: list[Run] = []
    left_out, known = [], set()
    for key, file in files.items():
        try:
            ledger = read_ledger(file)
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{file} cannot be read as a compute ledger: {error}") from error
        known |= set(ledger.metrics)
        run = Run(labels[key], file.parent, metric, ledger)
        if reason := _why_useless(run):
            left_out.append(f"{file.parent} was left out: {reason}")
        else:
            runs.append(run)
    if not runs and metric not in known:
        raise ReportError(
            f"No run has the metric {metric}. The {len(files)} ledgers found have: "
            f"{', '.join(sorted(known)) or 'no metric'}. Choose one with --metric, or name it in "
            "ComputeLedger(monitor=[...]) and train again."
        )
    if not runs:
        raise ReportError(" ".join(left_out))
    kept: list[Run] = []
    for run in runs:
        if (same := next((one for one in kept if _is_again(run, one)), None)) is not None:
            left_out.append(
                f"{run.folder} was left out: it is {same.folder} again, to the last digit of its losses, and no other "
                "seed."
            )
            continue
        longer, sentence = _goes_on_in(run, runs)
        if longer is None:
            kept.append(run)
        left_out += [sentence] if sentence else []
    return kept, left_out


def default_label(file: Path) -> str:
    """Name the arm of a ledger by its folder, without the logger's version and the seed.

    Args:
        file: The ledger, such as ``runs/dense_seed3/version_0/compute_ledger.csv``, whose label is ``dense``.
    """
    if file.name != FILE_NAME:
        return _SEED_MARKER.sub("", file.stem)
    names = [name for name in file.resolve().parent.parts[1:] if not _MEANINGLESS.fullmatch(name)]
    return _SEED_MARKER.sub("", names[-1]) if names else "run"


def _is_again(run: Run, other: Run) -> bool:
    """Whether a run of an arm is another one of it, made anew with the same seed."""
    return run.label == other.label and all(
        np.array_equal(one, of_other, equal_nan=True)
        for one, of_other in (
            (run.ledger.step, other.ledger.step),
            (run.ledger.flops, other.ledger.flops),
            (run.ledger.dense_flops, other.ledger.dense_flops),
            (run.ledger.metrics[run.metric], other.ledger.metrics[other.metric]),
        )
    )


def _goes_on_in(run: Run, others: Sequence[Run]) -> tuple[Run | None, str]:
    """Return the run that goes on from a run, which takes over its rows; and a sentence about it.

    Runs that branch off one another begin alike, too: to be told from a run that was cut short and resumed, they have
    to be of different arms, and to be measured at ends of their own.
    """

    def rows(one: Run) -> set[tuple[int, float]]:
        # Seconds are those of a clock, to the microsecond: no other run has the same.
        return set(zip(one.ledger.step.tolist(), one.ledger.seconds.tolist(), strict=True))

    def place(one: Run) -> tuple[int, int]:
        return int(one.ledger.step[-1]), -others.index(one)

    start = (run.ledger.step[0], run.ledger.seconds[0])
    longer = [one for one in others if place(one) > place(run) and start in rows(one)]
    for one in longer:
        has_own_end = run.is_measured_at_its_end and (run.steps, run.seconds) not in rows(one)
        if one.label == run.label or not has_own_end:
            return one, f"{run.folder} was left out: {one.folder} goes on from it."
    both = " and ".join(str(one.folder) for one in (run, *longer))
    said = (
        f"{both} begin as one run, and each was measured at an end of its own: all count. Leave out what was cut short."
    )
    return None, said if longer else ""


def _split(given: str | Path) -> tuple[str | None, Path]:
    text = str(given)
    # A path may have a = in it.
    if "=" in text and not Path(text).exists():
        label, _, path = text.partition("=")
        return label.strip() or None, Path(path)
    return None, Path(text)


def _ledgers(path: Path) -> list[Path]:
    if not path.exists():
        raise ReportError(f"There is no {path}. Give a ledger, a run's folder or a folder above runs.")
    if path.is_file():
        return [path]
    found = sorted(path.rglob(FILE_NAME))
    if not found:
        raise ReportError(
            f"There is no {FILE_NAME} in {path} or below. Train with the ComputeLedger callback; it writes one into "
            "the logger's folder."
        )
    return found


def _why_useless(run: Run) -> str | None:
    if run.metric not in run.ledger.metrics:
        return f"it has no metric {run.metric}, only {', '.join(run.ledger.metrics) or 'none'}."
    if not len(run.rows):
        return f"it never measured {run.metric}."
    if not np.isfinite(run.loss):
        return f"its last {run.metric} is {run.loss}."
    if not (run.flops > 0 and run.seconds > 0 and run.tokens > 0):
        return "its ledger counted nothing."
    return None
