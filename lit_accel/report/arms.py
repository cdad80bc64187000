"""Runs in groups: arms, which of them are the dense ones, and the budgets of an arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lit_accel.report.noise import End
from lit_accel.report.runs import ReportError, Run

AnyRun = TypeVar("AnyRun", bound=End)
# Costs that differ by less are one budget: seeds of a method that draws at random differ a little.
SAME_BUDGET = 0.02


@dataclass(frozen=True)
class Arm:
    """The runs of one label.

    Args:
        label: Its name.
        runs: Its runs, by rising FLOPs.
        is_dense: Whether they are taken as dense training, to which the others are compared.
    """

    label: str
    runs: tuple[Run, ...]
    is_dense: bool

    @property
    def budgets(self) -> list[tuple[Run, ...]]:
        """The runs by budget."""
        return by_budget(self.runs)


def group(runs: Sequence[Run], dense: Sequence[str] | None = None) -> tuple[tuple[Arm, ...], list[str]]:
    """Group runs into arms.

    Args:
        runs: The runs.
        dense: Labels of the dense arms. By default those in which no run saved or added anything.

    Returns:
        The arms, dense ones first, and warnings.

    Raises:
        ReportError: If there is no arm of a label in ``dense``.
    """
    labels = list(dict.fromkeys(run.label for run in runs))
    if unknown := [label for label in dense or () if label not in labels]:
        raise ReportError(f"There is no arm {', '.join(unknown)} to take as dense; there are: {', '.join(labels)}.")
    arms, warnings = [], []
    for label in labels:
        members = tuple(sorted((run for run in runs if run.label == label), key=lambda run: run.flops))
        num_dense = sum(run.costs_as_dense for run in members)
        is_dense = num_dense == len(members) if dense is None else label in dense
        if dense is None and 0 < num_dense < len(members):
            warnings.append(
                f"{num_dense} of the {len(members)} runs of {label} cost what dense training costs; all were taken "
                "as runs of a method. If they are not one arm, name them apart: LABEL=PATH."
            )
        if dense is not None and is_dense and num_dense < len(members):
            warnings.append(
                f"{label} was taken as dense because --dense says so, but {len(members) - num_dense} of its "
                f"{len(members)} runs did not cost what their full-size model costs."
            )
        arms.append(Arm(label, members, is_dense))
    return tuple(sorted(arms, key=lambda arm: not arm.is_dense)), warnings


def by_budget(runs: Sequence[AnyRun]) -> list[tuple[AnyRun, ...]]:
    """Put runs whose FLOPs differ by less than 2 % together, by rising FLOPs."""
    budgets: list[list[AnyRun]] = []
    for run in sorted(runs, key=lambda run: run.flops):
        if budgets and run.flops <= (1 + SAME_BUDGET) * budgets[-1][0].flops:
            budgets[-1].append(run)
        else:
            budgets.append([run])
    return [tuple(budget) for budget in budgets]
