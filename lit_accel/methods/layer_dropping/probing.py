"""Calling a LightningModule's training step to measure it: no gradient, dropout, logging or use of random numbers.

What the step writes into its batch is lost too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lit_accel.methods.layer_dropping.copies import copy_of_batch
from lit_accel.methods.layer_dropping.sensitivity import evaluating


@contextmanager
def measuring(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Within it the module's training step can be called as often as needed, and leaves no trace.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
    """
    context = trainer.precision_plugin.train_step_context()
    with evaluating(pl_module), _silent(pl_module), _same_buffers(pl_module), context:
        yield


def training_loss(pl_module: L.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Return the loss that the module's training step computes for a batch.

    It is called on the module itself: a wrapper for distributed training would wait for a backward pass. The state of
    the random generators is the same afterwards, and so is the batch: the step gets a copy of it, for it may mask it in
    place or take the labels out, and is called with it again.

    Args:
        pl_module: The module.
        batch: A batch.
        batch_idx: Its index.

    Raises:
        MisconfigurationException: If it returns no loss.
        RuntimeError: If it fails.
    """
    batch = copy_of_batch(batch)
    arguments = (
        (batch, batch_idx) if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2) else (batch,)
    )
    # Each time from the same state: a step that draws, of masks say, is to be measured on equal terms.
    with isolate_rng():
        try:
            output: Any = pl_module.training_step(*arguments)
        except Exception as error:
            raise RuntimeError(
                f"The training step failed while sensitivities were measured, by {type(error).__name__}: {error}. It "
                "was called by SensitivityLayerDropping, with some blocks left out of the model: what those leave "
                "behind, such as their entries of hidden_states, is missing then. Use an estimator that needs no call "
                'of its own: "taylor", "ratio" or "cos".'
            ) from error
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"The training step returned {type(output).__name__} and no loss while sensitivities were measured. Use an "
            'estimator that needs no call of its own: "taylor", "ratio" or "cos".'
        )
    return loss


@contextmanager
def _silent(pl_module: L.LightningModule) -> Iterator[None]:
    names = ("log", "log_dict")
    for name in names:
        vars(pl_module)[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in names:
            del vars(pl_module)[name]


@contextmanager
def _same_buffers(pl_module: L.LightningModule) -> Iterator[None]:
    """Give buffers back the values that they had: a training step may count, or keep a running mean."""
    buffers = [
        (part, name, buffer, buffer.clone())
        for part in pl_module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for part, name, buffer, values in buffers:
            part._buffers[name] = buffer.copy_(values)
