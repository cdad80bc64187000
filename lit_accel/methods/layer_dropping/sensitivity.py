"""What each block is worth: measured by leaving it out, or estimated from what it does to its input.

The method's paper (SBLD, AAAI 2023) measures what each layer does to the training loss in a phase of analysis; none of
the public sources that we could read gives its formula. These four are ours.

Shapes: b batch, t tokens, d embed; Swin's hidden states have two token axes in place of t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_accel.routing import BlockCall, BlockRouting, Order, Run, hidden_states_of

Estimator = Literal["ablate", "taylor", "ratio", "cos"]
"""How sensitivity is measured: :func:`ablate`, or one of the estimates of :class:`Meter`."""
ESTIMATES = tuple(name for name in get_args(Estimator) if name != "ablate")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode without gradients, and each of its parts back into its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def ablate(routing: BlockRouting, loss: Callable[[], Tensor], units: Sequence[int]) -> tuple[float, list[float]]:
    """Measure how much the loss grows when each block is left out, all others running.

    The hidden states before a block are the same as with it, so blocks before it are not run again: all in all about
    (1 + U/2) forward passes for U blocks. What lies outside of the blocks is, each time.

    Args:
        routing: The routing of the model's blocks.
        loss: Computes the loss of one batch, in evaluation mode and without gradients; see :func:`evaluating`.
        units: The blocks to leave out, one at a time.

    Returns:
        The loss with all blocks, and its growth for each of ``units``; negative where the model does better without.
    """
    # One for each call: a loss may call the model several times.
    outputs: dict[int, list[Tensor]] = {}

    def record(call: BlockCall, run: Run) -> Any:
        output = run(call)
        outputs.setdefault(call.index, []).append(hidden_states_of(output))
        return output

    with routing.probe(record):
        full = loss().item()
    changes = []
    for unit in units:
        before = {index: iter(calls) for index, calls in outputs.items()}

        def leave_out(call: BlockCall, run: Run, unit: int = unit, before: Any = before) -> Any:
            if call.index < unit:
                return routing.skip(call, next(before[call.index]))
            return routing.skip(call) if call.index == unit else run(call)

        with routing.probe(leave_out):
            changes.append(loss().item() - full)
    return full, changes


class Meter:
    """Estimates sensitivities from what passes through the blocks in training, in which every block must run.

    - ``taylor``: the sum over tokens of |<g, f>|, f = block(x) - x being what the block adds and g the gradient of the
      loss with respect to its output: what the loss would change by to first order, were it left out for one token. In
      the scale of the gradients: with a gradient scaler or accumulation only relations mean something.
    - ``ratio``: the mean over tokens of |f| / |x|.
    - ``cos``: the mean over tokens of 1 - cos(x, block(x)).

    Args:
        routing: The routing of the model's blocks.
        estimator: One of them.
    """

    def __init__(self, routing: BlockRouting, estimator: Estimator) -> None:
        self._routing, self._estimator = routing, estimator
        self._values: dict[int, Tensor] = {}
        routing.add(self._handle, Order.PROBE)

    def close(self) -> list[float]:
        """Stop, and return the estimate of each block; 0 where none was made."""
        self._routing.remove(self._handle)
        return [self._values[i].item() if i in self._values else 0.0 for i in range(len(self._routing.blocks))]

    def _handle(self, call: BlockCall, run: Run) -> Any:
        output = run(call)
        x, y = call.hidden_states, hidden_states_of(output)
        index = call.index
        if self._estimator == "taylor":
            # Reentrant checkpointing runs a block twice; the first time there is no gradient to come.
            if y.requires_grad:
                added = (y - x).detach()
                y.register_hook(lambda gradient: self._set(index, _taylor(gradient, added)))
        else:
            self._set(index, _ratio(x, y) if self._estimator == "ratio" else _cos(x, y))
        return output

    def _set(self, index: int, value: Tensor) -> None:
        self._values[index] = value


def _taylor(gradient: Tensor, added: Tensor) -> Tensor:
    return (gradient.detach().float() * added.float()).sum(-1).abs().sum()


@torch.no_grad()
def _ratio(x: Tensor, y: Tensor) -> Tensor:
    lengths = x.float().norm(dim=-1)
    # A token of zeros, padding say, has no ratio.
    ratios = torch.where(lengths > 0, (y.float() - x.float()).norm(dim=-1) / lengths, 0)
    return ratios.sum() / (lengths > 0).sum().clamp(min=1)


@torch.no_grad()
def _cos(x: Tensor, y: Tensor) -> Tensor:
    return (1 - torch.cosine_similarity(x.float(), y.float(), dim=-1)).mean()


def ablation_flops(forward: Sequence[int], outside: int, units: Sequence[int]) -> int:
    """Return what :func:`ablate` costs.

    Args:
        forward: FLOPs of each block's forward pass.
        outside: FLOPs of the forward pass outside of the blocks.
        units: The blocks that are left out.
    """
    return sum(forward) + outside + sum(outside + sum(forward[unit + 1 :]) for unit in units)
