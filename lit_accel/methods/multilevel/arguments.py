"""Which arguments of multi-level training can be; each message says what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from lit_accel.arguments import did_you_mean, is_number, is_whole
from lit_accel.methods.multilevel.phases import Level, Phase

_Part = TypeVar("_Part", Level, Phase)


def as_parts(argument: str, kind: type[_Part], given: Any) -> list[_Part]:
    """Return levels or phases, also from mappings of their fields, as YAML writes them.

    Args:
        argument: Name of the argument.
        kind: What they are.
        given: Its value.

    Raises:
        ValueError: If it is no list of them, or a field of one is of a wrong type.
    """
    example = "[Level(width=2, depth=2)]" if kind is Level else "[Phase(0, 0.1), Phase(1, 0.5), Phase(0)]"
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)):
        raise ValueError(f"{argument} is {given!r}; it is a list, such as {example}.")
    parts = [_as_part(f"{argument}[{index}]", kind, value) for index, value in enumerate(given)]
    for index, part in enumerate(parts):
        _check(f"{argument}[{index}]", part)
    return parts


def _as_part(where: str, kind: type[_Part], value: Any) -> _Part:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        name = kind.__name__
        raise ValueError(f"{where}: {value!r} is no {name}; write {name}(...), or a mapping of its fields.")
    known = [field.name for field in fields(kind)]
    for name in value:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise ValueError(f"{where}: a {kind.__name__} has no {name!r}, but {', '.join(known)}.{hint}")
    if kind is Phase and "level" not in value:
        raise ValueError(f"{where} has no level. Say at which level the phase is; 0 is the full model.")
    return kind(**value)


def _check(where: str, part: Level | Phase) -> None:
    if isinstance(part, Level):
        depths = part.depth if isinstance(part.depth, (list, tuple)) else [part.depth]
        if not is_whole(part.width) or not depths or not all(map(is_whole, depths)):
            raise ValueError(
                f"{where}: width is {part.width!r} and depth {part.depth!r}; they are whole numbers by which the level "
                "above is divided, at least 1. depth may be a list with one for each stage."
            )
        if not is_whole(part.merge_batches, 1):
            raise ValueError(f"{where}: merge_batches is {part.merge_batches!r}; it is a whole number, at least 1.")
        return
    if not is_whole(part.level):
        raise ValueError(f"{where}: level is {part.level!r}; it is a whole number, 0 for the full model.")
    if part.length is not None and not is_number(part.length):
        raise ValueError(
            f"{where}: length is {part.length!r}; it is a number of optimizer steps (int), a share of the run (float "
            "from 0 to 1), or None for the rest of the run, in the last phase."
        )
    if not is_number(part.lr_scale):
        raise ValueError(f"{where}: lr_scale is {part.lr_scale!r}; it is a positive number.")
