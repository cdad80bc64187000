"""Exact resume for models that draw random numbers themselves."""

from __future__ import annotations

import os
import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch

from lit_accel.data_parallel import data_rank
from lit_accel.draws import generator

_BATCH = 9  # sets these seeds apart from other draws


class BatchSeed(L.Callback):
    """Seeds the global generators anew for each training batch, from its place in the run.

    A checkpoint of Lightning does not hold the state of random generators: dropout and stochastic depth draw other
    numbers after a resume than they would have drawn, and the run ends elsewhere. With this callback what they draw
    depends only on the seed, the epoch, the batch and which part of the data the process sees, and a resumed run is
    bitwise the uninterrupted one, if it gets the same batches. Those of :mod:`lit_accel.data` do; a
    ``DataLoader(shuffle=True)``, which draws its order before its first batch, does not. The methods of lit-accel need
    it not: they draw from generators of their own.

    Generators of Python, NumPy and torch are seeded, on all devices.

    Args:
        seed: Seed of the run. Default: that of Lightning's ``seed_everything``, so that runs with other seeds draw
            other numbers; 0 if there was none.

    Raises:
        ValueError: If ``seed`` is no integer.

    Example::

        Trainer(callbacks=[RandomLTD(), BatchSeed()])
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ValueError(f"seed is {seed!r}; it is an integer, or None for that of seed_everything.")
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators."""
        # Where Lightning leaves it, for workers and other processes.
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        keys = (seed, _BATCH, trainer.current_epoch, batch_idx, data_rank(trainer))
        seed = generator(*keys).initial_seed() % 2**32  # what NumPy takes
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
