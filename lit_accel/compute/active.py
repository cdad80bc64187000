"""What of a transformer takes part in its calls, where a method has switched units of it off: for the accounting."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Active:
    """The part of a model that its calls are charged for.

    Args:
        entries: Active entries of parameters, by name; those that are not named are whole.
        widths: Active heads times ``head_dim``, by index of the block; those that are not named are whole.
        pairs: Pairs of a query and a key that attention computes in one head over a sequence of so many tokens, where a
            pattern takes the place of the model's own mask.
        has_dense_gradients: Whether the gradients of whole matrices are computed, though only active entries are used.
        stage: Which stage of a schedule this belongs to: the accounting begins a phase with each.
        num_parameters: Parameters that take part, tied ones once.
    """

    entries: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[int, int] = field(default_factory=dict)
    pairs: Callable[[int], int] | None = None
    has_dense_gradients: bool = False
    stage: int = 0
    num_parameters: int = 0


_ACTIVE: weakref.WeakKeyDictionary[nn.Module, Active] = weakref.WeakKeyDictionary()


def set_active(transformer: nn.Module, active: Active | None) -> None:
    """Say what of a transformer takes part in its calls from now on.

    Args:
        transformer: The model.
        active: The part; ``None`` for all of it.
    """
    if active is None:
        _ACTIVE.pop(transformer, None)
    else:
        _ACTIVE[transformer] = active


def active_of(transformer: nn.Module) -> Active | None:
    """Return what of a transformer takes part in its calls; ``None`` for all of it.

    Args:
        transformer: The model.
    """
    return _ACTIVE.get(transformer)
