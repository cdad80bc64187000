"""The tables that a person reads before a run."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_accel.compute.phases import saved_share
from lit_accel.compute.units import duration, prefix_for, with_prefix
from lit_accel.planning.forecast import Forecast, PhaseMemory

_GIB = 2**30


def forecast_tables(forecast: Forecast) -> RenderableType:
    """Lay out a forecast.

    Args:
        forecast: What a run will be like.

    Returns:
        What :class:`rich.console.Console` prints within 80 columns.
    """
    return Group(*_parts(forecast))


def _parts(forecast: Forecast) -> Iterator[RenderableType]:
    work, plan = forecast.workload, forecast.plan
    yield Text(
        f"{plan.num_steps:,} optimizer steps of {work.num_micro_batches:,} x {work.num_sequences:,} sequences of "
        f"{work.num_tokens:,} tokens ({with_prefix(work.tokens)} tokens a step, "
        f"{with_prefix(work.tokens * plan.num_steps)} in all)"
    )
    yield Text()
    yield _phases(forecast)
    yield _methods(forecast)
    notes = ["FLOPs: forward and backward, 2 a multiply-add; dense: those of the full model on the same batches."]
    if forecast.is_expectation:
        notes.append("Which blocks run depends on measurements or draws: their FLOPs are an expectation.")
    notes.append(
        "GiB: memory of a process that holds the whole model: weights, gradients, optimizer and activations "
        "(activ.). What is needed for a moment only, and the loss, come on top."
    )
    if any(memory.optimizer is None for memory in forecast.memory):
        notes.append("≥: without what the optimizer keeps, whose kind is not known.")
    if any(memory.activations is None for memory in forecast.memory):
        notes.append("≥, ?: activations are not known.")
    if forecast.seconds is None:
        notes.append("Seconds need --calibrate true.")
    yield Text(" ".join(notes), style="dim")
    for warning in forecast.warnings:
        yield Text()
        yield Text(f"Warning: {warning}", style="yellow")


def _phases(forecast: Forecast) -> Table:
    plan = forecast.plan
    prefix, divisor = prefix_for(plan.dense_flops)
    table = Table(title="Phases", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    headings = ["from step", "parameters", "steps", f"{prefix}FLOPs", "of dense", "GiB", "activ."]
    for heading in [*headings, *(["time"] if forecast.seconds else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    for index, (phase, memory) in enumerate(zip(plan.phases, forecast.memory, strict=True)):
        table.add_row(
            f"{phase.start:,}",
            with_prefix(phase.num_parameters),
            f"{phase.steps:,}",
            f"{phase.flops / divisor:.3f}",
            f"{1 - saved_share(phase.flops, phase.dense_flops):.1%}",
            _gib(memory),
            "?" if memory.activations is None else f"{memory.activations / _GIB:.3g}",
            *([duration(forecast.seconds[index])] if forecast.seconds else []),
        )
    table.add_section()
    table.add_row(
        "run",
        "",
        f"{plan.num_steps:,}",
        f"{plan.flops / divisor:.3f}",
        f"{plan.share:.1%}",
        _gib(max(forecast.memory, key=lambda memory: memory.total)),
        "",
        *([duration(sum(forecast.seconds))] if forecast.seconds else []),
        style="bold",
    )
    return table


def _gib(memory: PhaseMemory) -> str:
    at_least = "" if memory.is_complete else "≥ "
    return f"{at_least}{memory.total / _GIB:.3g}"


def _methods(forecast: Forecast) -> RenderableType:
    if not forecast.alone:
        return Text("No method: this is a dense run.\n")
    table = Table(title="Methods", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method")
    table.add_column("FLOPs of dense", justify="right")
    table.add_column("times cheaper", justify="right")
    for name, plan in forecast.alone.items():
        table.add_row(
            f"{name} alone" if len(forecast.alone) > 1 else name, f"{plan.share:.1%}", f"{1 / plan.share:.2f}"
        )
    if len(forecast.alone) > 1:
        table.add_section()
        share = forecast.plan.share
        table.add_row("together", f"{share:.1%}", f"{1 / share:.2f}", style="bold")
    return table
