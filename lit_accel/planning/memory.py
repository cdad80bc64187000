"""What a run needs of memory, without having it: weights, gradients, moments, and what is saved for the backward pass.

Activations are found by a forward pass on tensors without values (torch's FakeTensorMode): every tensor that autograd
saves is noted with the block that it belongs to. Not counted: what is only needed for a moment, the loss behind the
model's output, what compilation and the allocator's rounding change, and batches waiting to be used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from lit_accel.anatomy import Anatomy, anatomy_of
from lit_accel.compute.plan import StepDecision
from lit_accel.planning.first_call import FirstCall

MOMENTS: dict[type[Optimizer], int] = {
    torch.optim.Adam: 2,
    torch.optim.AdamW: 2,
    torch.optim.NAdam: 2,
    torch.optim.RAdam: 2,
    torch.optim.Adamax: 2,
    torch.optim.Adagrad: 1,
    torch.optim.RMSprop: 1,
    torch.optim.SGD: 0,
}
"""How many tensors of the size of a parameter an optimizer keeps for each, without momentum where that is a choice."""


@dataclass(frozen=True)
class Activations:
    """Bytes that the forward pass of a micro-batch saves for its backward pass.

    Args:
        blocks: Of each block.
        ffn: Those among them in tensors as wide as its feed-forward network.
        outside_blocks: Of what is outside of the blocks.
    """

    blocks: tuple[int, ...]
    ffn: tuple[int, ...]
    outside_blocks: int

    def of_blocks(self, anatomy: Anatomy, decision: StepDecision, num_tokens: int) -> list[float]:
        """Return what each block saves that runs, where only a part of it takes part.

        Tokens that a block does not run on save nothing in it, nor do neurons that are off; what else depends on units
        is counted whole.

        Args:
            anatomy: The model.
            decision: What takes part.
            num_tokens: Tokens of a sequence.
        """
        saved = []
        for index, (block, ffn) in enumerate(zip(self.blocks, self.ffn, strict=True)):
            num_all = anatomy.places[anatomy.blocks[index].place](1, num_tokens)
            tokens = decision.kept_tokens.get(index, num_all) / num_all
            saved.append(tokens * (block - ffn * (1 - _active_neurons(anatomy, index, decision))))
        return saved

    def most(self, anatomy: Anatomy, decisions: Iterable[StepDecision], num_tokens: int) -> float:
        """Return the most that is saved at a time over some steps.

        Args:
            anatomy: The model.
            decisions: What takes part in each of them.
            num_tokens: Tokens of a sequence.
        """
        blocks: dict[tuple[int, int], list[float]] = {}
        most = 0.0
        for decision in decisions:
            key = (id(decision.kept_tokens) if decision.kept_tokens else 0, id(decision.active))
            if key not in blocks:
                blocks[key] = self.of_blocks(anatomy, decision, num_tokens)
            keep = decision.keep
            saved = blocks[key] if keep is None else [b for b, kept in zip(blocks[key], keep, strict=True) if kept]
            most = max(most, sum(saved))
        return self.outside_blocks + most


def _active_neurons(anatomy: Anatomy, index: int, decision: StepDecision) -> float:
    """Return the share of a block's neurons that is on, where they are taken out of the model."""
    entries = {} if decision.active is None else decision.active.entries
    axis, axes = anatomy.blocks[index].ffn, anatomy.size.axes
    shares = [
        entries[name] / layout.numel(axes)
        for name, layout in anatomy.parameters.items()
        if layout.block == index and name in entries and any(axis in dim.names for dim in layout.dims)
    ]
    return max(shares, default=1.0)


def activations_of(transformer: nn.Module, call: FirstCall, precision: str) -> Activations:
    """Note what a forward pass saves for the backward pass.

    Args:
        transformer: The model, whose parameters may be on the meta device.
        call: What it is called with.
        precision: The Trainer's precision, such as ``"bf16-mixed"``.
    """
    anatomy = anatomy_of(transformer)
    modules = [transformer.get_submodule(block.path) for block in anatomy.blocks]
    blocks, ffn, outside = [0] * len(modules), [0] * len(modules), 0
    axes = anatomy.size.axes
    widths = [axes.get(block.ffn, 0) for block in anatomy.blocks]
    present: list[int] = []
    seen: dict[int, Tensor] = {}
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    whole = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(precision)
    with call.mode:
        tensors = [*transformer.named_parameters(), *transformer.named_buffers()]
        state = {name: _without_values(value, whole) for name, value in tensors}
        weights = {value.untyped_storage()._cdata for value in state.values()}

        def note(tensor: Tensor) -> Tensor:
            nonlocal outside
            storage = tensor.untyped_storage()
            if storage._cdata in weights or storage._cdata in seen:
                return tensor
            # Held, so that no other storage gets the same address.
            seen[storage._cdata] = tensor
            if present:
                blocks[present[-1]] += storage.nbytes()
                # Gated networks have two such halves, in one tensor or in two.
                if tensor.shape and tensor.shape[-1] in (widths[present[-1]], 2 * widths[present[-1]]):
                    ffn[present[-1]] += storage.nbytes()
            else:
                outside += storage.nbytes()
            return tensor

        hooks = []
        for index, module in enumerate(modules):
            hooks.append(module.register_forward_pre_hook(lambda *_, index=index: present.append(index)))
            hooks.append(module.register_forward_hook(lambda *_: _pop(present), always_call=True))
        try:
            with (
                torch.compiler.set_stance("force_eager"),
                torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
                torch.autocast("cpu", mixed or torch.bfloat16, enabled=mixed is not None),
                torch.enable_grad(),
            ):
                output = functional_call(transformer, state, call.args, dict(call.kwargs))
        finally:
            for hook in hooks:
                hook.remove()
        del output
    return Activations(tuple(blocks), tuple(ffn), outside)


def _pop(present: list[int]) -> None:
    present.pop()


def _without_values(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    made = torch.empty(value.shape, dtype=dtype if dtype is not None and value.is_floating_point() else value.dtype)
    return made.requires_grad_(value.requires_grad)
