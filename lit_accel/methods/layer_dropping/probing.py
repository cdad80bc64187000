"""Calling a LightningModule's training step to measure it: no gradient, dropout, logging or use of random numbers.

What the step writes into its batch is lost too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_accel.methods.layer_dropping.sensitivity import evaluating
from lit_accel.methods.untraced import call_training_step, untraced


@contextmanager
def measuring(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Within it the module's training step can be called as often as needed, and leaves no trace.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
    """
    with evaluating(pl_module), untraced(trainer, pl_module):
        yield


def training_loss(pl_module: L.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Return the loss that the module's training step computes for a copy of a batch.

    Args:
        pl_module: The module.
        batch: A batch.
        batch_idx: Its index.

    Raises:
        MisconfigurationException: If what it returns holds no loss.
        RuntimeError: If it fails.
    """
    try:
        output: Any = call_training_step(pl_module, batch, batch_idx)
    except Exception as error:
        raise RuntimeError(
            f"The training step failed while sensitivities were measured, by {type(error).__name__}: {error}. It "
            "was called by SensitivityLayerDropping, with some blocks left out of the model: what those leave "
            "behind, such as their entries of hidden_states, is missing then. Use an estimator that needs no call "
            'of its own: "taylor", "ratio" or "cos".'
        ) from error
    if output is None:
        # How a step says that it takes no notice of a batch, such as one whose loss is not finite.
        return torch.tensor(math.nan)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"The training step returned {type(output).__name__} and no loss while sensitivities were measured. Use an "
            'estimator that needs no call of its own: "taylor", "ratio" or "cos".'
        )
    return loss
