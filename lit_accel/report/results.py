"""What each arm gave at each of its budgets: savings at equal loss, what arrives as time, loss at equal steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_accel.report.arms import SAME_BUDGET, Arm
from lit_accel.report.frontier import Frontier
from lit_accel.report.noise import Cell
from lit_accel.report.runs import Run
from lit_accel.report.saving import Saving, saving_against

# Below it both logarithms are near zero, and their ratio says nothing.
_SMALLEST_RATIO = 1.05


@dataclass(frozen=True)
class Result:
    """One arm at one budget; means over its seeds.

    Args:
        label: The arm.
        num_runs: How many seeds.
        steps: Optimizer steps.
        tokens: Training tokens.
        loss: Final held-out loss.
        loss_deviation: Its standard deviation over seeds, or ``None`` with one.
        in_flops: What was saved of FLOPs at equal loss.
        in_seconds: What was saved of seconds at equal loss.
        flops_ratio: Dense-equivalent FLOPs over FLOPs at equal tokens: what was counted.
        time_ratio: Seconds of dense training on as many tokens over the arm's; ``None`` without dense runs of the
            same full-size model.
        loss_difference: The arm's loss above that of dense runs on as many tokens; ``None`` if there are none.
    """

    label: str
    num_runs: int
    steps: int
    tokens: int
    loss: float
    loss_deviation: float | None
    in_flops: Saving
    in_seconds: Saving
    flops_ratio: float
    time_ratio: float | None
    loss_difference: float | None

    @property
    def realised_share(self) -> float | None:
        """Which share of the counted ratio arrived as time, on the scale of logarithms; ``None`` if too little was."""
        if self.time_ratio is None or self.flops_ratio <= _SMALLEST_RATIO:
            return None
        return float(np.log(self.time_ratio) / np.log(self.flops_ratio))


def compare(arm: Arm, dense: Sequence[Run], in_flops: Frontier, in_seconds: Frontier) -> list[Result]:
    """Compare an arm with the dense runs, budget by budget.

    Args:
        arm: The arm.
        dense: The dense runs.
        in_flops: Their frontier in FLOPs.
        in_seconds: Their frontier in seconds.
    """
    budgets = arm.budgets
    flops_cells = [Cell.of(runs, "flops") for runs in budgets]
    seconds_cells = [Cell.of(runs, "seconds") for runs in budgets]
    return [
        _result(
            runs,
            dense,
            saving_against(in_flops, flops_cell, flops_cells),
            saving_against(in_seconds, seconds_cell, seconds_cells),
        )
        for runs, flops_cell, seconds_cell in zip(budgets, flops_cells, seconds_cells, strict=True)
    ]


def _result(runs: Sequence[Run], dense: Sequence[Run], in_flops: Saving, in_seconds: Saving) -> Result:
    losses = [run.loss for run in runs]
    tokens = float(np.mean([run.tokens for run in runs]))
    # Another full-size model is another task: neither its seconds nor its losses compare.
    same_model = [run for run in dense if _is_near(run.dense_flops_per_token, runs[0].dense_flops_per_token)]
    at_equal_tokens = [run.loss for run in same_model if _is_near(run.tokens, tokens)]
    time_ratio = None
    if same_model:
        dense_seconds = float(np.median([run.seconds / run.tokens for run in same_model])) * tokens
        time_ratio = dense_seconds / float(np.mean([run.seconds for run in runs]))
    return Result(
        label=runs[0].label,
        num_runs=len(runs),
        steps=round(float(np.mean([run.steps for run in runs]))),
        tokens=round(tokens),
        loss=float(np.mean(losses)),
        loss_deviation=float(np.std(losses, ddof=1)) if len(runs) > 1 else None,
        in_flops=in_flops,
        in_seconds=in_seconds,
        flops_ratio=float(np.sum([run.dense_flops for run in runs]) / np.sum([run.flops for run in runs])),
        time_ratio=time_ratio,
        loss_difference=float(np.mean(losses) - np.mean(at_equal_tokens)) if at_equal_tokens else None,
    )


def _is_near(value: float, other: float) -> bool:
    return abs(value - other) <= SAME_BUDGET * other
