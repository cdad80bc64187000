"""The log of finished runs, a line each; only ever appended to, but for hashes that the protocol names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LOG = Path(__file__).parent / "log.jsonl"
Row = dict[str, Any]


def read_log(path: Path | None = None) -> list[Row]:
    """Return the finished runs, oldest first.

    Args:
        path: The log, if it is not that of the study.

    Raises:
        ValueError: If the rows of a rung were trained on different data.
    """
    path = path or LOG
    if not path.exists():
        return []
    # A process that died while it wrote leaves a line without an end, whose run is made anew.
    rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    for rung in {row["rung"] for row in rows}:
        found = {row["data"] for row in rows if row["rung"] == rung}
        if len(found) > 1:
            raise ValueError(
                f"{path.name} has runs of {rung} on {len(found)} different data: {', '.join(sorted(found))}. The "
                "standard library differs between versions of Python; losses on different text cannot be compared."
            )
    return rows


def append(row: Row, path: Path | None = None) -> None:
    """Append a row in one write, on the disk when this returns.

    Args:
        row: The row.
        path: The log, if it is not that of the study.
    """
    handle = os.open(path or LOG, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        _cut_unfinished_line(handle)
        os.write(handle, (json.dumps(row) + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def _cut_unfinished_line(handle: int) -> None:
    size = os.fstat(handle).st_size
    tail = os.pread(handle, min(size, 1 << 16), max(0, size - (1 << 16)))
    if tail and not tail.endswith(b"\n"):
        os.ftruncate(handle, size - len(tail) + tail.rfind(b"\n") + 1)
