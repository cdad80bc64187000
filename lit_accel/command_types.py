"""The order in which the command line tries the types that a value may have."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, get_args


def whole_numbers_first(function: Callable[..., Any]) -> None:
    """Have a whole number that is given for ``int | float`` stay one.

    Values are tried as the types of a union in their order, and typing takes ``Union[float, int]`` and
    ``Union[int, float]`` for one: whichever a program makes first stands for both. Up to some version torch makes the
    former, so that ``--trainer.limit_val_batches 2`` would be 2.0, which the Trainer refuses, as would the number of
    steps of a phase, since jsonargparse makes unions of its own. ``int | float`` keeps its order.

    Args:
        function: Its annotations are changed.
    """
    hints = function.__annotations__
    for name, hint in hints.items():
        kinds = list(get_args(hint))
        if {int, float} <= set(kinds):
            place = kinds.index(int)
            kinds.remove(int)
            # The others keep theirs: before text, or 0.25 would be one.
            kinds.insert(min(place, kinds.index(float)), int)
            hints[name] = reduce(operator.or_, kinds)
