"""The pictures of the results: the frontier with the methods beside it, savings with intervals, and the tunings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MultipleLocator, NullLocator, PercentFormatter

from lit_accel.report.axes import COLOURS, DENSE_COLOUR
from lit_accel.report.saving import Saving
from scripts.bench.analysis import Evidence, Reading
from scripts.bench.study import DENSE, SMALLER_RATES

_GREY, _PALE, _GRID = "#808080", "#c8c8c8", "#e3e3e3"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Of the tunings' axis, in nats above the best trial.
_TOP = 0.3
# Characters of a title of theirs in a line.
_TITLE_WIDTH = 34
# What a saving's axis shows; what lies beyond is an arrow at its edge.
_LEAST, _MOST, _EDGE = -0.6, 0.9, 0.02


def draw(evidence: Evidence, folder: Path) -> list[Path]:
    """Draw what there is, and return the files.

    Args:
        evidence: What the log says.
        folder: Where they go.
    """
    name = evidence.rung.name
    drawn = []
    if evidence.in_flops.curve is not None:
        drawn.append(_save(_frontier(evidence), folder / f"{name}_frontier.png"))
        if evidence.readings:
            drawn.append(_save(_savings(evidence), folder / f"{name}_savings.png"))
    drawn.append(_save(_tunings(evidence), folder / f"{name}_tuning.png"))
    return drawn


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _frontier(evidence: Evidence) -> Figure:
    figure = Figure(figsize=(10, 5.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    frontier = evidence.in_flops
    low, high = frontier.log_costs
    log_costs = np.linspace(low, high, 200)
    assert frontier.curve is not None
    if (band := frontier.band(log_costs)) is not None:
        axes.fill_between(np.exp(log_costs), *band, color=DENSE_COLOUR[0], alpha=0.18, linewidth=0)
    axes.plot(np.exp(log_costs), frontier.curve.loss(log_costs), color=DENSE_COLOUR[0], label="dense frontier (95 %)")
    outside = [ends for budget, ends in evidence.dense.items() if budget not in evidence.rung.fitted_budgets]
    for ends in [*outside, *(ends for _, _, ends in evidence.fitted)]:
        axes.plot(
            [end.flops for end in ends], [end.loss for end in ends], "o", color=DENSE_COLOUR[0], ms=5, mec="white"
        )
    if controls := evidence.smaller_models:
        axes.plot(
            [fmean(end.flops for end in reading.ends) for reading in controls],
            [reading.loss[0] for reading in controls],
            "D",
            ms=6,
            mfc="none",
            mec=DENSE_COLOUR[0],
            label="dense models with fewer blocks",
        )
    for number, arm in enumerate(arm for arm in evidence.study.others if evidence.of(arm.name)):
        readings = evidence.of(arm.name)
        axes.errorbar(
            [fmean(end.flops for end in reading.ends) for reading in readings],
            [reading.loss[0] for reading in readings],
            yerr=[reading.loss[1] for reading in readings],
            fmt=_MARKERS[number % len(_MARKERS)],
            ms=7,
            mec="white",
            elinewidth=1,
            color=COLOURS[number % len(COLOURS)][0],
            label=arm.title,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e12:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training cost, TFLOPs")
    axes.set_ylabel("held-out loss of the full model, nats")
    _style(axes)
    _title(figure, f"Where runs end, and what they cost\n{evidence.rung.title}")
    figure.legend(loc="outside right center", frameon=False, fontsize=8.5)
    return figure


def _savings(evidence: Evidence) -> Figure:
    rows = _by_title([*evidence.readings, *evidence.smaller_models])
    figure = Figure(figsize=(10, 1.6 + 0.36 * len(rows)), dpi=150, layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for panel, cost in zip(panels, ("FLOPs", "seconds"), strict=True):
        panel.axvline(0, color=_GREY, linewidth=1)
        for number, readings in enumerate(rows.values()):
            for reading in readings:
                _interval(panel, number, reading, reading.in_flops if cost == "FLOPs" else reading.in_seconds, evidence)
        panel.set_xlim(_LEAST, _MOST)
        panel.xaxis.set_major_locator(MultipleLocator(0.2))
        panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.set_xlabel(f"{cost} saved at equal loss (95 %)")
        _style(panel)
    panels[0].set_yticks(range(len(rows)), list(rows))
    panels[0].invert_yaxis()
    run = {reading.budget for reading in evidence.readings}
    for number, budget in enumerate(budget for budget in evidence.rung.budgets if budget in run):
        panels[0].plot([], [], _MARKERS[number], color=COLOURS[number][0], label=f"budget x{budget:g}")
    panels[0].plot([], [], "o", mfc="white", mec=_GREY, label="loses to B1 or B2")
    panels[0].plot([], [], "o", color=_PALE, label="not compared with B1 and B2")
    panels[1].plot([], [], "o", color=_GREY, label="a smaller dense model, no method")
    panels[1].plot([], [], "<", color=_GREY, label="beyond the axis, or worse than all dense runs")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _title(figure, f"Saved against tuned dense training\n{evidence.rung.title}")
    return figure


def _by_title(readings: Sequence[Reading]) -> dict[str, list[Reading]]:
    """Group readings of an arm, which may have been run at several budgets; in the order of the registry."""
    found: dict[str, list[Reading]] = {}
    for reading in readings:
        found.setdefault(reading.arm.title, []).append(reading)
    return found


def _interval(panel: Axes, row: int, reading: Reading, saving: Saving, evidence: Evidence) -> None:
    order = evidence.rung.budgets.index(reading.budget)
    height = row + 0.24 * (order - (len(evidence.rung.budgets) - 1) / 2)
    colour = _GREY if reading.arm.lr_of == SMALLER_RATES else COLOURS[order][0]
    share, low, high = saving.share, saving.low, saving.high
    if share is None:
        share = {"worse": -np.inf, "better": np.inf, None: np.nan}[saving.outside]
    if low is not None and high is not None:
        ends = np.clip([low, high], _LEAST, _MOST)
        panel.plot(ends, [height, height], color=colour, linewidth=2, solid_capstyle="butt")
    marker = "<" if share < _LEAST else ">" if share > _MOST else _MARKERS[order]
    # Whoever looks at the savings alone must see which of them a dense model makes, too.
    is_open = reading.arm.role == "method" and (reading.b1 is None or reading.b2 is None)
    face, edge = (_PALE, "white") if is_open else ("white", colour) if reading.loses_to_a_control else (colour, "white")
    panel.plot(np.clip(share, _LEAST + _EDGE, _MOST - _EDGE), height, marker, mfc=face, mec=edge, ms=6.5)


def _tunings(evidence: Evidence) -> Figure:
    found: list[tuple[str, dict[float, float]]] = []
    for arm in (DENSE, *evidence.study.others, evidence.study.smaller_tuned):
        trials = [(budget, evidence.study.trials(arm, budget)) for budget in evidence.rung.tuned_budgets]
        found += [(f"{arm.title}, x{budget:g}", losses) for budget, losses in trials if losses]
    columns = 5
    rows = max(1, -(-len(found) // columns))
    figure = Figure(figsize=(11, 0.6 + 1.75 * rows), dpi=150, layout="constrained")
    panels: Any = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for panel, (title, losses) in zip(panels.flat, found, strict=False):
        rates = sorted(losses)
        best = min(losses.values())
        above = np.array([losses[rate] - best for rate in rates])
        panel.plot(rates, above, "o-", color=COLOURS[0][0], ms=4, linewidth=1.2)
        beyond = above > _TOP
        panel.plot(np.array(rates)[beyond], np.full(beyond.sum(), 0.95 * _TOP), "^", color=COLOURS[1][0], ms=6)
        panel.set_xscale("log")
        panel.set_ylim(-0.02, _TOP)
        panel.xaxis.set_major_locator(FixedLocator(evidence.rung.grid))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1000 * value:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title(fill(title, _TITLE_WIDTH), fontsize=7)
        _style(panel)
    for number in range(len(found), panels.size):
        panels.flat[number].set_visible(False)
        # What is above it is the lowest of its column.
        panels.flat[number - columns].tick_params(labelbottom=True)
    figure.supxlabel("learning rate, thousandths", fontsize=9)
    figure.supylabel("nats above the best trial", fontsize=9)
    _title(figure, "Trials of the learning rate (arrows: beyond the axis)")
    return figure


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.008, ha="left", fontsize=12, fontweight="bold")


def _style(axes: Axes) -> None:
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_GREY)
    axes.tick_params(color=_GREY, labelsize=8.5)
