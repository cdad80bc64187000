"""The phases of a finished run, from the rows of its ledger alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_accel.compute.phases import AMOUNTS, Phase
from lit_accel.report.runs import Run
from lit_accel.report.wording import run_name


@dataclass(frozen=True)
class RunPhases:
    """What a run did and spent, phase by phase.

    Args:
        name: The run.
        phases: Its phases, in order.
        total: Their sum.
    """

    name: str
    phases: tuple[Phase, ...]
    total: Phase


def phases_of(run: Run) -> RunPhases:
    """Read the phases of a run.

    A ledger has a row where each phase ends, and its counters are cumulative: a phase is the difference between its
    last row and that of the phase before. (Ledgers of early versions lack that row where none was due; such a phase
    is counted with the one that follows.)

    Args:
        run: The run.
    """
    ledger = run.ledger
    ends = np.flatnonzero(np.append(np.diff(ledger.phase) > 0, True))
    phases, previous = [], Phase()
    for end in ends:
        until = _until(run, int(end))
        phases.append(
            Phase(
                num_parameters=until.num_parameters,
                steps=until.steps - previous.steps,
                seconds=until.seconds - previous.seconds,
                **{name: getattr(until, name) - getattr(previous, name) for name in AMOUNTS},
            )
        )
        previous = until
    return RunPhases(run_name(run), tuple(phases), previous)


def _until(run: Run, row: int) -> Phase:
    """Return what was spent until a row, as one phase."""
    ledger = run.ledger
    by_head: dict[str, Any] = {
        name: int(values[row]) for name, values in ledger.by_head.items() if np.isfinite(values[row])
    }
    return Phase(
        num_parameters=int(ledger.num_parameters[row]),
        steps=int(ledger.step[row]),
        seconds=float(ledger.seconds[row]),
        tokens=int(ledger.tokens[row]),
        flops=int(ledger.flops[row]),
        dense_flops=int(ledger.dense_flops[row]),
        **by_head,
    )
