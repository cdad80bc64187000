"""Which arguments of multi-level training can be; each message says what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar, get_args

from lightning.pytorch.utilities import rank_zero_warn

from lit_accel.arguments import did_you_mean, is_number, is_whole, require_one_of, require_whole
from lit_accel.methods.multilevel.maps import DepthGrouping, DepthMode, WidthGrouping
from lit_accel.methods.multilevel.moments import OptimizerStatePolicy
from lit_accel.methods.multilevel.phases import LearningRatePolicy, Level, Phase, reduces_depth
from lit_accel.methods.multilevel.presets import PresetName

_Part = TypeVar("_Part", Level, Phase)


def check_choices(
    preset: object,
    width_grouping: object,
    depth_grouping: object,
    depth_mode: object,
    optimizer_state: object,
    learning_rate: object,
) -> None:
    """Check the arguments of which there are so many values; the last three may be the preset's, ``None``.

    Raises:
        ValueError: If one is none of them.
    """
    require_one_of("preset", preset, get_args(PresetName))
    require_one_of("width_grouping", width_grouping, get_args(WidthGrouping))
    require_one_of("depth_grouping", depth_grouping, get_args(DepthGrouping))
    require_one_of("depth_mode", depth_mode, (None, *get_args(DepthMode)))
    require_one_of("optimizer_state", optimizer_state, (None, *get_args(OptimizerStatePolicy)))
    require_one_of("learning_rate", learning_rate, (None, *get_args(LearningRatePolicy)))


def check_numbers(
    rule: Mapping[str, object], start_level: int, num_rewarm_steps: int | None, fresh_std: float | None
) -> None:
    """Check the arguments that are numbers.

    Args:
        rule: Coefficients of the interpolation, by name.
        start_level: See :class:`~lit_accel.MultiLevelTraining`.
        num_rewarm_steps: See there.
        fresh_std: See there.

    Raises:
        ValueError: If one is none, or out of its range.
    """
    for argument, number in {**rule, "fresh_std": fresh_std}.items():
        if number is not None and not is_number(number):
            raise ValueError(f"{argument} is {number!r}; it is a number, or None for that of the preset.")
    require_whole("start_level", start_level)
    if num_rewarm_steps is not None:
        require_whole("num_rewarm_steps", num_rewarm_steps, 1, of="optimizer steps")
    if fresh_std is not None:
        if fresh_std < 0:
            raise ValueError(f"fresh_std is {fresh_std}; it is a standard deviation and must not be negative.")
        if not start_level:
            rank_zero_warn("fresh_std is ignored: it is for growth from a small model, start_level is 0.")


def check_levels(levels: Sequence[Level], start_level: int) -> None:
    """Check that each level is smaller than the one above it, and that a run can start at one of them.

    Args:
        levels: The smaller levels.
        start_level: Where it starts.

    Raises:
        ValueError: If not.
    """
    if not levels:
        raise ValueError("levels is empty; give at least one smaller level.")
    if flat := [level for level in levels if level.width == 1 and not reduces_depth(level)]:
        raise ValueError(f"{flat[0]} is no smaller than the level above it; give a width or depth of at least 2.")
    if not 0 <= start_level <= len(levels):
        raise ValueError(f"start_level is {start_level}; levels are 0 (the full model) to {len(levels)}.")


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
