"""What the log says: the dense frontier, savings at equal loss, and how each method stands against its controls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

import numpy as np
from scipy import stats

from lit_accel.report.frontier import Frontier, fit_frontier
from lit_accel.report.noise import Cell, scatter
from lit_accel.report.saving import Saving, saving_against
from scripts.bench.jobs import Study, b1_share, b2_depth, shorter, smaller
from scripts.bench.log import Row
from scripts.bench.study import DENSE, RUNGS, Arm, Rung

NUM_DRAWS = 10_000
CONFIDENCE = 0.95
# Of FLOPs that are as good as all of dense training's, no share can arrive as seconds.
_NOTHING_SAVED = 0.02


@dataclass(frozen=True)
class End:
    """The end of a run.

    Args:
        flops: FLOPs that were spent.
        seconds: CPU seconds of training in dense optimizer steps, timed right before and after the run.
        loss: Held-out loss of the full model.
        seed: The seed.
        dense_flops: What the full model would have paid for the same batches.
        num_steps: Optimizer steps.
    """

    flops: float
    seconds: float
    loss: float
    seed: int
    dense_flops: float
    num_steps: int

    @staticmethod
    def of(row: Row) -> End:
        """Take what counts of a row of the log."""
        return End(
            flops=row["flops"],
            seconds=row["cpu_seconds"] / fmean(row["reference_step"]),
            loss=row["val_loss"],
            seed=row["seed"],
            dense_flops=row["dense_flops"],
            num_steps=row["num_steps"],
        )


@dataclass(frozen=True)
class Gap:
    """What a method ends above a control that costs as much, in nats; negative where the method is better.

    Args:
        control: What it is held against.
        mean: The difference of means.
        low: Where its 95 % interval begins.
        high: Where it ends.
    """

    control: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Reading:
    """An arm at a budget.

    Args:
        arm: The arm.
        budget: The budget.
        lr: Its learning rate.
        ends: Its runs.
        in_flops: What it saved in FLOPs.
        in_seconds: What it saved in seconds.
        flops_share: FLOPs in parts of a dense run of as many steps.
        seconds_share: Seconds in parts of such a run; ``None`` while there is none.
        paired: Mean and standard deviation of the difference in loss to dense runs of as many steps and the same seed.
        b1: Against dense training of the same cost.
        b2: Against a smaller dense model.
    """

    arm: Arm
    budget: float
    lr: float
    ends: tuple[End, ...]
    in_flops: Saving
    in_seconds: Saving
    flops_share: float
    seconds_share: float | None
    paired: tuple[float, float] | None
    b1: Gap | None
    b2: Gap | None

    @property
    def loss(self) -> tuple[float, float]:
        """Mean and standard deviation of the held-out losses."""
        return mean_and_deviation([end.loss for end in self.ends])

    @property
    def realised_share(self) -> float | None:
        """Which share of the counted saving a step has arrived as seconds, on the scale of logarithms."""
        if self.seconds_share is None or self.flops_share > 1 - _NOTHING_SAVED:
            return None
        return float(np.log(self.seconds_share) / np.log(self.flops_share))


class Evidence:
    """What the log says of a rung.

    Args:
        rung: The rung.
        rows: The log.
        num_draws: Draws for each interval.
    """

    def __init__(self, rung: Rung, rows: Sequence[Row], num_draws: int = NUM_DRAWS) -> None:
        self.rung, self.num_draws = rung, num_draws
        #: p-values of savings after Holm's correction, by method and budget; see :func:`read_study`.
        self.p_values: dict[tuple[str, float], float] = {}
        self.study = Study(rung, rows)

    def ends(self, arm: Arm, budget: float, share: float = 1.0) -> tuple[End, ...]:
        """Return the runs of an arm at a budget, by seed."""
        found = [End.of(row) for row in self.study.finished(arm, budget, share)]
        return tuple(sorted(found, key=lambda end: end.seed))

    def is_complete(self, arm: Arm, budget: float, share: float = 1.0) -> bool:
        """Whether all seeds of an arm are in the log."""
        return len(self.ends(arm, budget, share)) == len(arm.seeds)

    @cached_property
    def dense(self) -> dict[float, tuple[End, ...]]:
        """The dense runs of the frontier, by those of its budgets that are complete."""
        return {
            budget: self.ends(DENSE, budget) for budget in self.rung.dense_budgets if self.is_complete(DENSE, budget)
        }

    @cached_property
    def in_flops(self) -> Frontier:
        """The dense frontier in FLOPs."""
        return fit_frontier([end for ends in self.dense.values() for end in ends], "flops")

    @cached_property
    def in_seconds(self) -> Frontier:
        """The dense frontier in seconds."""
        return fit_frontier([end for ends in self.dense.values() for end in ends], "seconds")

    @cached_property
    def deviation(self) -> tuple[float, int]:
        """Standard deviation of losses between seeds, pooled over all cells, and its degrees of freedom."""
        groups: dict[tuple[str, str], list[float]] = {}
        for row in self.study.rows:
            if row["stage"] == "report":
                groups.setdefault((row["arm"], row["config"]), []).append(row["val_loss"])
        cells = [Cell(np.zeros(len(losses)), np.array(losses)) for losses in groups.values()]
        return scatter(cells) or float("nan"), sum(len(cell.losses) - 1 for cell in cells)

    def slope(self, budget: float) -> float:
        """Return by how many nats the frontier falls per unit of ln C at a budget's dense cost."""
        curve = self.in_flops.curve
        log_cost = np.log(fmean(end.flops for end in self.dense[budget]))
        assert curve is not None
        return float(
            curve.excess[0] * curve.exponent[0] * np.exp(-curve.exponent[0] * (log_cost - curve.log_reference[0]))
        )

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """Every complete arm at every budget but the dense ones."""
        return tuple(
            self._read(arm, budget)
            for budget in self.rung.budgets
            for arm in self.study.others
            if self.is_complete(arm, budget)
        )

    def of(self, arm: str) -> list[Reading]:
        """Return the readings of an arm, by budget."""
        return [reading for reading in self.readings if reading.arm.name == arm]

    def _read(self, arm: Arm, budget: float) -> Reading:
        ends = self.ends(arm, budget)
        flops, seconds = Cell.of(ends, "flops"), Cell.of(ends, "seconds")
        dense = {end.seed: end for end in self.dense.get(budget, ())}
        paired = [end.loss - dense[end.seed].loss for end in ends if end.seed in dense]
        share = fmean(end.flops / end.dense_flops for end in ends)
        b1 = b2 = None
        if arm.role == "method":
            part = b1_share(share)
            b1 = self._gap(ends, self.ends(shorter(part), budget, part), shorter(part).title)
            small = smaller(self.rung, b2_depth(self.rung, share))
            b2 = self._gap(ends, self.ends(small, budget), small.title, at_equal_cost=True)
        return Reading(
            arm=arm,
            budget=budget,
            lr=self.study.learning_rate(arm, budget) or float("nan"),
            ends=ends,
            in_flops=saving_against(self.in_flops, flops, [flops], self.num_draws),
            in_seconds=saving_against(self.in_seconds, seconds, [seconds], self.num_draws),
            flops_share=share,
            seconds_share=fmean(e.seconds for e in ends) / fmean(e.seconds for e in dense.values()) if dense else None,
            paired=mean_and_deviation(paired) if len(paired) > 1 else None,
            b1=b1,
            b2=b2,
        )

    def _gap(
        self, ends: Sequence[End], controls: Sequence[End], name: str, *, at_equal_cost: bool = False
    ) -> Gap | None:
        """Compare with a control; along the frontier its loss is carried over to the method's cost if that differs."""
        if len(controls) < 2:
            return None
        moved = 0.0
        if at_equal_cost:
            if self.in_flops.curve is None:
                return None
            costs = np.log([fmean(end.flops for end in ends), fmean(end.flops for end in controls)])
            here, there = self.in_flops.curve.loss(costs)
            moved = float(here - there)
        mean = fmean(end.loss for end in ends) - fmean(end.loss for end in controls) - moved
        deviation, num_free = self.deviation
        error = deviation * np.sqrt(1 / len(ends) + 1 / len(controls))
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, num_free) * error)
        return Gap(name, mean, mean - reach, mean + reach)

    def fake_savings(self) -> list[tuple[float, float, float]]:
        """Return what is "saved" by no method at all when a longer dense run is read in mid-way.

        Returns:
            The shorter budget, the longer one, and the apparent saving of the shorter run over where the longer one
            passed its final loss; means over seeds.
        """
        found = []
        for longer in self.dense:
            curves = {row["seed"]: row["curve"] for row in self.study.finished(DENSE, longer) if row["curve"]}
            for budget, ends in self.dense.items():
                savings = [_passed(curves[end.seed], end) for end in ends if end.seed in curves]
                if budget < longer and savings and all(saving is not None for saving in savings):
                    found.append((budget, longer, fmean(saving for saving in savings if saving is not None)))
        return found


def read_study(rows: Sequence[Row], num_draws: int = NUM_DRAWS) -> dict[str, Evidence]:
    """Return what the log says of the rungs that have a frontier, with p-values corrected over all of them.

    Args:
        rows: The log.
        num_draws: Draws for each interval.
    """
    found = {name: Evidence(rung, rows, num_draws) for name, rung in RUNGS.items()}
    found = {name: evidence for name, evidence in found.items() if evidence.in_flops.curve is not None}
    tested = [
        (evidence, reading, reading.in_flops.p_value)
        for evidence in found.values()
        for reading in evidence.readings
        if reading.arm.role == "method" and reading.in_flops.p_value is not None
    ]
    for (evidence, reading, _), p in zip(tested, holm([p for _, _, p in tested]), strict=True):
        evidence.p_values[reading.arm.name, reading.budget] = p
    return found


def _passed(curve: Sequence[tuple[float, float]], end: End) -> float | None:
    """Return what a completed run saved over the cost at which the curve of another passed its loss."""
    costs, losses = np.array(curve).T
    # The rows in mid-way only, so rising losses towards the end of the curve do not occur; np.interp wants rising ones.
    if not losses.min() <= end.loss <= losses.max():
        return None
    log_cost = np.interp(-end.loss, -losses, np.log(costs))
    return float(1 - end.flops / np.exp(log_cost))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, by Holm's step-down rule."""
    order = np.argsort(p_values)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation; the latter is not a number of a single value."""
    values = list(values)
    return fmean(values), stdev(values) if len(values) > 1 else float("nan")
