"""Calling ``configure_optimizers`` for a model of another size before training, as the first change of size will."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as L
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lit_accel.anatomy import Size, anatomy_of, build_resized
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
    transformer = module.get_submodule(path)
    strategy = trainer.strategy
    with (
        strategy.tensor_init_context(),
        strategy.model_sharded_context(),
        strategy.precision_plugin.module_init_context(),
        isolate_rng(),
    ):
        other = build_resized(transformer, anatomy_of(transformer), size)
        with _replaced(module, path, other):
            optimizers, _ = _init_optimizers_and_lr_schedulers(module)
            require_all_optimized(module, optimizers)
    require_same_groups([group_options(optimizer) for optimizer in trainer.optimizers], optimizers)


@contextmanager
def _replaced(module: L.LightningModule, path: str, other: nn.Module) -> Iterator[None]:
    attributes, transformer = dict(vars(module)), module.get_submodule(path)
    replace_transformer(module, path, other)
    try:
        yield
    finally:
        replace_transformer(module, path, transformer)
        vars(module).clear()
        vars(module).update(attributes)
