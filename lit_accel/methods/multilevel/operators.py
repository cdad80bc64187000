"""Coalescing, de-coalescing and interpolation of models and state dicts (arXiv 2404.07999, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lit_accel.anatomy import Anatomy, build_resized
from lit_accel.methods.multilevel.maps import LevelMap, Operator

Weights = TypeVar("Weights", nn.Module, Mapping[str, Tensor])


@dataclass(frozen=True)
class Interpolation:
    """How the trained small level is merged into the stored larger one.

    With ``θ`` the stored larger model, ``θ'`` the trained smaller one, ``C`` coalescing and ``D`` de-coalescing::

        D[(1 - coarse) C θ + coarse θ'] + (1 - fine) (θ - D C θ)

    The first term is what the smaller level can express, the second is what it cannot. ``coarse = fine = alpha``
    is the paper's ``(1 - alpha) θ + alpha D θ'``; ``coarse = 1, fine = 0`` is the coarse-grid correction of
    multigrid methods, ``θ + D(θ' - C θ)``, which gives back ``θ`` if the smaller level learned nothing.

    Args:
        coarse: The share of the coarse part that is replaced, in [0, 1].
        fine: The share of the fine part that is removed, in [0, 1].

    Raises:
        ValueError: If a share is outside of [0, 1].
    """

    coarse: float = 1.0
    fine: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("coarse", self.coarse), ("fine", self.fine)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it is a share and must lie between 0 and 1.")

    @classmethod
    def of_alpha(cls, alpha: float) -> Interpolation:
        """Return the paper's rule: ``alpha`` is the weight of the de-coalesced small model."""
        return cls(coarse=alpha, fine=alpha)


def coalesce(weights: Weights, level_map: LevelMap) -> Weights:
    """Shrink a model or state dict to the next smaller level.

    Args:
        weights: The larger model, or its state dict. It stays as it is.
        level_map: The map between the two levels.

    Returns:
        A new model of the same class, or a new state dict; no memory is shared.
    """
    return _transfer(weights, level_map, "coalesce", level_map.large, level_map.small)


def decoalesce(weights: Weights, level_map: LevelMap) -> Weights:
    """Grow a model or state dict to the next larger level.

    Growing the width preserves the function. Growing the depth does so with ``depth_mode="zero"`` alone. The
    copies that it makes have equal gradients, so that without dropout they stay copies for ever: see
    :func:`interpolate`.

    Args:
        weights: The smaller model, or its state dict. It stays as it is.
        level_map: The map between the two levels.

    Returns:
        A new model of the same class, or a new state dict; no memory is shared.
    """
    return _transfer(weights, level_map, "decoalesce", level_map.small, level_map.large)


@torch.no_grad()
def interpolate(stored: Weights, small: Weights, level_map: LevelMap, interpolation: Interpolation) -> Weights:
    """Merge a trained smaller level into the larger one that it was coalesced from.

    Args:
        stored: The larger model (or state dict) as it was before coalescing. It stays as it is.
        small: The trained smaller one.
        level_map: The map between the two levels.
        interpolation: The rule. ``alpha`` 0 gives back ``stored`` bitwise, ``alpha`` 1 the de-coalesced
            ``small``, and the coarse-grid correction with an untrained ``small`` gives back ``stored``.

    Returns:
        A new model of the larger level, or a new state dict.
    """
    if isinstance(stored, nn.Module):
        if not isinstance(small, nn.Module):
            raise TypeError("stored is a model, so small must be one too, not a state dict.")
        merged = _interpolate_state(_parameters(stored), _parameters(small), level_map, interpolation)
        return cast("Any", load_parameters(build_resized(stored, level_map.large, level_map.large.size), merged))
    large_state, aliases = _without_ties(stored, level_map.large)
    small_state, _ = _without_ties(small, level_map.small)
    return cast("Weights", _with_ties(_interpolate_state(large_state, small_state, level_map, interpolation), aliases))


def _interpolate_state(
    stored: Mapping[str, Tensor],
    small: Mapping[str, Tensor],
    level_map: LevelMap,
    interpolation: Interpolation,
) -> dict[str, Tensor]:
    coarse, fine = interpolation.coarse, interpolation.fine
    if coarse == fine == 0:
        return {name: tensor.clone() for name, tensor in stored.items()}
    if coarse == fine == 1:
        return level_map.apply(small, "decoalesce")
    # The rule above, with the terms in θ collected:  (1 - fine) θ + D[(fine - coarse) C θ + coarse θ'].
    correction: dict[str, Tensor]
    if coarse == fine:
        correction = {name: coarse * _wide(tensor) for name, tensor in small.items()}
    else:
        coalesced = level_map.apply(stored, "coalesce")
        correction = {
            name: (fine - coarse) * _wide(coalesced[name]) + coarse * _wide(tensor) for name, tensor in small.items()
        }
    correction = level_map.apply(correction, "decoalesce")
    # Each term is dropped once it is added: the merge never holds more than one copy besides its inputs.
    return {
        name: (_wide(tensor) * (1 - fine) + correction.pop(name)).to(tensor.dtype) for name, tensor in stored.items()
    }


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def _transfer(weights: Weights, level_map: LevelMap, operator: Operator, source: Anatomy, target: Anatomy) -> Weights:
    if isinstance(weights, nn.Module):
        mapped = level_map.apply(_parameters(weights), operator)
        return cast("Any", load_parameters(build_resized(weights, source, target.size), mapped))
    state, aliases = _without_ties(weights, source)
    return cast("Weights", _with_ties(level_map.apply(state, operator), aliases))


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Make tensors the parameters of a model.

    Args:
        model: A model, such as :func:`~lit_accel.anatomy.build_resized` returns it.
        state: A tensor for each name in ``named_parameters``; they are used as they are, not copied.

    Returns:
        The model.
    """
    for name, parameter in model.named_parameters():
        parameter.data = state[name]
    return model


def _without_ties(state: Mapping[str, Tensor], anatomy: Anatomy) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reduce a state dict to one name a tensor; return it with the aliases that were there.

    Raises:
        KeyError: If a parameter is missing, or there is one that the anatomy does not know.
    """
    aliases = {
        alias: name
        for group in anatomy.tied
        for name in group
        if name in anatomy.parameters
        for alias in group
        if alias != name and alias in state
    }
    reduced = {name: tensor for name, tensor in state.items() if name not in aliases}
    if reduced.keys() != anatomy.parameters.keys():
        missing = sorted(anatomy.parameters.keys() - reduced.keys())
        unknown = sorted(reduced.keys() - anatomy.parameters.keys())
        raise KeyError(f"The state dict does not fit the anatomy; missing: {missing}, unknown: {unknown}.")
    return reduced, aliases


def _with_ties(state: dict[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    return {**state, **{alias: state[name] for alias, name in aliases.items()}}
