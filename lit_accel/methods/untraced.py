"""Calling a LightningModule's training step for other purposes than training, so that nothing is left of the call.

What the step itself counts or collects in plain attributes is beyond us.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lit_accel.methods.batch_copy import copy_of_batch

# What torch keeps children in: to copy those would not keep what is in them.
_CHILDREN = ("_modules", "_parameters", "_buffers")


@contextmanager
def untraced(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Within it the training step logs nothing; afterwards buffers and metrics are what they were.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
    """
    context = trainer.precision_plugin.train_step_context()
    with _silent(pl_module), _same_buffers(pl_module), _same_metrics(pl_module), context:
        yield


def call_training_step(pl_module: L.LightningModule, batch: Any, batch_idx: int) -> Any:
    """Return what the module's training step makes of a batch.

    It is called on the module itself: a wrapper for distributed training would wait for a backward pass. The state of
    the random generators is the same afterwards, and so is the batch: the step gets a copy of it, for it may mask it in
    place or take the labels out, and is called with it again.

    Args:
        pl_module: The module.
        batch: A batch.
        batch_idx: Its index.
    """
    batch = copy_of_batch(batch)
    arguments = (
        (batch, batch_idx) if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2) else (batch,)
    )
    # Each time from the same state: a step that draws, of masks say, is to be called on equal terms.
    with isolate_rng():
        return pl_module.training_step(*arguments)


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


@contextmanager
def _same_metrics(pl_module: L.LightningModule) -> Iterator[None]:
    """Give metrics back what they had counted; their states are no buffers."""
    kept = [
        (part, {name: _kept(value) for name, value in vars(part).items() if name not in _CHILDREN})
        for part in pl_module.modules()
        if isinstance(part, (Metric, MetricCollection))
    ]
    try:
        yield
    finally:
        for part, attributes in kept:
            vars(part).update(attributes)


def _kept(value: Any) -> Any:
    """Return a value that no update in place changes."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value
