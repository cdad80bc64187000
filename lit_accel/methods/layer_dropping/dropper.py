"""Skipping blocks of a model by a given mask, and scaling those that run so that the expectation stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_accel.routing import BlockCall, BlockRouting, Order, Run, hidden_states_of, with_hidden_states

Scale = Literal["block", "sublayer", "none"]
"""What is divided by the keep probability of a block that runs; see :class:`BlockDropper`."""


class BlockDropper:
    """Skips blocks of one transformer while it is active; the mask stays until it is set anew.

    A dropped block's output is its input. Nothing inside of it is called, and its parameters get no gradient.

    Args:
        routing: The routing of the transformer's blocks.
        scale: ``"block"``: the change that a block makes, x + (block(x) - x) / p, whose expectation over the draw
            is exactly block(x). ``"sublayer"``: the output of each residual branch, as published (arXiv
            2010.13369), which inflates what the second branch of a block sees. ``"none"``: nothing, as in LayerDrop
            (arXiv 1909.11556).
    """

    def __init__(self, routing: BlockRouting, scale: Scale) -> None:
        self.is_active = False
        self.was_called = False
        """Whether a block was called while it was active; whoever reads it resets it."""
        self.routing = routing
        self._scale = scale
        self._keep: Sequence[bool] = [True] * len(routing.blocks)
        self._factors: Sequence[float] = [1.0] * len(routing.blocks)
        self._hooks: list[RemovableHandle] = []
        routing.add(self._handle, Order.SKIP, self._is_idle)
        if scale == "sublayer":
            self._hook_branches()

    def set(self, keep: Sequence[bool], keep_probabilities: Sequence[float]) -> None:
        """Say which blocks run from now on.

        Args:
            keep: Whether each block runs.
            keep_probabilities: With which probability it was to run.
        """
        self._keep = keep
        self._factors = [1.0 if p == 1 else 1 / p for p in keep_probabilities]

    def close(self) -> None:
        """Leave the model as it was."""
        self.routing.remove(self._handle)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _is_idle(self) -> bool:
        return not self.is_active or (all(self._keep) and all(factor == 1 for factor in self._factors))

    def _handle(self, call: BlockCall, run: Run) -> Any:
        if not self.is_active:
            return run(call)
        self.was_called = True
        if not self._keep[call.index]:
            return self.routing.skip(call)
        output = run(call)
        factor = self._factors[call.index]
        if self._scale != "block" or factor == 1:
            return output
        return with_hidden_states(output, _amplify(call.hidden_states, hidden_states_of(output), factor))

    def _hook_branches(self) -> None:
        for index, (block, module) in enumerate(zip(self.routing.blocks, self.routing.modules, strict=True)):
            paths = {name.rpartition(".")[0] for name in block.branch_outputs}
            for path, branch in module.named_modules():
                if path in paths:
                    self._hooks.append(branch.register_forward_hook(_BranchScale(self, index)))


def _amplify(x: Tensor, output: Tensor, factor: float) -> Tensor:
    if x.dtype == output.dtype:
        return torch.lerp(x, output, factor)
    return x + (output - x) * factor


class _BranchScale:
    """Multiplies what a residual branch adds; in a copy of the model it does nothing.

    Args:
        dropper: Whose factors are used; ``None`` in copies.
        index: The block.
    """

    def __init__(self, dropper: BlockDropper | None = None, index: int = 0) -> None:
        self._dropper, self._index = dropper, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # Not only within the block's own call: activation checkpointing runs it again, in the backward pass.
        if self._dropper is None or not self._dropper.is_active or not module.training:
            return None
        factor = self._dropper._factors[self._index]
        return None if factor == 1 else with_hidden_states(output, hidden_states_of(output) * factor)

    def __reduce__(self) -> tuple[type[_BranchScale], tuple[()]]:
        return _BranchScale, ()
