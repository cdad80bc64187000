"""Multiplying learning rates on top of whatever scheduler the user has, exactly and resumably.

The groups hold the multiplied rate, so that loggers show the rate that is used. Schedulers that compute their next
rate from the present one must see their own, so it is put back before they step. Both values live in the group, and
so in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lit_accel.warmup_decay import SCHEDULED_LR

if TYPE_CHECKING:
    # A Trainer is worked on, but none is needed: the core imports no Lightning.
    import lightning.pytorch as L


class LearningRateFactor:
    """Multiplies the learning rates of a run, and steps aside whenever its schedulers step.

    Args:
        trainer: The Trainer.
        pl_module: Its module, whose ``lr_scheduler_step`` is changed until :meth:`close`.
    """

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer, self._module = trainer, pl_module
        pl_module.lr_scheduler_step = _RestoreThenStep(trainer, pl_module)  # type: ignore[assignment, method-assign]

    def apply(self, factor: float) -> None:
        """Set the factor of the coming step."""
        apply_lr_factor(self._trainer.optimizers, factor)

    def close(self) -> None:
        """Give the module its own ``lr_scheduler_step`` back."""
        vars(self._module).pop("lr_scheduler_step", None)


class _RestoreThenStep:
    """Takes the place of a module's ``lr_scheduler_step``; a copy of the module has its own again.

    A bound method would take the whole Trainer along where a module is copied or pickled in mid-run.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
    """

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer, self._module = trainer, pl_module
        # Under this name Lightning finds out whether the user has overridden the hook.
        self.__wrapped__ = pl_module.lr_scheduler_step

    def __call__(self, *args: Any) -> None:
        restore_scheduled_lr(self._trainer.optimizers)
        self.__wrapped__(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # The copy of the module has no attributes yet when this is called with it, and so its class's own is found.
        return getattr, (self._module, "lr_scheduler_step")


def apply_lr_factor(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Multiply the scheduled learning rates of all groups; calling it again replaces the factor.

    Args:
        optimizers: The optimizers in use.
        factor: The factor for the coming step.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            scheduled = group.setdefault(SCHEDULED_LR, group["lr"])
            group["lr"] = scheduled * factor


def restore_scheduled_lr(optimizers: Iterable[Optimizer]) -> None:
    """Put the scheduled learning rates back, for a scheduler that is about to step or a run without a factor.

    Args:
        optimizers: The optimizers in use.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if SCHEDULED_LR in group:
                group["lr"] = group.pop(SCHEDULED_LR)
