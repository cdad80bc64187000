"""Seconds that can be compared: CPU time of training alone, in units of a dense step on the same machine just then.

Wall time on a shared machine varies severalfold, and CPU time by tens of percent. So a few dense steps are timed right
before and right after each run, and what a run took is said in dense steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

import lit_accel.tasks
from scripts.bench.data import data_of
from scripts.bench.study import Rung

_STEPS, _WARMUP = 12, 3


class CpuClock(L.Callback):
    """CPU seconds of this process from the start to the end of training, without validation."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self._since = time.process_time()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        self._stop()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        self._stop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start again; ``trainer.training`` would not say yet that training goes on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._since = time.process_time()

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.process_time() - self._since
            self._since = None


def reference_step(rung: Rung) -> float:
    """Return the CPU seconds of a dense optimizer step: the median of a few."""
    if rung.name not in _steps:
        _steps[rung.name] = _dense_step(rung)
    step = _steps[rung.name]
    seconds = []
    for _ in range(_WARMUP + _STEPS):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    return sorted(seconds[_WARMUP:])[_STEPS // 2]


_steps: dict[str, Callable[[], None]] = {}


def _dense_step(rung: Rung) -> Callable[[], None]:
    with torch.random.fork_rng():
        task = getattr(lit_accel.tasks, rung.task)(**rung.model)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    data = data_of(rung, 0)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    inputs = batch["input_ids"] if isinstance(batch, dict) else batch[0]

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = task(inputs).flatten(0, -2)
            loss = torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()

    return step
