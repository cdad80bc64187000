"""Translating the random-LTD section of a DeepSpeed configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PATH = ("data_efficiency", "data_routing", "random_ltd")
# What DeepSpeed needs for its own engine, and what is worked out here.
_UNUSED = {"model_mask_name", "model_type", "hidden_state_order", "micro_batch_size", "global_batch_size"}
_KNOWN = {
    "enabled",
    "total_layer_num",
    "random_ltd_layer_num",
    "random_ltd_layer_id",
    "random_ltd_schedule",
    "layer_token_lr_schedule",
}


def translate(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Return the arguments of :class:`~lit_accel.RandomLTD` that do what a configuration says.

    Args:
        config: The configuration, its ``random_ltd`` section, or a JSON file with one of them.

    Raises:
        ValueError: If there is no such section, it is not enabled, or a value is missing or cannot be translated.
    """
    given: Any = json.loads(Path(config).read_text()) if isinstance(config, (str, Path)) else config
    if not isinstance(given, Mapping):
        raise ValueError(f"A DeepSpeed configuration is a mapping; this is a {type(given).__name__}.")
    section, seed = given, None
    where = ".".join(_PATH)
    for name in _PATH:
        if name in section:
            section = section[name] if isinstance(section[name], Mapping) else {}
            seed = section.get("seed", seed)
            if section.get("enabled") is False:
                raise ValueError(f'"{name}" of "{where}" is not enabled: leave the callback out.')
    if "random_ltd_schedule" not in section:
        raise ValueError(f'No section "{where}" with a "random_ltd_schedule" was found; the keys are {list(section)}.')
    if not section.get("enabled"):
        raise ValueError(f'"{where}" is not enabled: leave the callback out.')
    if unknown := section.keys() - _KNOWN - _UNUSED:
        raise ValueError(f'"{where}" has the unknown keys {sorted(unknown)}.')
    if section.get("layer_token_lr_schedule", {}).get("enabled"):
        raise ValueError(
            f'"{where}" enables "layer_token_lr_schedule", which DeepSpeed never released. Use lit_accel.LayerTokenLR '
            "as the scheduler, and disable the section."
        )
    schedule = section["random_ltd_schedule"]
    if schedule.get("schedule_type", "fixed_linear") != "fixed_linear":
        raise ValueError(f'schedule_type is {schedule["schedule_type"]!r}; DeepSpeed knows "fixed_linear" only.')
    try:
        growth = schedule["schedule_config"]
        num_blocks, blocks = section["total_layer_num"], set(section["random_ltd_layer_id"])
        if section.get("random_ltd_layer_num", len(blocks)) != len(blocks):
            raise ValueError(
                f"random_ltd_layer_num is {section['random_ltd_layer_num']}, and random_ltd_layer_id names "
                f"{len(blocks)} layers. Name as many as there are."
            )
        if beyond := sorted(index for index in blocks if not 0 <= index < num_blocks):
            raise ValueError(f"random_ltd_layer_id names layer {beyond[0]}; total_layer_num is {num_blocks}.")
        translated = {
            "start_tokens": int(schedule["min_value"]),
            "num_tokens": int(schedule["max_value"]),
            "growth": int(growth["require_steps"]),
            "quantum": int(growth["seq_per_step"]),
            "pinned": [index for index in range(num_blocks) if index not in blocks],
            "compat": "deepspeed",
        }
    except KeyError as missing:
        raise ValueError(f'"{where}" lacks {missing}, which DeepSpeed needs.') from None
    return translated if seed is None else {**translated, "seed": int(seed)}
