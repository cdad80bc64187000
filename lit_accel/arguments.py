"""Checks of single arguments; each message says what was given and what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any


def require_whole(name: str, value: Any, least: int | None = None, *, of: str = "") -> None:
    """Check that an argument is a whole number.

    Args:
        name: Its name.
        value: What was given.
        least: The least that it may be.
        of: What is counted, for the message.

    Raises:
        ValueError: If it is not.
    """
    if not is_whole(value, least):
        at_least = "" if least is None else f", at least {least}"
        raise ValueError(f"{name} is {value!r}; it is a {'whole number' if not of else f'number of {of}'}{at_least}.")


def require_number(name: str, value: Any, low: float, high: float = math.inf, *, what: str) -> None:
    """Check that an argument is a finite number in a range, its bounds included.

    Args:
        name: Its name.
        value: What was given.
        low: The least that it may be.
        high: The most.
        what: What it is, for the message, with its range.

    Raises:
        ValueError: If it is not.
    """
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it is {what}.")


def require_duration(name: str, value: Any) -> None:
    """Check that an argument is a number of optimizer steps (int) or a share of the run (float).

    Args:
        name: Its name.
        value: What was given.

    Raises:
        ValueError: If it is not.
    """
    if not is_number(value) or value < 0 or (isinstance(value, float) and value > 1):
        raise ValueError(
            f"{name} is {value!r}; it is a number of optimizer steps (int), or a share of the run (float from 0 to 1)."
        )


def require_one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Check that an argument is one of some values.

    Args:
        name: Its name.
        value: What was given.
        allowed: What it may be.

    Raises:
        ValueError: If it is not.
    """
    if value in allowed:
        return
    hint = did_you_mean(str(value), [each for each in allowed if isinstance(each, str)])
    raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}.{hint}")


def require_indices(name: str, value: Any) -> None:
    """Check that an argument names blocks, or nothing.

    Args:
        name: Its name.
        value: What was given.

    Raises:
        ValueError: If it does not.
    """
    is_list = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    if not is_list or any(isinstance(index, bool) or not isinstance(index, int) for index in value):
        raise ValueError(f"{name} is {value!r}; it lists blocks by their indices, which are integers: [0, -1].")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question after the nearest known name, with a blank before it; nothing if none is near.

    Args:
        name: What was given.
        known: What there is.
    """
    close = difflib.get_close_matches(name, sorted(set(known)), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def is_whole(value: Any, least: int | None = None) -> bool:
    """Whether a value is a whole number, no truth value, and not below another."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
