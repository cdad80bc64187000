"""Reading ledgers of finished runs: how much compute a method saved at equal quality, and the figure that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_accel.compute.table import Ledger, read_ledger
from lit_accel.compute.units import prefix_for, time_unit, with_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EqualLossSaving", "Ledger", "plot_report", "read_ledger", "saving_at_equal_loss"]


@dataclass(frozen=True)
class EqualLossSaving:
    """What two runs spent to reach one loss.

    Args:
        loss: The last held-out loss of the method's run.
        method_flops: FLOPs that the method's run had spent by then.
        method_seconds: Its seconds.
        dense_flops: FLOPs at which the dense run reached that loss; ``None`` if this cannot be said.
        dense_seconds: Seconds at which the dense run reached it, or ``None``.
        reason: Why it cannot be said, or ``None``.
    """

    loss: float
    method_flops: float
    method_seconds: float
    dense_flops: float | None
    dense_seconds: float | None
    reason: str | None

    @property
    def flops_saved(self) -> float | None:
        """The share of the dense run's FLOPs that was saved; negative if the method cost more."""
        return None if self.dense_flops is None else 1 - self.method_flops / self.dense_flops

    @property
    def seconds_saved(self) -> float | None:
        """The share of the dense run's seconds that was saved; negative if the method took longer."""
        return None if self.dense_seconds is None else 1 - self.method_seconds / self.dense_seconds


def saving_at_equal_loss(dense: Ledger, method: Ledger, metric: str = "val/loss") -> EqualLossSaving:
    """Compare what a method and dense training spent to reach the method's final held-out loss.

    The dense run's cost is read off its own curve where it first reaches that loss, by linear interpolation between
    two measurements; outside of what was measured nothing is said.

    The result is an upper bound of the saving and no claim. The dense run passes this loss in the middle of its
    learning-rate schedule, where the loss is higher than at the end of a schedule that was made for that budget. A
    dense run with a decay completed at the smaller budget would reach it sooner. To claim a saving, train dense
    runs at several budgets, each with its own completed decay, and compare with the curve through their ends.

    Args:
        dense: The ledger of the dense run.
        method: The ledger of the method's run.
        metric: A monitored metric that is better when lower.

    Returns:
        Both costs; the dense ones are ``None``, with a reason, where the loss lies outside of the measured range.

    Raises:
        KeyError: If a ledger lacks the metric.
        ValueError: If the method's run never measured it.
    """
    measured = method.measured(metric)
    if not len(measured):
        raise ValueError(f"The method's run has no measurement of {metric!r}.")
    last = measured[-1]
    target = float(method.metrics[metric][last])
    flops, seconds, reason = _first_reach(dense, metric, target)
    return EqualLossSaving(
        loss=target,
        method_flops=float(method.flops[last]),
        method_seconds=float(method.seconds[last]),
        dense_flops=flops,
        dense_seconds=seconds,
        reason=reason,
    )


def _first_reach(ledger: Ledger, metric: str, target: float) -> tuple[float | None, float | None, str | None]:
    rows = ledger.measured(metric)
    values = ledger.metrics[metric][rows]
    reached = np.flatnonzero(values <= target)
    if not len(reached):
        best = f"{values.min():.4g}" if len(values) else "no measurement"
        return None, None, f"The dense run never reached {metric} = {target:.4g}; its best is {best}."
    after = reached[0]
    if after == 0 and values[0] < target:
        return (
            None,
            None,
            f"The dense run was below {metric} = {target:.4g} at its first measurement ({values[0]:.4g}); measure "
            "earlier and more often.",
        )
    before = max(after - 1, 0)
    drop = values[before] - values[after]
    weight = (values[before] - target) / drop if drop else 0.0
    flops, seconds = (
        float(column[rows[before]] + weight * (column[rows[after]] - column[rows[before]]))
        for column in (ledger.flops, ledger.seconds)
    )
    return flops, seconds, None


# Okabe and Ito's palette without its yellow, which is too light for lines on white: told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# In shares of a panel's height and width.
_RIBBON, _RIBBON_GAP, _CHARACTER = 0.05, 0.012, 0.014


def plot_report(
    ledgers: Mapping[str, str | Path],
    output_png: str | Path,
    metric: str = "val/loss",
    title: str = "Held-out loss against what it cost",
) -> None:
    """Draw a held-out metric against FLOPs and against seconds, one line a run.

    Above the panels a ribbon for each run whose model changed its size shows its phases, with their parameter counts.
    If there is only one such run, its phases are shaded in the panels too.

    Args:
        ledgers: A ledger's file, or the folder of its run, by the label of the run.
        output_png: Where to write the figure.
        metric: A monitored metric.
        title: The figure's title.

    Raises:
        KeyError: If a ledger lacks the metric.
        ValueError: If no ledger is given, or one is empty.
    """
    # Here, because a training process has no use for it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not ledgers:
        raise ValueError("There is nothing to draw: no ledger was given.")
    runs = {label: read_ledger(path) for label, path in ledgers.items()}
    if empty := [label for label, run in runs.items() if not len(run.measured(metric))]:
        raise ValueError(f"There is nothing to draw: {', '.join(empty)} has no measurement of {metric!r}.")
    colours = {label: _COLOURS[index % len(_COLOURS)] for index, label in enumerate(runs)}
    resized = [label for label, run in runs.items() if run.phase.min() < run.phase.max()]
    flops_prefix, flops_divisor = prefix_for(max(run.flops[-1] for run in runs.values()))
    unit, time_divisor = time_unit(max(run.seconds[-1] for run in runs.values()))

    figure = Figure(figsize=(11, 4.8), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for panel, column, divisor in ((left, "flops", flops_divisor), (right, "seconds", time_divisor)):
        for index, (label, run) in enumerate(runs.items()):
            rows = run.measured(metric)
            panel.plot(
                getattr(run, column)[rows] / divisor,
                run.metrics[metric][rows],
                color=colours[label],
                marker=_MARKERS[index % len(_MARKERS)],
                markevery=max(1, len(rows) // 20),
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.6,
                linewidth=1.8,
                label=label,
                zorder=3,
            )
        panel.set_xlim(0, 1.04 * max(getattr(run, column)[-1] for run in runs.values()) / divisor)
        for lane, label in enumerate(reversed(resized)):
            bottom = 1 + _RIBBON_GAP + lane * (_RIBBON + _RIBBON_GAP)
            _draw_phases(
                panel, runs[label], getattr(runs[label], column) / divisor, colours[label], bottom, len(resized) == 1
            )
        panel.xaxis.set_major_locator(MaxNLocator(6))
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["bottom", "left"]].set_color("#808080")
        panel.tick_params(color="#808080", labelsize=9)
    left.set_xlabel(f"training compute ({flops_prefix}FLOPs)")
    right.set_xlabel(f"training time without validation ({unit})")
    left.set_ylabel(metric)
    right.legend(framealpha=0.9, edgecolor="none", fontsize=9, loc="upper right")
    figure.suptitle(title, x=0.008, ha="left", fontsize=13, fontweight="bold")
    left.set_title(
        "Ribbons: parameters of the model in each phase." if resized else "Lower and further left is better.",
        loc="left",
        x=0.0,
        y=1 + _RIBBON_GAP + len(resized) * (_RIBBON + _RIBBON_GAP),
        fontsize=9,
        color="#606060",
    )
    output_png = Path(output_png)
    output_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_png)


def _draw_phases(panel: Axes, run: Ledger, costs: np.ndarray, colour: str, bottom: float, shade: bool) -> None:
    """Draw a run's ribbon above a panel: the smaller the model, the stronger its colour."""
    begin, num_full = 0.0, run.num_parameters.max()
    for phase in np.unique(run.phase):
        rows = np.flatnonzero(run.phase == phase)
        end, num_parameters = float(costs[rows[-1]]), run.num_parameters[rows[-1]]
        alpha = 0.15 + 0.45 * (1 - num_parameters / num_full)
        panel.axvspan(
            begin,
            end,
            bottom,
            bottom + _RIBBON,
            facecolor=colour,
            alpha=alpha,
            edgecolor="white",
            linewidth=1,
            clip_on=False,
        )
        if shade:
            panel.axvspan(begin, end, facecolor=colour, alpha=alpha / 4, linewidth=0, zorder=0)
        text = with_prefix(num_parameters)
        if len(text) * _CHARACTER * panel.get_xlim()[1] < end - begin:
            panel.text(
                (begin + end) / 2,
                bottom + _RIBBON / 2,
                text,
                transform=panel.get_xaxis_transform(),
                ha="center",
                va="center_baseline",
                fontsize=7.5,
            )
        begin = end
