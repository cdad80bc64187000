"""Draw what runs of published models cost in FLOPs and in seconds: docs/results/models.png."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lit_accel.report.axes import COLOURS
from scripts.measure_models import ARMS, DENSE, measured, read_rows

PICTURE = Path(__file__).parents[1] / "docs" / "results" / "models.png"
_COLUMNS = 3
_GREY, _GRID = "#808080", "#e3e3e3"
_FLOPS, _SECONDS = COLOURS[0][0], COLOURS[1][0]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel a model and device.

    Args:
        rows: The rounds that were measured.
        path: The picture.
    """
    panels = measured(rows)
    methods = [arm for arm in ARMS if arm != DENSE]
    columns = min(len(panels), _COLUMNS)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2.6 + 3.4 * columns, 0.6 + 4 * lines), dpi=150, layout="constrained")
    all_axes = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for unused in all_axes[len(panels) :]:
        unused.set_axis_off()
    for axes, ((model, device), of_panel) in zip(all_axes, panels.items(), strict=False):
        rounds = [row["arms"] for row in of_panel]
        for place, arm in enumerate(methods):
            flops = statistics.mean(arms[arm]["flops"] / arms[arm]["dense_flops"] for arms in rounds)
            ratios = [arms[arm]["seconds"] / arms[DENSE]["seconds"] for arms in rounds]
            seconds = statistics.median(ratios)
            axes.plot([flops, seconds], [place, place], color=_GREY, linewidth=1, zorder=1)
            axes.plot([min(ratios), max(ratios)], [place, place], color=_SECONDS, linewidth=3, alpha=0.4, zorder=2)
            axes.plot(flops, place, "o", color=_FLOPS, markerfacecolor="white", markeredgewidth=1.6, zorder=3)
            axes.plot(seconds, place, "o", color=_SECONDS, zorder=3)
        axes.axvline(1, color=_GREY, linewidth=1)
        axes.set_title(f"{model}\n", fontsize=10, loc="left")
        axes.text(0, 1.02, device, transform=axes.transAxes, fontsize=7.5, color=_GREY)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="x", color=_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("of a dense run")
    handles = [
        axes.plot([], [], "o", color=_FLOPS, markerfacecolor="white", markeredgewidth=1.6, label="FLOPs, counted")[0],
        axes.plot([], [], "o", color=_SECONDS, label="seconds, measured")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    draw(read_rows(), PICTURE)
