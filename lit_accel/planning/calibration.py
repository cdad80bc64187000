"""Seconds of a run, predicted from some of its steps: they are really trained, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.compute.plan import RunPlan
from lit_accel.compute.stopwatch import synchronize
from lit_accel.methods.composition import Composition
from lit_accel.methods.method import Method

NUM_TIMED = 5
"""Steps that are timed at each place of the run."""


def calibrate(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: Any,
    plan: RunPlan,
) -> tuple[float, ...]:
    """Predict the seconds of each phase of a run.

    In each phase steps are trained at its start, its end and where it costs least and most, by the run's own
    methods: what decides by the optimizer step is told that it is there. A straight line through what they took
    says what the other steps of the phase take. Validation, checkpoints and logging are left out, as is what a
    change of size costs the first time that a size is met (compilation).

    Args:
        trainer: A Trainer like that of the run; its other callbacks, loggers and validation are left out. It must not
            be used to train afterwards.
        module: Its module, with weights, which are trained for some steps.
        data: Its data module or training loader; ``None`` if the module brings its own.
        plan: What the run costs.

    Returns:
        Seconds of each phase.

    Raises:
        MisconfigurationException: If the module optimizes by hand.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "A calibration jumps to places of the run, and with manual optimization only the module knows where it is. "
            "Leave calibrate out."
        )
    kept = _ours(trainer)
    # Who measures the model needs some more steps until it is done.
    num_untimed = 1 + max((getattr(method, "num_batches", 0) for method in kept), default=0)
    jumps = _Jumps(plan, _places(plan, num_untimed + NUM_TIMED), num_untimed)
    trainer.callbacks = [*kept, jumps]  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.limit_val_batches = 0
    trainer.fit(module, data)
    return tuple(_seconds_of(plan, index, jumps.timed) for index in range(len(plan.phases)))


def _places(plan: RunPlan, length: int) -> list[int]:
    """Return the first steps of what is to be trained: each phase's start, end, and where it costs least and most."""
    places: set[int] = set()
    ends = [*(phase.start for phase in plan.phases[1:]), plan.num_steps]
    for phase, end in zip(plan.phases, ends, strict=True):
        last = max(phase.start, end - length)
        # With a view to all that follows: single steps may be cheap or dear by a draw.
        candidates = range(phase.start, last + 1, max(1, (last - phase.start) // 50))
        around = {step: _mean_cost(plan, step, min(step + length, end)) for step in candidates}
        places |= {phase.start, min(around, key=around.__getitem__), max(around, key=around.__getitem__), last}
    return sorted(places)


def _mean_cost(plan: RunPlan, start: int, end: int) -> float:
    return statistics.fmean(plan.step_flops[step // plan.stride] for step in range(start, end))


def _ours(trainer: L.Trainer) -> list[L.Callback]:
    return [c for c in trainer.callbacks if isinstance(c, Method | Composition)]  # type: ignore[attr-defined]


class _Jumps(L.Callback):
    """Has a Trainer train at some places of its run, and times it.

    Args:
        plan: The run.
        places: Steps at which to begin, in order.
        num_untimed: Steps at each place before time is taken.
    """

    def __init__(self, plan: RunPlan, places: Sequence[int], num_untimed: int) -> None:
        self._plan, self._places, self._num_untimed = plan, list(places), num_untimed
        self._step, self._end, self._mark = 0, 0, 0.0
        self.timed: list[tuple[int, list[float]]] = []
        """The first step of each place, and the seconds of each step there."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Those that the module has brought along by now.
        trainer.callbacks = [*_ours(trainer), self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._jump(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        synchronize(trainer.strategy.root_device)
        now = time.perf_counter()
        seconds = self.timed[-1][1]
        seconds.append(now - self._mark)
        self._mark, self._step = now, trainer.global_step
        if len(seconds) < self._num_untimed + NUM_TIMED and trainer.global_step < self._end:
            return
        # Places may lie within what was trained from the place before.
        self._places = [place for place in self._places if place >= trainer.global_step]
        if self._places:
            self._jump(trainer)
        else:
            trainer.should_stop = True
            for callback in _ours(trainer):
                # These few steps are no run to draw a picture of.
                history = getattr(callback, "history", None)
                if history is not None:
                    history.measured_at.clear()

    def _jump(self, trainer: L.Trainer) -> None:
        self._step = self._places.pop(0)
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        progress.ready = progress.completed = self._step
        self.timed.append((self._step, []))
        ends = (phase.start + phase.steps for phase in self._plan.phases)
        self._end = next((end for end in ends if end > self._step), self._plan.num_steps)
        self._mark = time.perf_counter()


def _seconds_of(plan: RunPlan, index: int, timed: Sequence[tuple[int, list[float]]]) -> float:
    phase = plan.phases[index]
    end = plan.phases[index + 1].start if index + 1 < len(plan.phases) else plan.num_steps
    points = []
    change = 0.0
    for start, seconds in timed:
        if not phase.start <= start < end or not seconds:
            continue
        # The first steps of a place hold what changes there; a phase of few steps has no others.
        steady = seconds[-NUM_TIMED:] if len(seconds) > NUM_TIMED else seconds[-1:]
        typical = statistics.median(steady)
        points.append((_mean_cost(plan, start + len(seconds) - len(steady), start + len(seconds)), typical))
        if start == phase.start:
            change = max(0.0, seconds[0] - typical)
    if not points:
        return 0.0
    slope, base = _line(points)
    costs = plan.step_flops[-(-phase.start // plan.stride) : -(-end // plan.stride)]
    return change + phase.steps * statistics.fmean(base + slope * cost for cost in costs)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return slope and intercept of the line through FLOPs and seconds of steps; neither is negative."""
    costs, seconds = zip(*points, strict=True)
    mean_cost, mean_seconds = statistics.fmean(costs), statistics.fmean(seconds)
    spread = sum((cost - mean_cost) ** 2 for cost in costs)
    # Costs that are nearly the same say nothing about the slope.
    if spread < len(costs) * (0.02 * mean_cost) ** 2:
        return 0.0, mean_seconds
    slope = sum((c - mean_cost) * (s - mean_seconds) for c, s in points) / spread
    slope = min(max(slope, 0.0), mean_seconds / mean_cost)
    return slope, mean_seconds - slope * mean_cost
