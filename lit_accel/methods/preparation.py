"""What every run with a method gets: one coordinator, a guard, and checkpoints that a killed write cannot destroy."""

from __future__ import annotations

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint

from lit_accel.checkpoints import write_atomically
from lit_accel.methods.coordinator import Coordinator, coordinator_of
from lit_accel.methods.guard import RollBack, TrainingGuard


def prepare_run(trainer: L.Trainer) -> Coordinator:
    """Check that the methods of a Trainer go together, and add what watches over them; the same again does no more.

    Args:
        trainer: The Trainer.

    Returns:
        Its coordinator.

    Raises:
        MisconfigurationException: If two methods do not go together, or one not with the strategy.
    """
    coordinator = coordinator_of(trainer)
    coordinator.check()
    if coordinator.methods:
        watch_over(trainer)
    return coordinator


def watch_over(trainer: L.Trainer) -> None:
    """Have checkpoints written atomically, and a guard after all methods and before what saves the model.

    What rolls back comes last: on an exception, others save what the run was stopped with.

    Args:
        trainer: The Trainer.
    """
    write_atomically(trainer)
    callbacks: list[L.Callback] = list(trainer.callbacks)  # type: ignore[attr-defined]
    guards = [callback for callback in callbacks if isinstance(callback, TrainingGuard)] or [TrainingGuard()]
    others = [callback for callback in callbacks if not isinstance(callback, (TrainingGuard, RollBack))]
    saving = [callback for callback in others if isinstance(callback, Checkpoint)]
    acting = [callback for callback in others if callback not in saving]
    rolling_back = [RollBack(guard) for guard in guards if guard.roll_back]
    trainer.callbacks = [*acting, *guards, *saving, *rolling_back]  # type: ignore[attr-defined]
