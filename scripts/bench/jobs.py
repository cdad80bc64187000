"""Which runs are to be made, in which order, as far as the log can tell yet.

A run may depend on others: on the learning rates that were best in the tuning, and, for the controls, on what the
methods cost. So the list grows as the log does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from statistics import mean

from scripts.bench.log import Row
from scripts.bench.study import (
    ARMS,
    DENSE,
    DENSE_RATES,
    RUNGS,
    SEEDS,
    SMALLER_RATES,
    TUNING_SEED,
    Arm,
    Rung,
)
from scripts.bench.train import Job
from scripts.bench.tuning import best_rate, between, next_trial

# Costs of controls are rounded up to this share of a dense run: methods that cost almost the same share a control.
_SHARE = 0.025
# The learning rate of smaller models is tuned for one of them.
_SMALLER_TUNED = 5


def jobs(rows: Sequence[Row]) -> Iterator[Job]:
    """Yield all runs that can be made by now, the most important first; those that are in the log, too.

    Args:
        rows: The log.
    """
    studies = [Study(rung, rows) for rung in RUNGS.values()]
    for study in studies:
        yield from study.at_first_budget()
    for study in studies:
        yield from study.at_other_budgets()


class Study:
    """The runs of a rung.

    Args:
        rung: The rung.
        rows: The log.
    """

    def __init__(self, rung: Rung, rows: Sequence[Row]) -> None:
        self.rung = rung
        self.rows = [row for row in rows if row["rung"] == rung.name]

    def at_first_budget(self) -> Iterator[Job]:
        """Yield the dense runs that the first results need, and then arm by arm."""
        first, *others = self.rung.budgets
        # Without other budgets there is nothing to put the longest dense runs off for.
        within = [budget for budget in self.rung.dense_budgets if not others or budget <= max(others)]
        for budget in self.rung.tuned_budgets:
            yield from self.tuning(DENSE, budget)
        for budget in within:
            yield from self.reported(DENSE, budget, seeds=SEEDS)
        for budget in within:
            if budget <= first:
                yield from self.reported(DENSE, budget)
        for arm in self.others:
            yield from self.tuned_itself(arm)
            yield from self.reported(arm, first)
            if arm.role == "method":
                yield from self.tuned_itself(self.smaller_tuned)
                yield from self.controls(arm, first)

    def at_other_budgets(self) -> Iterator[Job]:
        """Yield all dense runs, and then what is left, budget by budget and arm by arm."""
        for budget in self.rung.dense_budgets:
            yield from self.reported(DENSE, budget)
        for budget in self.rung.budgets[1:]:
            for arm in self.others:
                yield from self.reported(arm, budget)
                if arm.role == "method":
                    yield from self.controls(arm, budget)

    @property
    def others(self) -> list[Arm]:
        """All arms of the registry but the dense one."""
        return [arm for arm in ARMS[self.rung.name] if arm.role != "dense"]

    @property
    def smaller_tuned(self) -> Arm:
        """The smaller model whose learning rate is tuned, for all of them."""
        return smaller(self.rung, _SMALLER_TUNED)

    def tuned_itself(self, arm: Arm) -> Iterator[Job]:
        """Yield the trials of an arm that does not take over the learning rate of another."""
        if arm.lr_of is None or arm == self.smaller_tuned:
            yield from self.tuning(arm, self.rung.tuned_budgets[0])

    def tuning(self, arm: Arm, budget: float) -> Iterator[Job]:
        """Yield the trials of an arm's learning rate that are known to be needed."""
        losses = self.trials(arm, budget)
        for rate in (*self.rung.grid, *(rate for rate in losses if rate not in self.rung.grid)):
            yield self._job(arm, "tune", budget, rate, TUNING_SEED)
        if all(rate in losses for rate in self.rung.grid) and (rate := self._next_trial(arm, losses)) is not None:
            yield self._job(arm, "tune", budget, rate, TUNING_SEED)

    def reported(
        self, arm: Arm, budget: float, share: float = 1.0, seeds: tuple[int, ...] | None = None
    ) -> Iterator[Job]:
        """Yield the runs of an arm that are reported, if its learning rate is known.

        Args:
            arm: The arm.
            budget: The budget.
            share: Which part of the budget's steps it has.
            seeds: Some of its seeds; default is all.
        """
        rate = self.learning_rate(arm, budget * share)
        if rate is not None:
            for seed in seeds or self.seeds(arm, budget):
                yield self._job(arm, "report", budget, rate, seed, share)

    def seeds(self, arm: Arm, budget: float) -> tuple[int, ...]:
        """Return the seeds of an arm at a budget."""
        is_frontier = arm.role == "dense" and budget <= max(self.rung.budgets)
        return self.rung.dense_seeds if is_frontier else arm.seeds

    def controls(self, arm: Arm, budget: float) -> Iterator[Job]:
        """Yield dense runs at a method's cost (B1), and those of a smaller model in as many steps (B2)."""
        share = self.share(arm, budget)
        if share is not None:
            yield from self.reported(shorter(share), budget, b1_share(share))
            for control in self.smaller_models(share):
                yield from self.reported(control, budget)

    def smaller_models(self, share: float) -> list[Arm]:
        """Return the control B2: the two neighbours in depth that cost no more and no less than a method.

        One of them may be the full model. A list of one where a depth costs just as much, and none where there is none.

        Args:
            share: What the method costs in parts of a dense run of as many steps.
        """
        if self._block_share is None:
            return []
        full = self._num_blocks
        # FLOPs are linear in depth.
        depth = round(full - (1 - share) / self._block_share, 3)
        neighbours = sorted({math.floor(depth), math.ceil(depth)})
        if neighbours[0] < 1 or neighbours[-1] > full:
            return []
        return [DENSE if each == full else smaller(self.rung, each) for each in neighbours]

    def trials(self, arm: Arm, budget: float) -> dict[float, float]:
        """Return the losses of an arm's tuning so far, by learning rate."""
        return {
            row["lr"]: row["val_loss"] if math.isfinite(row["val_loss"]) else math.inf
            for row in self.finished_trials(arm, budget)
        }

    def finished_trials(self, arm: Arm, budget: float) -> list[Row]:
        """Return the trials of an arm at a budget that are in the log, as the registry has them now."""
        return [
            row
            for row in self.rows
            if (row["stage"], row["arm"], row["budget"]) == ("tune", arm.name, budget)
            and self._job(arm, "tune", budget, row["lr"], TUNING_SEED).config_hash == row["config"]
        ]

    def tuned(self, arm: Arm, budget: float) -> float | None:
        """Return the best learning rate at a budget, or ``None`` while it is not known."""
        losses = self.trials(arm, budget)
        if not all(rate in losses for rate in self.rung.grid) or self._next_trial(arm, losses) is not None:
            return None
        return best_rate(losses)

    def learning_rate(self, arm: Arm, budget: float) -> float | None:
        """Return the learning rate of an arm at a budget; ``None`` while it is not known.

        The dense one is tuned at several budgets. Another arm's is the dense one times what its own optimum was in
        parts of the dense one where both were tuned.
        """
        rates = {tuned: self.tuned(DENSE, tuned) for tuned in self.rung.tuned_budgets}
        dense = {tuned: rate for tuned, rate in rates.items() if rate is not None}
        factor = self.factor(arm)
        if len(dense) < len(rates) or factor is None:
            return None
        return float(f"{between(dense, budget) * factor * arm.lr_factor:.3g}")

    def factor(self, arm: Arm) -> float | None:
        """Return an arm's best learning rate in parts of the dense one at the budget of all tunings."""
        if arm.role == "dense" or arm.lr_of == DENSE_RATES:
            return 1.0
        power = 1.0
        if arm.lr_of == SMALLER_RATES:
            power, arm = self._way_from_full(arm), self.smaller_tuned
        budget = self.rung.tuned_budgets[0]
        own, dense = self.tuned(arm, budget), self.tuned(DENSE, budget)
        return None if own is None or dense is None else (own / dense) ** power

    def share(self, arm: Arm, budget: float) -> float | None:
        """Return what an arm costs in parts of a dense run of as many steps, once all its seeds are in the log."""
        found = self.finished(arm, budget)
        return (
            None
            if len(found) < len(self.seeds(arm, budget))
            else mean(row["flops"] / row["dense_flops"] for row in found)
        )

    def finished(self, arm: Arm, budget: float, share: float = 1.0) -> list[Row]:
        """Return the reported runs of an arm at a budget that are in the log, as the registry has them now."""
        wanted = {job.key for job in self.reported(arm, budget, share)}
        found = {row_key(row): row for row in self.rows if row["arm"] == arm.name}
        return [found[key] for key in sorted(wanted & set(found))]

    @cached_property
    def _block_share(self) -> float | None:
        """What a block costs in parts of a dense run, as trials of dense models tell; ``None`` while there are none."""
        trials = [self.finished_trials(arm, self.rung.tuned_budgets[0]) for arm in (self.smaller_tuned, DENSE)]
        if not all(trials):
            return None
        small, full = (mean(row["flops"] for row in rows) for rows in trials)
        return (1 - small / full) / (self._num_blocks - _SMALLER_TUNED)

    def _way_from_full(self, arm: Arm) -> float:
        """Return how far a smaller model is from the full one, in parts of the way to the tuned one, and at most 1."""
        if not self.rung.rates_by_depth:
            return 1.0
        full = self._num_blocks
        return min(1.0, math.log(full / arm.changes[self.rung.depth]) / math.log(full / _SMALLER_TUNED))

    @property
    def _num_blocks(self) -> int:
        return int(self.rung.model[self.rung.sizes][self.rung.depth])

    def _next_trial(self, arm: Arm, losses: dict[float, float]) -> float | None:
        return next_trial(losses, refined=arm == self.smaller_tuned, grid=self.rung.grid)

    def _job(self, arm: Arm, stage: str, budget: float, lr: float, seed: int, share: float = 1.0) -> Job:
        # Rounded up: a control must not get less than what it is held against.
        num_steps = math.ceil(budget * share * self.rung.unit_steps - 1e-9)
        is_read_in_midway = arm.role == "dense" and stage == "report" and share == 1.0 and budget > 1
        return Job(self.rung, arm, stage, budget, num_steps, lr, seed, curve=is_read_in_midway)


def row_key(row: Row) -> str:
    """Return the key of the job that a row came from."""
    return f"{row['rung']}.{row['arm']}.{row['stage']}.{row['budget']:g}.{row['config']}.{row['seed']}"


def b1_share(share: float) -> float:
    """Return the steps of the dense control of a method's cost, in parts of the method's own."""
    return math.ceil(share / _SHARE - 1e-6) * _SHARE


def shorter(share: float) -> Arm:
    """Return the control B1 of a method that costs a share of a dense run."""
    part = b1_share(share)
    if part == 1:
        return DENSE
    return Arm(f"dense-{part:g}", f"dense, {part:.1%} of the steps", "control", lr_of=DENSE_RATES)


def smaller(rung: Rung, depth: int) -> Arm:
    """Return a dense model with fewer blocks, of which two are the control B2 of a method."""
    title = f"dense, {depth} blocks"
    return Arm(f"smaller-{depth}", title, "control", changes={rung.depth: depth}, lr_of=SMALLER_RATES)
