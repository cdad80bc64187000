"""Whether a run that was killed and resumed is the uninterrupted one, bit by bit, in all that it leaves behind."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.soaking.cases import STEPS
from scripts.soaking.training import FINAL, LOGS, WEIGHTS

PARTS = ("weights", "optimizer", "methods", "ledger", "data", "progress", "metrics")
_METRICS, _LEDGER = "metrics.csv", "compute_ledger.csv"
# Of a checkpoint: what of it belongs to which part.
_KEYS = {
    "state_dict": "weights",
    "lit_accel": "methods",
    "optimizer_states": "optimizer",
    "lr_schedulers": "optimizer",
    "epoch": "progress",
    "global_step": "progress",
}
# Which file a run wrote to differs, and so do clocks.
_OTHERWISE = ("ModelCheckpoint", "/seconds", "ComputeLedger/table", "ComputeLedger/first_row")
# Lightning's own counts: a resumed run may begin an epoch, find no batch left in it, and begin another.
_IGNORED = {"loops"}
# What Lightning logs of a step after it has written the checkpoint of that step: who dies in between, or in the
# evaluation that follows, goes on with the next step, and these rows are never written.
_LOGGED_LATE = ("train/loss", "epoch", "val/", "multilevel/")

Rows = dict[tuple[int, str], set[str]]
"""Logged values by step and name."""


@dataclass
class Comparison:
    """What differs.

    Args:
        differences: Descriptions, by part.
        unlogged: Rows that are missing because Lightning writes a checkpoint before it logs that step's last rows, by
            the step of the checkpoint; no difference of the training.
    """

    differences: dict[str, list[str]] = field(default_factory=lambda: {part: [] for part in PARTS})
    unlogged: dict[int, list[str]] = field(default_factory=dict)

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not any(self.differences.values())

    def verdicts(self) -> dict[str, bool]:
        """Return whether each part is equal."""
        return {part: not found for part, found in self.differences.items()}


def compare(folder: Path, reference: Path, resumed: Collection[int] = ()) -> Comparison:
    """Compare two runs that have ended.

    Args:
        folder: The folder of the one that was killed and resumed.
        reference: The folder of the uninterrupted one.
        resumed: The steps at which it was resumed.
    """
    comparison = Comparison()
    mine, theirs = (_load(each / FINAL) for each in (folder, reference))
    # Lightning counts an epoch when it is over, and does not go back into one of which nothing is left.
    ignored = _IGNORED | ({"epoch"} if STEPS in resumed else set())
    for key in sorted((mine.keys() | theirs.keys()) - ignored):
        for path, what in differing(mine.get(key), theirs.get(key), key):
            comparison.differences[_part_of(key, path)].append(f"{path}: {what}")
    for path, what in differing(_load(folder / WEIGHTS), _load(reference / WEIGHTS), "end"):
        comparison.differences["weights"].append(f"{path}: {what}")
    _compare_logs(comparison, folder / LOGS, reference / LOGS, resumed)
    _compare_tables(comparison, folder / LOGS, reference / LOGS, resumed)
    return comparison


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True, map_location="cpu")


def _part_of(key: str, path: str) -> str:
    if key == "callbacks":
        return "ledger" if "ComputeLedger" in path else "methods"
    # Whatever else there is belongs to the data module, which is known by its class.
    return _KEYS.get(key, "data")


def differing(mine: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield where two nested states differ, and how; tensors are compared bit by bit.

    Args:
        mine: One of them.
        theirs: The other.
        path: Where they are.
    """
    if any(part in path for part in _OTHERWISE):
        return
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        if not _same_bits(mine, theirs):
            yield path, _how_far(mine, theirs)
    elif isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in sorted(mine.keys() ^ theirs.keys(), key=str):
            if not any(part in f"{path}/{key}" for part in _OTHERWISE):
                yield f"{path}/{key}", "is missing" if key in theirs else "is new"
        for key in mine.keys() & theirs.keys():
            yield from differing(mine[key], theirs[key], f"{path}/{key}")
    elif isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)):
        if len(mine) != len(theirs):
            yield path, f"has {len(mine)} entries instead of {len(theirs)}"
        for index, pair in enumerate(zip(mine, theirs, strict=False)):
            yield from differing(*pair, f"{path}/{index}")
    elif type(mine) is not type(theirs) or repr(mine) != repr(theirs):
        # Representations, since what is not a number equals nothing.
        yield path, f"{mine!r} instead of {theirs!r}"


def _same_bits(mine: Tensor, theirs: Tensor) -> bool:
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        return False
    return torch.equal(_bytes_of(mine), _bytes_of(theirs))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _how_far(mine: Tensor, theirs: Tensor) -> str:
    if mine.shape != theirs.shape:
        return f"shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}"
    return f"differs by up to {(mine.double() - theirs.double()).abs().max().item():.3g}"


def read_log(path: Path) -> Rows:
    """Return what a process has logged; a last line that it died in is none.

    Args:
        path: Its ``metrics.csv``.
    """
    rows: Rows = {}
    text = path.read_text() if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    for line in csv.DictReader(whole.splitlines()):
        for name, value in line.items():
            if name != "step" and value and "seconds" not in name:
                rows.setdefault((int(line["step"]), name), set()).add(value)
    return rows


def _compare_logs(comparison: Comparison, mine: Path, theirs: Path, resumed: Collection[int]) -> None:
    """Compare what all processes of a run have logged: also a step that was repeated must have logged the same."""
    seen, expected = _union(mine), _union(theirs)
    found = comparison.differences["metrics"]
    for place, values in sorted(seen.items()):
        if not values <= expected.get(place, set()):
            found.append(f"{_where(place)}: {sorted(values)} instead of {sorted(expected.get(place, set()))}")
    for place in sorted(expected.keys() - seen.keys()):
        step, name = place
        # Rows are numbered from 0.
        if step + 1 in resumed and name.startswith(_LOGGED_LATE):
            comparison.unlogged.setdefault(step + 1, []).append(_where(place))
        else:
            found.append(f"{_where(place)}: not logged")


def _union(folder: Path) -> Rows:
    union: Rows = {}
    for path in folder.glob(f"*/{_METRICS}"):
        for place, values in read_log(path).items():
            union.setdefault(place, set()).update(values)
    return union


def _where(place: tuple[int, str]) -> str:
    return f"{place[1]} of step {place[0]}"


def _compare_tables(comparison: Comparison, mine: Path, theirs: Path, resumed: Collection[int]) -> None:
    """Compare the ledger's tables: the one that the last process has left goes on from those before it."""
    left = _last_table(mine)
    for row in _last_table(theirs):
        if left and left[0] == row:
            left.pop(0)
        elif int(row["step"]) in resumed and row["val/loss"]:
            comparison.unlogged.setdefault(int(row["step"]), []).append(f"evaluation in {_LEDGER}")
        else:
            comparison.differences["ledger"].append(f"{_LEDGER}: {left[:1]} instead of {row}")
            return
    if left:
        comparison.differences["ledger"].append(f"{_LEDGER}: {len(left)} rows too many")


def _last_table(folder: Path) -> list[dict[str, str]]:
    tables = sorted(folder.glob(f"start_*/{_LEDGER}"), key=lambda path: int(path.parent.name.removeprefix("start_")))
    if not tables:
        return []
    with tables[-1].open() as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]
