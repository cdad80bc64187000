"""Multiplying learning rates on top of whatever scheduler the user has, exactly and resumably.

The groups hold the multiplied rate, so that loggers show the rate that is used. Schedulers that compute their next
rate from the present one must see their own: a hook puts it back right after the optimizer's step, before the
scheduler's. Both values live in the group, and so in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

_SCHEDULED = "scheduled_lr"
_APPLIED = "applied_lr"


def apply_lr_factor(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Multiply the scheduled learning rates of all groups; calling it again changes nothing.

    Args:
        optimizers: The optimizers in use.
        factor: The factor for the coming step.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # A scheduler that stepped although the optimizer did not has put its own new rate there.
            scheduled = group[_SCHEDULED] if group["lr"] == group.get(_APPLIED) else group["lr"]
            group[_SCHEDULED] = scheduled
            group[_APPLIED] = group["lr"] = scheduled * factor


def restore_after_step(optimizers: Iterable[Optimizer]) -> None:
    """Have each optimizer put the scheduled learning rates back after each of its steps."""
    for optimizer in optimizers:
        optimizer.register_step_post_hook(_restore)


def _restore(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for group in optimizer.param_groups:
        if _APPLIED in group:
            del group[_APPLIED]
            group["lr"] = group.pop(_SCHEDULED)
