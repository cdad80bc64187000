"""The PNG: held-out loss against FLOPs and against seconds, with the dense frontier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lit_accel.report.axes import COLOURS, DENSE_COLOUR, Axis, Look, frontier_line, horizontal, looks, vertical
from lit_accel.report.frontier import Frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lit_accel.report.arms import Arm
    from lit_accel.report.build import Report

_DASHES = {"solid": "-", "dash": "--", "dot": ":"}
_GREY, _GRID = "#808080", "#e3e3e3"
# More entries than this take a column of the legend more.
_LEGEND_ROWS = 6


def draw_picture(report: Report, path: Path) -> None:
    """Draw the curves.

    Args:
        report: The report.
        path: The PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.9), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for panel, frontier in ((left, report.in_flops), (right, report.in_seconds)):
        axis = horizontal(report.arms, frontier.cost)
        _draw_frontier(panel, frontier, axis)
        # The dense runs below the others.
        for order, (arm, look) in enumerate(zip(report.arms, looks(report.arms), strict=True)):
            _draw_arm(panel, arm, look, axis, order)
        _style(panel, axis)
    left.set_ylim(*vertical(report.arms))
    left.set_ylabel(report.metric)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), _LEGEND_ROWS),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle("Held-out loss against cost", x=0.008, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path)


def _draw_frontier(panel: Axes, frontier: Frontier, axis: Axis) -> None:
    if (line := frontier_line(frontier)) is None:
        return
    costs, losses, band = line
    if band is not None:
        panel.fill_between(costs / axis.divisor, *band, color=DENSE_COLOUR[0], alpha=0.18, linewidth=0, zorder=1)
    label = "dense frontier" + (" (95 %)" if band is not None else "")
    panel.plot(costs / axis.divisor, losses, color=DENSE_COLOUR[0], linewidth=2.2, label=label, zorder=2)


def _draw_arm(panel: Axes, arm: Arm, look: Look, axis: Axis, order: int) -> None:
    colour = (DENSE_COLOUR if look.colour is None else COLOURS[look.colour])[0]
    for run in arm.runs:
        panel.plot(
            getattr(run.ledger, axis.cost)[run.rows] / axis.divisor,
            run.ledger.metrics[run.metric][run.rows],
            color=colour,
            linestyle=_DASHES[look.dash],
            linewidth=0.9,
            alpha=0.55,
            zorder=3 + order,
        )
    panel.plot(
        [getattr(run, axis.cost) / axis.divisor for run in arm.runs],
        [run.loss for run in arm.runs],
        color=colour,
        linestyle="none",
        marker=look.marker[1],
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        label=f"{arm.label} (dense)" if arm.is_dense and arm.label != "dense" else arm.label,
        zorder=30 + order,
    )


def _style(panel: Axes, axis: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if axis.is_log:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.xaxis.set_major_locator(MaxNLocator(6))
    panel.set_xlim(*axis.range)
    panel.set_xlabel(axis.title)
    panel.grid(color=_GRID, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["bottom", "left"]].set_color(_GREY)
    panel.tick_params(color=_GREY, labelsize=9)
