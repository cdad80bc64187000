"""The larger levels while the model is small: their weights and moments, and how each transition uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_accel.anatomy import Anatomy, build_resized
from lit_accel.draws import generator
from lit_accel.methods.multilevel.maps import LevelMap
from lit_accel.methods.multilevel.moments import (
    NamedOptimizerState,
    OptimizerStatePolicy,
    merge_optimizer_state,
    project_optimizer_state,
)
from lit_accel.methods.multilevel.operators import Interpolation, coalesce, interpolate, load_parameters

_FRESH = 3  # sets the draws of fresh levels apart from other draws


class StoredLevels:
    """What the way up needs from the way down, by level.

    Args:
        interpolation: How a trained small level is merged into the stored one.
        optimizer_state: What becomes of the optimizers' state.
        fresh_std: Standard deviation of the entries of matrices and embeddings of a level that never existed.
    """

    def __init__(self, interpolation: Interpolation, optimizer_state: OptimizerStatePolicy, fresh_std: float) -> None:
        self.interpolation = interpolation
        self.optimizer_state = optimizer_state
        self.fresh_std = fresh_std
        self._weights: dict[int, dict[str, Tensor]] = {}
        self._moments: dict[int, NamedOptimizerState] = {}

    @property
    def levels(self) -> set[int]:
        """The levels that are stored."""
        return set(self._weights)

    def __contains__(self, level: int) -> bool:
        return level in self._weights

    def shrink(self, transformer: nn.Module, step: LevelMap, level: int) -> nn.Module:
        """Store a transformer and return the next smaller one.

        Args:
            transformer: The present one, of which no more use is made.
            step: The map to the smaller level.
            level: The present level.
        """
        # The old model is about to be dropped, so on the CPU its tensors are kept as they are, without a copy.
        self._weights[level] = {name: parameter.detach().cpu() for name, parameter in transformer.named_parameters()}
        return coalesce(transformer, step)

    def grow(self, transformer: nn.Module, step: LevelMap, level: int) -> nn.Module:
        """Return the next larger transformer, merged with the stored one; a level that never existed is drawn.

        Args:
            transformer: The present one.
            step: The map from the larger level.
            level: The larger level.
        """
        parameters = dict(transformer.named_parameters())
        small = {name: parameter.detach() for name, parameter in parameters.items()}
        device = next(iter(small.values())).device
        origins = {name: parameters[step.sources(name, "decoalesce")[0]] for name in step.large.parameters}
        # What is frozen was not trained in the small level either: it stays what it is, whatever the rule.
        frozen = {name for name, parameter in origins.items() if not parameter.requires_grad}
        weights = self._weights[level] if level in self else self._fresh(step.large, origins, level)
        # A run may go on in another precision than the level was stored in: that of the present model counts.
        stored = {name: tensor.to(device, origins[name].dtype) for name, tensor in weights.items()}
        merged = dict(interpolate(stored, small, step, self.interpolation))
        if level in self:
            merged.update({name: stored[name].clone() for name in frozen})
        return load_parameters(build_resized(transformer, step.small, step.large.size), merged)

    def _fresh(self, anatomy: Anatomy, origins: Mapping[str, nn.Parameter], level: int) -> dict[str, Tensor]:
        """Draw a level: its fine part tells the copies of a de-coalesced model apart, which would stay equal else."""
        drawn = {}
        for index, (name, layout) in enumerate(anatomy.parameters.items()):
            shape, origin = layout.shape(anatomy.size.axes), origins[name]
            # Vectors (norms, biases, scales) begin constant in every initialisation: they have no fine part. Nor has
            # what is frozen: there it would be noise that is never trained away.
            if len(layout.dims) < 2 or not origin.requires_grad:
                drawn[name] = torch.zeros(shape, dtype=origin.dtype, device="cpu")
            else:
                # A resize makes what it makes on the device of the run, which a generator of the CPU cannot serve.
                noise = torch.randn(shape, generator=generator(_FRESH, level, index), device="cpu")
                drawn[name] = (self.fresh_std * noise).to(origin.dtype)
        return drawn

    def carry(
        self, state: NamedOptimizerState, step: LevelMap, *, before: int, after: int
    ) -> dict[str, dict[str, Tensor]]:
        """Map the transformer's optimizer state to the next level.

        Args:
            state: The old state, by parameter name.
            step: The map between the two levels.
            before: The present level.
            after: The next level.
        """
        goes_down = after > before
        if goes_down and self.optimizer_state == "project" and self.interpolation.coarse < 1:
            self._moments[before] = {
                name: {key: value.detach().cpu() for key, value in entry.items()} for name, entry in state.items()
            }
        new = project_optimizer_state(state, step, "down" if goes_down else "up", self.optimizer_state)
        if not goes_down and after in self._moments:
            new = merge_optimizer_state(self._moments[after], new, self.interpolation)
        return new

    def drop(self, level: int) -> None:
        """Forget a level that the model has grown back to."""
        self._weights.pop(level, None)
        self._moments.pop(level, None)

    def clear(self) -> None:
        """Forget all levels."""
        self._weights, self._moments = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries and tensors, for a checkpoint."""
        return {
            "stored": {level: dict(state) for level, state in self._weights.items()},
            "stored_moments": {
                level: {name: dict(entry) for name, entry in state.items()} for level, state in self._moments.items()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""
        self._weights = {int(level): dict(state) for level, state in state_dict["stored"].items()}
        self._moments = {int(level): dict(state) for level, state in state_dict["stored_moments"].items()}
