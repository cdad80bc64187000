"""The page's interactive figure: two linked panels, in which a click on an arm's name hides all of its runs."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_accel.compute.units import with_prefix
from lit_accel.report.axes import Axis, Look, frontier_line, horizontal, looks, vertical
from lit_accel.report.frontier import Frontier, amount
from lit_accel.report.wording import run_name

if TYPE_CHECKING:
    from lit_accel.report.arms import Arm
    from lit_accel.report.build import Report
    from lit_accel.report.runs import Run

DIV_ID = "curves"
_BUTTONS = ["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]


def figure_html(report: Report) -> str:
    """Return the figure as HTML that needs nothing from anywhere.

    Colours are not in it: each trace says in ``meta`` which of the page's CSS colours it has, and the page's script
    sets them, so that they follow the reader's light or dark mode.

    Args:
        report: The report.
    """
    import plotly.graph_objects as go
    from plotly.io import to_html

    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.03, "yanchor": "bottom", "groupclick": "togglegroup"},
        "margin": {"l": 60, "r": 52, "t": 16, "b": 52},
        "modebar": {"orientation": "v"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
    }
    low, high = vertical(report.arms)
    for number, frontier in (("", report.in_flops), ("2", report.in_seconds)):
        axis = horizontal(report.arms, frontier.cost)
        layout[f"xaxis{number}"] = _x_axis(axis, number)
        layout[f"yaxis{number}"] = {"range": [low, high], "anchor": f"x{number}", "zeroline": False}
        panel = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        is_first = number == ""
        traces += [{**trace, **panel} for trace in _frontier_traces(frontier, axis, is_first)]
        for arm, look in zip(report.arms, looks(report.arms), strict=True):
            traces += [{**trace, **panel} for trace in _arm_traces(arm, look, axis, is_first)]
    layout["yaxis"]["title"] = {"text": escape(report.metric)}
    layout["yaxis2"]["matches"] = "y"
    return to_html(
        go.Figure(data=traces, layout=layout),
        include_plotlyjs=True,
        full_html=False,
        div_id=DIV_ID,
        # Only these buttons: one of plotly's own would send the chart to a server.
        config={"displaylogo": False, "responsive": True, "showSendToCloud": False, "modeBarButtons": [_BUTTONS]},
    )


def _x_axis(axis: Axis, number: str) -> dict[str, Any]:
    scale: dict[str, Any] = {"type": "linear", "range": list(axis.range)}
    if axis.is_log:
        scale = {"type": "log", "range": list(np.log10(axis.range)), "dtick": "D2", "tickformat": "~g"}
    return {**scale, "title": {"text": axis.title}, "anchor": f"y{number}", "zeroline": False}


def _frontier_traces(frontier: Frontier, axis: Axis, is_first: bool) -> list[dict[str, Any]]:
    if (line := frontier_line(frontier)) is None:
        return []
    costs, losses, band = line
    x = (costs / axis.divisor).tolist()
    common = {"legendgroup": "frontier", "mode": "lines"}
    traces: list[dict[str, Any]] = []
    if band is not None:
        traces.append(
            {
                **common,
                "x": x + x[::-1],
                "y": [*band[0].tolist(), *band[1][::-1].tolist()],
                "fill": "toself",
                "line": {"width": 0},
                "hoverinfo": "skip",
                "showlegend": False,
                "meta": {"colour": "dense", "isBand": True},
            }
        )
    texts = [
        f"<b>dense frontier</b><br>{amount(cost, frontier.cost)}<br>loss {loss:.4f}"
        + ("" if band is None else f" (95 %: {band[0][index]:.4f} to {band[1][index]:.4f})")
        for index, (cost, loss) in enumerate(zip(costs, losses, strict=True))
    ]
    traces.append(
        {
            **common,
            "x": x,
            "y": losses.tolist(),
            "name": "dense frontier" + (" (95 %)" if band is not None else ""),
            "line": {"width": 3},
            "text": texts,
            "hovertemplate": "%{text}<extra></extra>",
            "showlegend": is_first,
            "meta": {"colour": "dense"},
        }
    )
    return traces


def _arm_traces(arm: Arm, look: Look, axis: Axis, is_first: bool) -> list[dict[str, Any]]:
    group = f"arm {arm.label}"
    name = escape(f"{arm.label} (dense)" if arm.is_dense and arm.label != "dense" else arm.label)
    colour = "dense" if look.colour is None else f"arm-{look.colour}"
    common = {"legendgroup": group, "hovertemplate": "%{text}<extra></extra>", "meta": {"colour": colour}}
    lines = [
        {
            **common,
            "mode": "lines",
            "x": (getattr(run.ledger, axis.cost)[run.rows] / axis.divisor).tolist(),
            "y": run.ledger.metrics[run.metric][run.rows].tolist(),
            "text": [_hover(run, int(row)) for row in run.rows],
            "line": {"width": 1.2, "dash": look.dash},
            "opacity": 0.6,
            "showlegend": False,
        }
        for run in arm.runs
    ]
    ends = {
        **common,
        "mode": "markers",
        "name": name,
        "x": [getattr(run, axis.cost) / axis.divisor for run in arm.runs],
        "y": [run.loss for run in arm.runs],
        "text": [_hover(run, int(run.rows[-1])) for run in arm.runs],
        "marker": {"size": 10, "symbol": look.marker[0], "line": {"width": 1}},
        "showlegend": is_first,
    }
    return [*lines, ends]


def _hover(run: Run, row: int) -> str:
    ledger = run.ledger
    return (
        f"<b>{escape(run_name(run))}</b><br>loss {ledger.metrics[run.metric][row]:.4f}<br>step {ledger.step[row]:,}<br>"
        f"{with_prefix(float(ledger.tokens[row]))} tokens<br>{amount(float(ledger.flops[row]), 'flops')}<br>"
        f"{amount(float(ledger.seconds[row]), 'seconds')}"
    )
