"""Which ledger on the disk is a run's own: where it lies, what of it came before a resume, and what is another run's.

A run is known by the first row of its table: its seconds are those of a clock, to the microsecond.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path

from lit_accel.compute.table import FILE_NAME, read_rows

# Where a run's folder may be, seen from a checkpoint of it: beside it, and above `checkpoints`.
_LEVELS = 3


def first_row(path: Path) -> list[str] | None:
    """Return what a run is known by: step and seconds of its first row; ``None`` if there is no row."""
    rows = read_rows(path)
    return [rows[0]["step"], rows[0]["seconds"]] if rows else None


def find_own(own: list[str] | None, path: Path, previous: Path, checkpoint: str | Path | None) -> Path | None:
    """Find the table that a resumed run goes on with.

    Args:
        own: Its first row; ``None`` if its checkpoint does not say.
        path: Where it writes now.
        previous: Where it wrote before.
        checkpoint: What it resumes from: whoever moves a run's folder moves its checkpoints with it.

    Returns:
        The table, or ``None`` if there is none of this run.
    """
    around = [] if checkpoint is None else [folder / FILE_NAME for folder in Path(checkpoint).parents[:_LEVELS]]
    found = [candidate for candidate in (path, previous, *around) if candidate.is_file()]
    if own is None:
        return next(iter(found), None)
    return next((candidate for candidate in [*found, *_moved(found)] if first_row(candidate) == own), None)


def move_aside(path: Path) -> Path | None:
    """Move another run's table out of the way, into a ``version_N`` beside it.

    Args:
        path: Where a run is about to write.

    Returns:
        Where it is now; ``None`` if there was none, or one without a row.
    """
    if first_row(path) is None:
        return None
    moved = next(place for place in _versions(path) if not place.exists())
    moved.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(moved)


def _moved(paths: Iterable[Path]) -> Iterable[Path]:
    """Yield where tables are that :func:`move_aside` has moved."""
    for path in paths:
        for place in _versions(path):
            if not place.is_file():
                break
            yield place


def _versions(path: Path) -> Iterable[Path]:
    return (path.parent / f"version_{number}" / path.name for number in count())
