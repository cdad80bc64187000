"""How many optimizer steps a run has, for whatever is placed by its length."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def length_of_run(trainer: L.Trainer, who: str, otherwise: str = "") -> int:
    """Return the optimizer steps of a run, as Lightning estimates them.

    Args:
        trainer: The Trainer, with its data.
        who: Who asks, for messages.
        otherwise: What else could be done, for messages.

    Raises:
        MisconfigurationException: If nothing says how long the run is, or Lightning's estimate would be wrong.
    """
    num_steps = estimated_steps(trainer)
    if num_steps is None:
        raise MisconfigurationException(
            f"{who} must know how long the run is. Give the Trainer max_steps, or max_epochs with a data loader of "
            f"known length{otherwise}."
        )
    if trainer.max_epochs == -1:
        return num_steps
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(each, GradientAccumulationScheduler) for each in callbacks):
        raise MisconfigurationException(
            f"{who} must know how long the run is, and its length in epochs does not say so beside "
            "GradientAccumulationScheduler: how many batches make a step changes from epoch to epoch. Give the Trainer "
            f"max_steps and max_epochs=-1{otherwise}."
        )
    if math.isinf(trainer.num_training_batches):
        raise MisconfigurationException(
            f"{who} must know how long the run is, and whether max_steps={trainer.max_steps} or "
            f"max_epochs={trainer.max_epochs} ends it cannot be known where the data loader has no length. Give the "
            f"Trainer max_epochs=-1, so that max_steps does{otherwise}."
        )
    return num_steps


def estimated_steps(trainer: L.Trainer) -> int | None:
    """Return Lightning's estimate of a run's optimizer steps; ``None`` where it is unknown or endless.

    For a length in epochs Lightning asks for the training data to count them. Where a checkpoint is yet to be loaded,
    it asks for them again afterwards: loaders with a state of their own get it when they are asked for, and others may
    look at the present epoch.

    Args:
        trainer: The Trainer, with its data.
    """
    had_data = trainer.train_dataloader is not None
    num_steps = trainer.estimated_stepping_batches
    if not had_data and trainer.train_dataloader is not None and trainer.ckpt_path is not None:
        _ask_again_after_loading(trainer.fit_loop)
    return None if num_steps in (float("inf"), -1) else int(num_steps)


def _ask_again_after_loading(fit_loop: Any) -> None:
    load = fit_loop.on_load_checkpoint

    def on_load_checkpoint(state_dict: dict[str, Any]) -> None:
        del fit_loop.on_load_checkpoint
        load(state_dict)
        fit_loop._combined_loader = None

    fit_loop.on_load_checkpoint = on_load_checkpoint
