"""Ranks that come apart, stand still or die: what one process of the tests does."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lit_accel import (
    Composition,
    MixedSparsityTraining,
    MultiLevelTraining,
    Phase,
    ProgressiveLayerDropping,
    RandomLTD,
    SensitivityLayerDropping,
    TrainingGuard,
)
from lit_accel.strategies import ResizableDDPStrategy, ResizableModelParallelStrategy
from tests.distributed.sharded import Host
from tests.training import make_trainer

STEPS, INTERVAL, ODD_STEP = 12, 4, 5
TIMEOUT = 8.0
"""Seconds after which a rank gives up waiting for another."""

CYCLE: dict[str, Any] = {"phases": [Phase(0, 2), Phase(1, 4), Phase(0)]}
SBLD: dict[str, Any] = {"kept": 0.9, "max_overhead": 1.0, "warmup": 1, "measure_every": 3}
# Of each method: what rank 0 is given, and what rank 1 is given besides.
METHODS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "cycle": (MultiLevelTraining, CYCLE, {"phases": [Phase(0, 3), Phase(1, 4), Phase(0)]}),
    "cycle-rule": (MultiLevelTraining, CYCLE, {"alpha": 0.25}),
    "pld": (ProgressiveLayerDropping, {}, {"theta": 0.8}),
    "sbld": (SensitivityLayerDropping, SBLD, {"estimator": "taylor"}),
    "ltd": (RandomLTD, {"start_tokens": 4, "quantum": 1}, {"start_tokens": 6}),
    "mst": (MixedSparsityTraining, {"stages": [(0, 0.0), (2, 0.5), (9, 0.0)], "quantum": 2}, {"seed": 1}),
    "rules": (Composition, {"dense_warmup": 2}, {"dense_warmup": 3}),
}
TITLES = {
    "cycle": "multi-level training",
    "cycle-rule": "multi-level training",
    "pld": "layer dropping",
    "sbld": "layer dropping",
    "ltd": "token dropping",
    "mst": "mixed sparsity",
    "rules": "composition",
}


def strategy_for(name: str, sharded: bool = False) -> Any:
    timeout = timedelta(seconds=TIMEOUT)
    if sharded:
        return ResizableModelParallelStrategy(timeout=timeout, save_distributed_checkpoint=False)
    if "cycle" in name:
        return ResizableDDPStrategy(timeout=timeout)
    return DDPStrategy(timeout=timeout, find_unused_parameters=True)


def fit(folder: Path, name: str, *others: L.Callback, changed: bool = False, sharded: bool = False) -> Host:
    kind, settings, change = METHODS[name]
    callbacks = [kind(**{**settings, **(change if changed else {})}), *others]
    if name == "rules":
        callbacks.append(ProgressiveLayerDropping())
    module = Host()
    trainer = make_trainer(
        folder,
        callbacks=callbacks,
        strategy=strategy_for(name, sharded),
        devices=2,
        max_steps=STEPS,
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(module, DataLoader(range(2 * STEPS), batch_size=1))
    except RuntimeError as error:
        (folder / f"{os.environ['RANK']}.txt").write_text(f"{len(module.losses)}\n{error}")
        raise SystemExit(3) from error
    return module


def with_other_settings(folder: Path, name: str, sharded: bool) -> None:
    fit(folder, name, changed=os.environ["RANK"] == "1", sharded=sharded)


class ComesApart(L.Callback):
    """Has a method of one rank decide something else from some step on, as after a bit that has flipped."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == ODD_STEP:
            method = trainer.callbacks[0]
            method.decision = lambda: "something else"


def with_other_decisions(folder: Path, name: str) -> None:
    fit(folder, name, ComesApart(), TrainingGuard(check_ranks_every=INTERVAL))


class Ends(L.Callback):
    """Stops or kills one rank at some step, wherever the others are."""

    def __init__(self, step: int, how: signal.Signals, folder: Path) -> None:
        self.step, self.how, self.folder = step, how, folder

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_rank == 1 and trainer.global_step == self.step:
            (self.folder / "ended").write_text(str(time.time()))
            os.kill(os.getpid(), self.how)


def losing_a_rank(folder: Path, name: str, how: signal.Signals, step: int, sharded: bool) -> None:
    fit(folder, name, Ends(step, how, folder), sharded=sharded)
