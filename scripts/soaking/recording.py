"""The result file of the soak: a line a kill, and what all of them come to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.provenance import provenance
from scripts.soaking.attempts import Attempt
from scripts.soaking.comparing import PARTS

RESULT = Path(__file__).parents[1] / "results" / "soak.jsonl"
Record = dict[str, Any]


def origin() -> Record:
    """Return what was soaked: the commit, ``-dirty`` where the sources differ from it, and versions."""
    found = provenance()
    return {"commit": found["commit"], "versions": found["versions"]}


def records_of(attempt: Attempt, name: str, seed: int) -> list[Record]:
    """Return a record for each kill of an attempt.

    Args:
        attempt: The attempt.
        name: What it is called.
        seed: Of its draws.
    """
    comparison = attempt.comparison
    verdicts = dict.fromkeys(PARTS) if comparison is None else comparison.verdicts()
    return [
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempt": name,
            "seed": seed,
            "case": attempt.case.name,
            "methods": list(attempt.case.titles),
            "ranks": attempt.case.ranks,
            "strategy": attempt.case.how,
            "kind": "rank" if fate.death.alone else fate.death.kind,
            "point": f"{fate.death.kind} {fate.death.point}".strip(),
            "died_at": fate.step,
            "saved_at": fate.saved_step,
            "resumed_at": fate.resumed_at,
            "equal": comparison is not None and comparison.is_equal,
            **{f"{part}_equal": verdict for part, verdict in verdicts.items()},
            "lost": fate.lost,
            "broken": attempt.broken,
            "hung": fate.hung,
            "seconds_alone": fate.seconds_alone,
            # Lightning writes a checkpoint before it logs that step's last rows.
            "unlogged_rows": 0 if comparison is None else len(comparison.unlogged.get(fate.resumed_at or 0, [])),
            "temporary_files": attempt.temporary_files,
        }
        for fate in attempt.fates
    ]


def append(records: Iterable[Record], path: Path = RESULT) -> None:
    """Append records to the result file."""
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read(path: Path = RESULT) -> list[Record]:
    """Return the records of the result file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def is_bad(record: Record) -> bool:
    """Whether a kill has done harm."""
    return bool(not record["equal"] or record["lost"] or record["hung"])


def show(records: list[Record], console: Console) -> None:
    """Print how many kills there were, and what came of them, by kind and by method."""
    _show_by("by moment", records, lambda record: [record["kind"]], console)
    _show_by("by method", records, lambda record: record["methods"], console)
    _show_by("by processes", records, lambda record: [f"{record['ranks']}, {record['strategy']}"], console)
    alone = [record["seconds_alone"] for record in records if record["seconds_alone"] is not None]
    if alone:
        console.print(f"A rank that was left alone ended after {max(alone):.1f} s at most ({len(alone)} times).")
    moments = Counter(record["point"] for record in records)
    console.print(", ".join(f"{point} {number}" for point, number in sorted(moments.items())))


def _show_by(title: str, records: list[Record], keys: Callable[[Record], list[str]], console: Console) -> None:
    table = Table(title=f"Kills {title}", title_justify="left", title_style="bold")
    for heading in ("", "kills", "bitwise equal", "differ", "lost", "hung", "rows unlogged"):
        table.add_column(heading, justify="left" if not heading else "right")
    groups: dict[str, list[Record]] = {}
    for record in records:
        for key in keys(record):
            groups.setdefault(key, []).append(record)
    for name, group in [*sorted(groups.items()), ("all", records)]:
        counts = (
            len(group),
            sum(record["equal"] for record in group),
            sum(not record["equal"] for record in group),
            sum(bool(record["lost"]) for record in group),
            sum(record["hung"] for record in group),
            sum(bool(record["unlogged_rows"]) for record in group),
        )
        table.add_row(name, *map(str, counts), style="bold" if name == "all" else None)
    console.print(table)
