"""Multiplying learning rates on top of whatever scheduler the user has, exactly and resumably.

The groups hold the multiplied rate, so that loggers show the rate that is used. Schedulers that compute their next
rate from the present one must see their own, so it is put back before they step. Both values live in the group, and
so in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

_SCHEDULED = "scheduled_lr"


def apply_lr_factor(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Multiply the scheduled learning rates of all groups; calling it again replaces the factor.

    Args:
        optimizers: The optimizers in use.
        factor: The factor for the coming step.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            scheduled = group.setdefault(_SCHEDULED, group["lr"])
            group["lr"] = scheduled * factor


def restore_scheduled_lr(optimizers: Iterable[Optimizer]) -> None:
    """Put the scheduled learning rates back, for a scheduler that is about to step.

    Args:
        optimizers: The optimizers in use.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if _SCHEDULED in group:
                group["lr"] = group.pop(_SCHEDULED)
