"""How a process of a test dies."""

from __future__ import annotations

import os
import signal

import lightning.pytorch as L


class Kill(L.Callback):
    """Ends the process without a word, before an optimizer step and after any transition that precedes it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.strategy.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
