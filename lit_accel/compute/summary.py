"""The table that a person reads at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lit_accel.compute.phases import Phase, saved_share
from lit_accel.compute.units import duration, prefix_for, with_prefix


def phase_table(phases: Sequence[Phase], total: Phase) -> Table:
    """Lay out the phases of a run and their total.

    Args:
        phases: The phases, in order.
        total: Their sum.

    Returns:
        A table for :class:`rich.console.Console`. All rows of a column share one unit, named in its head.
    """
    token_prefix, token_divisor = prefix_for(total.tokens)
    flops_prefix, flops_divisor = prefix_for(total.dense_flops)
    # Wide enough for numbers, narrow enough for a terminal of 80 columns.
    table = Table(title="Compute ledger", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in (
        "phase",
        "parameters",
        "steps",
        f"{token_prefix} tokens".strip(),
        f"{flops_prefix}FLOPs",
        "dense",
        "saved",
        "time",
    ):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(name: str, parameters: str, phase: Phase, style: str | None = None) -> None:
        table.add_row(
            name,
            parameters,
            f"{phase.steps:,}",
            f"{phase.tokens / token_divisor:.{2 if token_prefix else 0}f}",
            f"{phase.flops / flops_divisor:.3f}",
            f"{phase.dense_flops / flops_divisor:.3f}",
            f"{saved_share(phase.flops, phase.dense_flops):.1%}",
            duration(phase.seconds),
            style=style,
        )

    for index, phase in enumerate(phases):
        add(str(index), with_prefix(phase.num_parameters), phase)
    table.add_section()
    add("total", "", total, style="bold")
    notes = (
        "FLOPs: forward and backward, 2 a multiply-add. dense: those of the full-size model on the same batches. "
        "time: without validation."
    )
    if any("stage" in phase.size for phase in phases):
        masked = saved_share(total.head_masked_flops, total.dense_flops)
        excluded = saved_share(total.head_excluded_flops, total.dense_head_excluded_flops)
        dense = saved_share(total.head_dense_flops, total.dense_flops)
        notes += (
            f" Saved with the model's head counted dense: {dense:.1%}, as sparse as the blocks: {masked:.1%}, not at "
            f"all: {excluded:.1%}."
        )
    table.caption = Text(notes, justify="left")
    return table
