"""The report in a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_accel.report.cells import (
    COST_HEADINGS,
    PHASE_HEADINGS,
    SAVING_HEADINGS,
    cost_row,
    phase_rows,
    saving_row,
)
from lit_accel.report.wording import formula

if TYPE_CHECKING:
    from lit_accel.report.build import Report


def print_report(report: Report, console: Console) -> None:
    """Print a report.

    Args:
        report: The report.
        console: Where to.
    """
    for line in report.rests_on:
        console.print(Text(line))
    for name, frontier in (("FLOPs", report.in_flops), ("seconds", report.in_seconds)):
        console.print(Text.assemble((f"Dense frontier in {name}: ", "bold"), formula(frontier, report.metric)))
    if report.results:
        rows = [saving_row(result) for result in report.results]
        console.print(_table("Saved at equal loss", SAVING_HEADINGS, rows))
        rows = [cost_row(result) for result in report.results]
        console.print(_table("At equal tokens", COST_HEADINGS, rows))
        console.print(Text("Seconds compare only runs of one otherwise idle machine.", style="dim"))
    else:
        console.print(Text("Every run was taken as dense, so there is no method to compare with them."))
    for run in report.phases:
        console.print(_table(f"Phases of {run.name}", PHASE_HEADINGS, phase_rows(run)))
    for warning in report.warnings:
        console.print(Text.assemble(("Careful: ", "bold yellow"), warning))
    console.print(Text(f"Written: {report.page} and {report.picture}"))


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows:
        # As texts: a label in brackets is no markup.
        table.add_row(*(Text(cell) for cell in row))
    return table
