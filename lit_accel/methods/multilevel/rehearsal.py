"""Doing with a model of another size what will be done after a change of size, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng

from lit_accel.anatomy import Size, anatomy_of, build_resized
from lit_accel.methods.untraced import call_training_step, untraced
from lit_accel.resizing import replace_transformer, require_all_optimized
from lit_accel.strategies.resizing import group_options, require_same_groups


def rehearse_optimizers(trainer: L.Trainer, module: L.LightningModule, path: str, size: Size) -> None:
    """See that the optimizers of a module can go on when its transformer has another size.

    What ``configure_optimizers`` assigns to attributes of the module is undone.

    Args:
        trainer: The Trainer, with the optimizers of the present size.
        module: Its module.
        path: Where in it the transformer is.
        size: The other size.

    Raises:
        MisconfigurationException: If ``configure_optimizers`` returns other numbers of parameter groups, or optimizers
            that do not hold the parameters of the new model.
    """
    with isolate_rng(), _of_other_size(trainer, module, path, size):
        optimizers, _ = _init_optimizers_and_lr_schedulers(module)
        require_all_optimized(module, optimizers)
    require_same_groups([group_options(optimizer) for optimizer in trainer.optimizers], optimizers)


def rehearse_training_step(
    trainer: L.Trainer, module: L.LightningModule, path: str, size: Size, batch: Any, batch_idx: int
) -> None:
    """See that the training step of a module works when its transformer has another size.

    It leaves no trace but what the step keeps in plain attributes of other objects than the module.

    Args:
        trainer: The Trainer.
        module: Its module.
        path: Where in it the transformer is.
        size: The other size.
        batch: A batch.
        batch_idx: Its index.

    Raises:
        MisconfigurationException: If the step fails, and does not with the present size.
    """
    with _of_other_size(trainer, module, path, size), untraced(trainer, module):
        # What was only allocated may hold anything, and a step may refuse what is not finite.
        for parameter in module.get_submodule(path).parameters():
            parameter.data.zero_()
        failure = _failure(module, batch, batch_idx)
    if failure is None:
        return
    with untraced(trainer, module):
        if _failure(module, batch, batch_idx) is not None:
            # Not for its size: training will say it better.
            return
    raise MisconfigurationException(
        f"With {path} at another size, {size.to_state()}, the training step fails by {type(failure).__name__}: "
        f"{failure}. What lies outside of {path} is not resized: use the model's own class with a head, such as "
        "AutoModelForSequenceClassification, or width 1 in every level."
    ) from failure


def _failure(module: L.LightningModule, batch: Any, batch_idx: int) -> Exception | None:
    try:
        call_training_step(module, batch, batch_idx)
    except Exception as error:
        return error
    return None


@contextmanager
def _of_other_size(trainer: L.Trainer, module: L.LightningModule, path: str, size: Size) -> Iterator[None]:
    """Put a model of another size into the module, without weights; then all of its attributes are what they were."""
    attributes, transformer = dict(vars(module)), module.get_submodule(path)
    # Not the strategy's device: where a run is planned, the model has none.
    with next(transformer.parameters()).device, trainer.precision_plugin.module_init_context():
        other = build_resized(transformer, anatomy_of(transformer), size)
    replace_transformer(module, path, other)
    try:
        yield
    finally:
        replace_transformer(module, path, transformer)
        vars(module).clear()
        vars(module).update(attributes)
