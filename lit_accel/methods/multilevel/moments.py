"""Carrying optimizer state between levels.

Where a width de-coalesce preserves the function, the gradients of the two levels are each other's images under
the adjoint maps. First moments are averages of gradients and follow the same maps. Second moments follow them in
the square root: exact on the way up, where every entry has one source; on the way down it treats the gradients
of merged entries as fully correlated, which overestimates the moment if they are not, and is the choice that
gives back the original moments after a way down and up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_accel.methods.multilevel.maps import LevelMap, Operator
from lit_accel.methods.multilevel.operators import Interpolation

OptimizerStatePolicy = Literal["reset", "project", "second_moment"]
NamedOptimizerState = Mapping[str, Mapping[str, Tensor]]
"""Optimizer state by parameter name, then by the optimizer's own key."""

_FIRST = frozenset({"exp_avg", "momentum_buffer"})
_SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
_KEPT = frozenset({"step"})
SUPPORTED_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers whose state can be carried between levels; others are reset."""


@torch.no_grad()
def project_optimizer_state(
    state: NamedOptimizerState,
    level_map: LevelMap,
    direction: Literal["down", "up"],
    policy: OptimizerStatePolicy = "project",
) -> dict[str, dict[str, Tensor]]:
    """Map optimizer state to the next level.

    Args:
        state: State by parameter name, of Adam, AdamW or SGD.
        level_map: The map between the two levels.
        direction: ``down`` to the smaller level, ``up`` to the larger one.
        policy: ``project`` maps both moments and keeps the step count; ``second_moment`` also keeps the count and
            the second moment but starts the first at zero; ``reset`` returns nothing.

    Returns:
        State by parameter name of the other level.

    Raises:
        KeyError: If the state has a key that is no moment of a supported optimizer.
    """
    if policy == "reset":
        return {}
    operator: Operator = "decoalesce_t" if direction == "down" else "coalesce_t"
    keys = {key for entry in state.values() for key, value in entry.items() if value is not None}
    projected: dict[str, dict[str, Tensor]] = {}
    for key in sorted(keys, key=lambda key: (key in _KEPT, key)):
        values = {name: entry[key] for name, entry in state.items() if entry.get(key) is not None}
        if key in _KEPT:
            for name, entry in projected.items():
                # A block that layer dropping left out has stepped less often than those that it is merged with.
                steps = [values[source] for source in level_map.sources(name, operator) if source in values]
                if steps:
                    entry[key] = max(steps, key=float).clone()
            continue
        values = _completed(values, level_map, operator)
        if key in _FIRST:
            mapped = level_map.apply(values, operator)
            if policy == "second_moment":
                mapped = {name: torch.zeros_like(tensor) for name, tensor in mapped.items()}
        elif key in _SECOND:
            roots = {name: tensor.sqrt() for name, tensor in values.items()}
            mapped = {name: tensor.square() for name, tensor in level_map.apply(roots, operator).items()}
        else:
            raise KeyError(
                f"The optimizer keeps {key!r}, which lit-accel cannot carry to another size. Use "
                'optimizer_state="reset", or Adam, AdamW or SGD.'
            )
        for name, tensor in mapped.items():
            projected.setdefault(name, {})[key] = tensor
    return projected


def _completed(values: dict[str, Tensor], level_map: LevelMap, operator: Operator) -> dict[str, Tensor]:
    """Add zeros where a block has no moments beside others that it is merged with: it has had no gradient so far."""
    completed = dict(values)
    target = level_map.small if operator in ("coalesce", "decoalesce_t") else level_map.large
    for name in target.parameters:
        sources = level_map.sources(name, operator)
        present = [source for source in sources if source in values]
        if present:
            completed |= {source: torch.zeros_like(values[present[0]]) for source in sources if source not in values}
    return completed


@torch.no_grad()
def merge_optimizer_state(
    stored: NamedOptimizerState, grown: NamedOptimizerState, interpolation: Interpolation
) -> dict[str, dict[str, Tensor]]:
    """Merge the stored state of the larger level with the one that grew out of the smaller.

    First moments are averaged with weight ``coarse`` on the grown ones, second moments likewise in the square
    root; the step count is the grown one.

    Args:
        stored: State of the larger level as it was before coalescing.
        grown: State that :func:`project_optimizer_state` brought up.
        interpolation: The rule that merged the weights.
    """
    weight = interpolation.coarse
    merged: dict[str, dict[str, Tensor]] = {}
    for name, entry in grown.items():
        merged[name] = dict(entry)
        for key, value in entry.items():
            old = stored.get(name, {}).get(key)
            if old is None or weight == 1:
                continue
            if key in _FIRST:
                merged[name][key] = (1 - weight) * old.to(value) + weight * value
            elif key in _SECOND:
                merged[name][key] = ((1 - weight) * old.to(value).sqrt() + weight * value.sqrt()).square()
    return merged
