"""How many optimizer steps a run has, for whatever is placed by its length."""

from __future__ import annotations

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
    num_steps = trainer.estimated_stepping_batches
    if num_steps in (float("inf"), -1):
        raise MisconfigurationException(
            f"{who} must know how long the run is. Give the Trainer max_steps, or max_epochs with a data loader of "
            f"known length{otherwise}."
        )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if trainer.max_epochs != -1 and any(isinstance(each, GradientAccumulationScheduler) for each in callbacks):
        raise MisconfigurationException(
            f"{who} must know how long the run is, and its length in epochs does not say so beside "
            "GradientAccumulationScheduler: how many batches make a step changes from epoch to epoch. Give the Trainer "
            f"max_steps and max_epochs=-1{otherwise}."
        )
    return int(num_steps)
