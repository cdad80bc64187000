"""A copy of a batch, for a training step that may write into what it is given or take it apart."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def copy_of_batch(batch: Any) -> Any:
    """Return a batch with its own containers and tensors; what is neither is the same object.

    Dictionaries of all kinds (``BatchEncoding`` is one), lists, tuples and dataclasses are containers. What stands in
    a batch twice stands in the copy twice.

    Args:
        batch: The batch.
    """
    return _copy(batch, {})


def _copy(value: Any, made: dict[int, tuple[Any, Any]]) -> Any:
    if id(value) not in made:
        # With the original, so that nothing else gets its id.
        made[id(value)] = value, _make(value, made)
    return made[id(value)][1]


def _make(value: Any, made: dict[int, tuple[Any, Any]]) -> Any:
    if isinstance(value, Tensor):
        # Not deepcopy, which copies the whole storage: a batch may be a view of all data.
        return value.detach().clone()
    if isinstance(value, tuple):
        items = [_copy(item, made) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    # The others are copied as what they are, with all that a subclass adds, and filled anew.
    if isinstance(value, MutableMapping):
        mapping = copy.copy(value)
        for key, item in value.items():
            mapping[key] = _copy(item, made)
        return mapping
    if isinstance(value, list):
        items = copy.copy(value)
        items[:] = [_copy(item, made) for item in value]
        return items
    if is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in fields(value):
            # The setter of a frozen one refuses.
            object.__setattr__(result, field.name, _copy(getattr(value, field.name), made))
        return result
    return value
