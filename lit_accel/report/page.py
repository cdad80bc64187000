"""The HTML page: one file that loads nothing, with the figure, the tables and how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np

from lit_accel.report.axes import COLOURS, DENSE_COLOUR, looks
from lit_accel.report.cells import (
    COST_HEADINGS,
    PHASE_HEADINGS,
    SAVING_HEADINGS,
    cost_row,
    phase_rows,
    saving_row,
)
from lit_accel.report.figure import DIV_ID, figure_html
from lit_accel.report.frontier import amount
from lit_accel.report.wording import DASH, HOW_TO_READ, formula, interval, percent

if TYPE_CHECKING:
    from lit_accel.report.build import Report
    from lit_accel.report.results import Result
    from lit_accel.report.saving import Saving


def write_page(report: Report, path: Path) -> None:
    """Write the page.

    Args:
        report: The report.
        path: The HTML file.
    """
    template = Template(files("lit_accel.report").joinpath("page.html").read_text(encoding="utf-8"))
    num_runs = sum(len(arm.runs) for arm in report.arms)
    sections = [_dense(report)]
    if report.results:
        sections += [_savings(report), _costs(report)]
    if report.phases:
        sections.append(_phases(report))
    sections.append(_how_to_read())
    page = template.substitute(
        title="What training cost, and what was saved",
        subtitle=f"{num_runs} runs in {len(report.arms)} arms, by {escape(report.metric)}",
        colours=" ".join(_colours()),
        tiles=_tiles(report),
        warnings=_warnings(report),
        figure=figure_html(report),
        sections="\n".join(sections),
        div_id=DIV_ID,
    )
    path.write_text(page, encoding="utf-8")


def _colours() -> list[str]:
    named = {"dense": DENSE_COLOUR, **{f"arm-{index}": pair for index, pair in enumerate(COLOURS)}}
    return [f"--{name}: light-dark({light}, {dark});" for name, (light, dark) in named.items()]


def _tiles(report: Report) -> str:
    colour_of = {arm.label: look.colour for arm, look in zip(report.arms, looks(report.arms), strict=True)}
    tiles = [_tile(result, f"var(--arm-{colour_of[result.label]})") for result in report.results]
    return f'<section class="tiles">{"".join(tiles)}</section>' if tiles else ""


def _tile(result: Result, colour: str) -> str:
    return (
        f'<article class="tile" style="--colour: {colour}"><h3>{escape(result.label)} '
        f'<span class="soft">{amount(result.in_flops.cost, "flops")}</span></h3><div class="pair">'
        f"{_number(result.in_flops, 'FLOPs')}{_number(result.in_seconds, 'time')}</div></article>"
    )


def _number(saving: Saving, unit: str) -> str:
    if saving.share is None:
        return f'<div><div class="number">{DASH}</div><small>{unit}: {escape(saving.reason or "")}</small></div>'
    low, high = saving.low, saving.high
    spread = interval(saving) if low is None else f"95 %: {interval(saving)}"
    # Coloured only where the interval leaves zero on one side.
    verdict = "good" if low is not None and low > 0 else "bad" if high is not None and high < 0 else ""
    return (
        f'<div><div class="number {verdict}">{percent(saving.share)}</div>'
        f"<small>{unit} saved at equal loss</small><small>{escape(spread)}</small></div>"
    )


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    return f'<section class="warnings"><b>Be careful</b><ul>{items}</ul></section>'


def _dense(report: Report) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in report.rests_on)
    formulas = "".join(
        f"<p>In {name}: <code>{escape(formula(frontier, report.metric))}</code></p>"
        for name, frontier in (("FLOPs", report.in_flops), ("seconds", report.in_seconds))
    )
    return f"<h2>What the numbers rest on</h2>{lines}{formulas}"


def _savings(report: Report) -> str:
    rows = [
        (*row, f"{cell_flops}{_draws(result.in_flops)}", f"{cell_time}{_draws(result.in_seconds)}")
        for result in report.results
        for *row, cell_flops, cell_time in [saving_row(result)]
    ]
    return f"<h2>Saved at equal loss</h2>{_table(SAVING_HEADINGS, rows)}"


def _draws(saving: Saving) -> str:
    if saving.median is None:
        return ""
    median = percent(saving.median) if np.isfinite(saving.median) else "outside"
    return f"\nmedian {median}; {percent(saving.share_outside)} of the draws outside\n{saving.interval}"


def _costs(report: Report) -> str:
    return (
        "<h2>What arrived of the counted saving, and the loss at equal tokens</h2>"
        '<p class="soft">Seconds compare only runs of one otherwise idle machine.</p>'
        f"{_table(COST_HEADINGS, [cost_row(result) for result in report.results])}"
    )


def _phases(report: Report) -> str:
    tables = "".join(
        f"<details><summary>{escape(run.name)}</summary>{_table(PHASE_HEADINGS, phase_rows(run), 'phases')}</details>"
        for run in report.phases
    )
    return f"<h2>Phases</h2>{tables}"


def _how_to_read() -> str:
    entries = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in HOW_TO_READ)
    return f"<h2>How to read this</h2><dl>{entries}</dl>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="table"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    first, *rest = text.split("\n")
    return escape(first) + "".join(f"<small>{escape(line)}</small>" for line in rest)
