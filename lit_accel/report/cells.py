"""The report's tables as texts: the terminal and the page lay out the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_accel.compute.phases import Phase, saved_share
from lit_accel.compute.units import duration, with_prefix
from lit_accel.report.wording import DASH, interval, percent

if TYPE_CHECKING:
    from lit_accel.report.phases import RunPhases
    from lit_accel.report.results import Result
    from lit_accel.report.saving import Saving

SAVING_HEADINGS = ("arm", "seeds", "FLOPs", "time", "loss", "FLOPs saved", "time saved")
COST_HEADINGS = ("arm", "tokens", "counted: FLOPs ratio", "measured: time ratio", "realised share", "loss - dense")
PHASE_HEADINGS = ("phase", "parameters", "steps", "tokens", "FLOPs", "dense FLOPs", "saved", "time")


def saving_row(result: Result) -> tuple[str, ...]:
    """Write what was saved at equal loss; a cell's second line is its interval or the reason why there is none."""
    deviation = "" if result.loss_deviation is None else f"\n± {result.loss_deviation:.4f}"
    return (
        result.label,
        str(result.num_runs),
        with_prefix(result.in_flops.cost),
        duration(result.in_seconds.cost),
        f"{result.loss:.4f}{deviation}",
        _saved(result.in_flops),
        _saved(result.in_seconds),
    )


def cost_row(result: Result) -> tuple[str, ...]:
    """Write what was counted, what arrived, and the loss at equal tokens."""
    return (
        result.label,
        with_prefix(result.tokens),
        f"{result.flops_ratio:.3f}",
        DASH if result.time_ratio is None else f"{result.time_ratio:.3f}",
        DASH if result.realised_share is None else f"{result.realised_share:.0%}",
        DASH if result.loss_difference is None else f"{result.loss_difference:+.4f}",
    )


def phase_rows(run: RunPhases) -> Sequence[tuple[str, ...]]:
    """Write a run's phases, and their total last."""
    rows = [(str(index), with_prefix(phase.num_parameters), *_spent(phase)) for index, phase in enumerate(run.phases)]
    return [*rows, ("total", "", *_spent(run.total))]


def _saved(saving: Saving) -> str:
    if saving.share is None:
        return f"{DASH}\n{saving.reason}"
    return f"{percent(saving.share)}\n{interval(saving)}"


def _spent(phase: Phase) -> tuple[str, ...]:
    return (
        f"{phase.steps:,}",
        with_prefix(phase.tokens),
        with_prefix(phase.flops),
        with_prefix(phase.dense_flops),
        percent(saved_share(phase.flops, phase.dense_flops)),
        duration(phase.seconds),
    )
