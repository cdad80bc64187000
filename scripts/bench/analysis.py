"""What the log says: the dense frontier, savings at equal loss, and how each method stands against its controls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from statistics import fmean, stdev
from typing import Literal, get_args

import numpy as np
from scipy import stats

from lit_accel.report.frontier import Frontier, fit_frontier
from lit_accel.report.noise import Cell, Cost, Scatter, fit_scatter
from lit_accel.report.saving import Saving, saving_against
from scripts.bench.jobs import Study, b1_share, shorter
from scripts.bench.log import Row
from scripts.bench.study import ARMS, DENSE, RUNGS, SEEDS, SMALLER_RATES, Arm, Rung

NUM_DRAWS = 10_000
CONFIDENCE = 0.95
# What was to be saved, as a logarithm, must be so many standard errors and at least so much to speak of a share of it.
_ERRORS_APART, _LEAST = 2.0, 0.02
# Dense steps that are timed within so many seconds of a run say how fast the machine was.
_WINDOW = 20 * 60


@dataclass(frozen=True)
class End:
    """The end of a run.

    Args:
        flops: FLOPs that were spent.
        seconds: CPU seconds of training in dense optimizer steps.
        loss: Held-out loss of the full model.
        seed: The seed.
        dense_flops: What the full model would have paid for the same batches.
        num_steps: Optimizer steps.
        accuracy: What else was measured on the held-out data, if the rung says what.
    """

    flops: float
    seconds: float
    loss: float
    seed: int
    dense_flops: float
    num_steps: int
    accuracy: float | None = None


@dataclass(frozen=True)
class Gap:
    """What a method ends above a control that costs as much, in nats; negative where the method is better.

    Args:
        mean: The difference of means.
        low: Where its 95 % interval begins.
        high: Where it ends.
    """

    mean: float
    low: float
    high: float

    @property
    def outcome(self) -> Literal["beats", "loses", "not told"]:
        """What the method does to the control, with 95 % confidence."""
        return "beats" if self.high < 0 else "loses" if self.low > 0 else "not told"


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
        seconds_share: Seconds in parts of such a run, and the standard error of its logarithm; ``None`` while there is
            none.
        paired: Mean and standard deviation of the difference in loss to dense runs of as many steps and the same seed.
        b1: Against dense training of the same cost.
        b2: Against a smaller dense model of the same cost, between two that were trained.
    """

    arm: Arm
    budget: float
    lr: float
    ends: tuple[End, ...]
    in_flops: Saving
    in_seconds: Saving
    flops_share: float
    seconds_share: tuple[float, float] | None
    paired: tuple[float, float] | None
    b1: Gap | None
    b2: Gap | None

    @property
    def loss(self) -> tuple[float, float]:
        """Mean and standard deviation of the held-out losses."""
        return mean_and_deviation([end.loss for end in self.ends])

    def saving(self, cost: Cost) -> Saving:
        """Return what it saved, in FLOPs or in seconds."""
        return self.in_flops if cost == "flops" else self.in_seconds

    def dominates(self, other: Reading, cost: Cost) -> bool:
        """Whether it cost no more than another arm and ended no higher."""
        theirs, mine = (fmean(getattr(end, cost) for end in each.ends) for each in (other, self))
        return mine <= theirs and self.loss[0] <= other.loss[0]

    @property
    def loses_to_a_control(self) -> bool:
        """Whether it ends higher than dense training of its cost, or than a smaller model, with 95 % confidence."""
        return any(gap is not None and gap.outcome == "loses" for gap in (self.b1, self.b2))

    @property
    def realised_share(self) -> tuple[float, float] | None:
        """Which share of the counted saving of a step arrived as seconds, on the scale of logarithms, and its error.

        ``None`` where so little was to be saved that the error would be as large as the share.
        """
        if self.seconds_share is None:
            return None
        share, error = self.seconds_share
        counted = float(np.log(self.flops_share))
        if abs(counted) <= max(_LEAST, _ERRORS_APART * error):
            return None
        return float(np.log(share)) / counted, error / abs(counted)


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
        found = [
            End(
                flops=row["flops"],
                seconds=row["cpu_seconds"] / self._dense_step(row),
                loss=row["val_loss"],
                seed=row["seed"],
                dense_flops=row["dense_flops"],
                num_steps=row["num_steps"],
                accuracy=row["val_metrics"][self.rung.accuracy] if self.rung.accuracy else None,
            )
            for row in self.study.finished(arm, budget, share)
        ]
        return tuple(sorted(found, key=lambda end: end.seed))

    def is_complete(self, arm: Arm, budget: float, share: float = 1.0) -> bool:
        """Whether all seeds of an arm are in the log."""
        return len(self.ends(arm, budget, share)) == len(self.study.seeds(arm, budget))

    @cached_property
    def _dense_steps(self) -> np.ndarray:
        """Seconds of dense steps, with when they were timed; of shape (timings, 2)."""
        timings = []
        for row in self.study.rows:
            before, after = row["reference_step"]
            timings += [[_when(row) - row["wall_seconds"], before], [_when(row), after]]
        return np.array(timings)

    def _dense_step(self, row: Row) -> float:
        ended = _when(row)
        near = self._dense_steps[:, 0] >= ended - row["wall_seconds"] - _WINDOW
        near &= self._dense_steps[:, 0] <= ended + _WINDOW
        return float(self._dense_steps[near, 1].mean())

    @cached_property
    def dense(self) -> dict[float, tuple[End, ...]]:
        """The dense runs, by budget; budgets that have as many seeds as methods have."""
        found = {budget: self.ends(DENSE, budget) for budget in self.rung.dense_budgets}
        return {budget: ends for budget, ends in found.items() if len(ends) >= len(SEEDS)}

    @cached_property
    def fitted(self) -> tuple[tuple[float, Arm, tuple[End, ...]], ...]:
        """Budget, arm and ends of what the curve goes through, by budget: the dense runs, and the controls B1."""
        least = min(self.rung.fitted_budgets)
        found = [(budget, DENSE, ends) for budget, ends in self.dense.items() if budget in self.rung.fitted_budgets]
        found += [
            (budget * share, arm, self.ends(arm, budget, share))
            for budget in self.rung.budgets
            for arm, share in self._all_arms(budget)
            if share < 1 and budget * share >= least and self.is_complete(arm, budget, share)
        ]
        return tuple(sorted(found, key=lambda each: each[0]))

    @property
    def _fitted(self) -> list[End]:
        return [end for _, _, ends in self.fitted for end in ends]

    @cached_property
    def in_flops(self) -> Frontier:
        """The dense frontier in FLOPs."""
        return fit_frontier(self._fitted, "flops")

    @cached_property
    def in_seconds(self) -> Frontier:
        """The dense frontier in seconds."""
        return fit_frontier(self._fitted, "seconds", self.unit_error)

    @cached_property
    def unit_error(self) -> float:
        """How far the unit of seconds is off from one cell to the next, as a standard deviation of logarithms.

        The runs of a cell follow each other, so the seeds do not show it. Cells of full-size dense training do: each
        of their steps costs one unit.
        """
        same = [
            self.ends(arm, budget)
            for budget in self.rung.budgets
            for arm in self.study.others
            if arm.name in ("null", "half-lr", "dense-ltlr") and self.is_complete(arm, budget)
        ]
        cells = [*(ends for _, _, ends in self.fitted), *same]
        steps = [np.log([end.seconds / end.num_steps for end in ends]) for ends in cells]
        if len(steps) < 2:
            return 0.0
        within = fmean(step.var(ddof=1) / len(step) for step in steps)
        return float(np.sqrt(max(0.0, np.var([step.mean() for step in steps], ddof=1) - within)))

    @cached_property
    def _groups(self) -> list[tuple[End, ...]]:
        """All reported runs that differ in nothing but their seed, dense and controls too."""
        return list(self.dense.values()) + [
            ends
            for budget in self.rung.budgets
            for arm, share in self._all_arms(budget)
            if len(ends := self.ends(arm, budget, share)) > 1
        ]

    @cached_property
    def _cells(self) -> dict[Cost, list[Cell]]:
        """Those groups as points, without those of the frontier, which it has itself."""
        fitted = [ends for _, _, ends in self.fitted]
        groups = [group for group in self._groups if group not in fitted]
        return {cost: [Cell.of(group, cost) for group in groups] for cost in get_args(Cost)}

    @cached_property
    def smaller_models(self) -> tuple[Reading, ...]:
        """The smaller dense models that are complete at a budget, cheapest first, read as if each were a method."""
        found = {
            (arm.name, budget): self._read(arm, budget)
            for budget in self.rung.budgets
            for arm, _ in self._all_arms(budget)
            if arm.lr_of == SMALLER_RATES and self.is_complete(arm, budget)
        }
        return tuple(sorted(found.values(), key=lambda reading: (reading.budget, reading.ends[0].flops)))

    def _all_arms(self, budget: float) -> Iterator[tuple[Arm, float]]:
        seen = {DENSE.name}
        for arm in self.study.others:
            yield arm, 1.0
            if arm.role == "method" and (share := self.study.share(arm, budget)) is not None:
                smaller = [(control, 1.0) for control in self.study.smaller_models(share)]
                for control, part in ((shorter(share), b1_share(share)), *smaller):
                    if control.name not in seen:
                        seen.add(control.name)
                        yield control, part

    @cached_property
    def scatter(self) -> Scatter:
        """How much losses scatter between seeds, as a function of the loss, from all groups."""
        return fit_scatter([Cell.of(ends, "flops") for ends in self._groups])

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
        dense = self.dense.get(budget, ())
        by_seed = {end.seed: end for end in dense}
        paired = [end.loss - by_seed[end.seed].loss for end in ends if end.seed in by_seed]
        share = fmean(end.flops / end.dense_flops for end in ends)
        b1 = b2 = None
        if share < 1 and arm.lr_of != SMALLER_RATES:
            b1, b2 = self._above_shorter(ends, budget, share), self._above_smaller(ends, budget, share)
        return Reading(
            arm=arm,
            budget=budget,
            lr=self.study.learning_rate(arm, budget) or float("nan"),
            ends=ends,
            in_flops=self._saving(self.in_flops, ends),
            in_seconds=self._saving(self.in_seconds, ends),
            flops_share=share,
            seconds_share=seconds_share(ends, dense, self.unit_error),
            paired=mean_and_deviation(paired) if len(paired) > 1 else None,
            b1=b1,
            b2=b2,
        )

    def best_smaller_model(self, budget: float) -> Reading | None:
        """Return the smaller dense model that saves most FLOPs at a budget, if any saving can be read.

        Args:
            budget: The budget.
        """
        known = [
            (reading.in_flops.share, place, reading)
            for place, reading in enumerate(self.smaller_models)
            if reading.budget == budget and reading.in_flops.share is not None
        ]
        return max(known)[2] if known else None

    def better_model(self, reading: Reading, cost: Cost = "flops") -> Reading | None:
        """Return the smaller dense model that does best of those that do better than an arm, if there is one.

        It saves more, or it costs no more and ends no higher, which says the same where no saving can be read.

        Args:
            reading: The arm, at a budget.
            cost: In FLOPs or in seconds.
        """
        mine = reading.saving(cost).share

        def gain(model: Reading) -> float:
            theirs = model.saving(cost).share
            return -math.inf if theirs is None else theirs

        better = [
            model
            for model in self.smaller_models
            if model.budget == reading.budget
            and (model.dominates(reading, cost) or (mine is not None and gain(model) > mine))
        ]
        return max(better, key=gain, default=None)

    def _saving(self, frontier: Frontier, ends: Sequence[End]) -> Saving:
        return saving_against(frontier, Cell.of(ends, frontier.cost), self._cells[frontier.cost], self.num_draws)

    def _above_shorter(self, ends: Sequence[End], budget: float, share: float) -> Gap | None:
        """Compare with B1, whose loss is carried to the method's cost as dense losses change with theirs."""
        control, part = shorter(share), b1_share(share)
        if not self.is_complete(control, budget, part):
            return None
        others = self.ends(control, budget, part)
        costs = [_mean_flops(group) for group in (ends, others)]
        known = sorted(tuple(Cell.of(group, "flops").mean) for group in self.dense.values())
        log_costs, losses = np.array(known).T
        if min(costs) < np.exp(log_costs[0]) or max(costs) > np.exp(log_costs[-1]):
            return None
        # From budget to budget, not along the fitted curve, which may miss one of them.
        here, there = np.interp(np.log(costs), log_costs, losses)
        return self._gap(ends, [(1.0, others)], float(here - there))

    def _above_smaller(self, ends: Sequence[End], budget: float, share: float) -> Gap | None:
        """Compare with B2, a point between the two smaller models whose costs are next to the method's."""
        controls = self.study.smaller_models(share)
        if not controls or not all(self.is_complete(control, budget) for control in controls):
            return None
        groups = [self.ends(control, budget) for control in controls]
        if len(groups) == 1:
            return self._gap(ends, [(1.0, groups[0])])
        below, above = (_mean_flops(group) for group in groups)
        weight = (_mean_flops(ends) - below) / (above - below)
        return self._gap(ends, [(1 - weight, groups[0]), (weight, groups[1])])

    def _gap(self, ends: Sequence[End], control: Sequence[tuple[float, Sequence[End]]], carried: float = 0.0) -> Gap:
        """Compare means with that of a control, which may lie between two groups of runs.

        Args:
            ends: The method's runs.
            control: Groups of runs with their weights, which add up to 1.
            carried: By how much the control's loss is changed beforehand.
        """
        loss = sum(weight * fmean(end.loss for end in group) for weight, group in control) + carried
        mean = fmean(end.loss for end in ends) - loss
        variances = [
            (weight * self.scatter.at(fmean(end.loss for end in group))) ** 2 / len(group)
            for weight, group in ((1.0, ends), *control)
        ]
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.scatter.num_free) * np.sqrt(sum(variances)))
        return Gap(mean, mean - reach, mean + reach)

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
    # Those that are missing count as not significant, which is the strictest that they can be.
    registered = [(rung, arm) for rung in RUNGS.values() for arm in ARMS[rung.name] if arm.role == "method"]
    num_missing = sum(len(rung.budgets) for rung, _ in registered) - len(tested)
    corrected = holm([p for _, _, p in tested] + [1.0] * num_missing)
    for (evidence, reading, _), p in zip(tested, corrected, strict=False):
        evidence.p_values[reading.arm.name, reading.budget] = p
    return found


def _passed(curve: Sequence[tuple[float, float]], end: End) -> float | None:
    """Return what a completed run saved over the cost at which the curve of another passed its loss."""
    costs, losses = np.array(curve).T
    # When it was passed for the first time, if it went up and down.
    losses = np.minimum.accumulate(losses)
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


def seconds_share(ends: Sequence[End], dense: Sequence[End], unit_error: float = 0.0) -> tuple[float, float] | None:
    """Return the seconds of runs in parts of dense ones, and the standard error of the share's logarithm.

    Args:
        ends: The runs.
        dense: Dense runs of as many steps.
        unit_error: How far the unit is off from one cell to the next.

    Returns:
        ``None`` if there is but one of either.
    """
    if len(ends) < 2 or len(dense) < 2:
        return None
    one, other = (np.log([end.seconds for end in group]) for group in (ends, dense))
    error = np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other) + 2 * unit_error**2)
    return float(np.exp(one.mean() - other.mean())), float(error)


def _mean_flops(ends: Sequence[End]) -> float:
    return fmean(end.flops for end in ends)


def _when(row: Row) -> float:
    return datetime.fromisoformat(row["time"]).timestamp()


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation; the latter is not a number of a single value."""
    values = list(values)
    return fmean(values), stdev(values) if len(values) > 1 else float("nan")
