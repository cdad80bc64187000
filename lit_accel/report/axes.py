"""What both pictures show of the curves: units, scales and ranges, and what an arm looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_accel.compute.units import prefix_for, time_unit
from lit_accel.report.arms import Arm
from lit_accel.report.frontier import Frontier
from lit_accel.report.noise import Cost

# Okabe and Ito's palette, told apart with any colour vision: for a light ground, and lighter for a dark one.
# Their yellow and black are left out: one is too light for lines on white, the other is too near the dense runs' grey.
COLOURS = (
    ("#0072B2", "#5AAEE8"),
    ("#D55E00", "#F58A4B"),
    ("#009E73", "#35CFA2"),
    ("#B8558F", "#E79CC8"),
    ("#B87F00", "#F2B93B"),
    ("#3A9BCB", "#9AD4F5"),
)
DENSE_COLOUR = ("#5C5B57", "#B9B7AE")
_DASHES = ("solid", "dash", "dot")
# Names in plotly and in matplotlib.
_MARKERS = (("square", "s"), ("triangle-up", "^"), ("diamond", "D"), ("triangle-down", "v"), ("cross", "P"), ("x", "X"))
# Costs that span more than a decade are drawn on a logarithmic scale.
_DECADE = 10.0


@dataclass(frozen=True)
class Look:
    """How an arm is drawn.

    Args:
        colour: Index in :data:`COLOURS`, or ``None`` for the dense runs' grey.
        dash: Of its lines: ``solid``, ``dash`` or ``dot``.
        marker: Of its ends, by plotly's name and by matplotlib's.
    """

    colour: int | None
    dash: str
    marker: tuple[str, str]


@dataclass(frozen=True)
class Axis:
    """A horizontal axis.

    Args:
        cost: What it shows.
        title: With its unit.
        divisor: What FLOPs or seconds are divided by.
        is_log: Whether it is logarithmic.
        range: Its ends, in its unit.
    """

    cost: Cost
    title: str
    divisor: float
    is_log: bool
    range: tuple[float, float]


def looks(arms: Sequence[Arm]) -> list[Look]:
    """Choose how each arm is drawn."""
    chosen, index = [], 0
    for arm in arms:
        if arm.is_dense:
            chosen.append(Look(None, "solid", ("circle", "o")))
            continue
        # Where colours begin anew, lines are dashed and each colour gets another mark.
        lap = index // len(COLOURS)
        marker = _MARKERS[(index + lap) % len(_MARKERS)]
        chosen.append(Look(index % len(COLOURS), _DASHES[lap % len(_DASHES)], marker))
        index += 1
    return chosen


def horizontal(arms: Sequence[Arm], cost: Cost) -> Axis:
    """Choose the axis of a cost."""
    runs = [run for arm in arms for run in arm.runs]
    ends = [getattr(run, cost) for run in runs]
    largest, is_log = max(ends), max(ends) > _DECADE * min(ends)
    if cost == "flops":
        prefix, divisor = prefix_for(largest)
        title = f"training compute ({prefix}FLOPs)"
    else:
        unit, divisor = time_unit(largest)
        title = f"training time without validation ({unit})"
    # Logarithmic axes have no zero; what came long before the first end is of no interest.
    first = min(ends) / 4 if is_log else 0.0
    return Axis(cost, title, divisor, is_log, (first / divisor, largest * (1.15 if is_log else 1.04) / divisor))


def vertical(arms: Sequence[Arm]) -> tuple[float, float]:
    """Choose the range of losses: the ends fill most of it, the steep beginnings of the curves are cut."""
    runs = [run for arm in arms for run in arm.runs]
    ends = [run.loss for run in runs]
    begins = [float(run.ledger.metrics[run.metric][run.rows[0]]) for run in runs]
    first = max((loss for loss in begins if np.isfinite(loss)), default=max(ends))
    lowest, highest = min(ends), max(ends)
    top = max(highest + 0.6 * (highest - lowest), highest + 0.2 * max(first - highest, 0))
    top = top if top > lowest else lowest + 0.1 * abs(lowest) + 1e-6
    return lowest - 0.06 * (top - lowest), top


def frontier_line(frontier: Frontier) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray] | None] | None:
    """Return costs and losses of the fitted curve within the measured costs, and its band, or ``None`` if none."""
    if frontier.curve is None:
        return None
    log_costs = np.linspace(*frontier.log_costs, 80)
    return np.exp(log_costs), frontier.curve.loss(log_costs), frontier.band(log_costs)
