"""What the tests of layer dropping share: models, gradients, and a count of compiled graphs."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as L
import torch

from lit_accel.anatomy import anatomy_of
from lit_accel.methods.layer_dropping import BlockDropper
from lit_accel.routing import routing_of
from tests.models import make_model, tokens

SMALL = {"heads": 2, "head_dim": 8, "ffn": 32}


def in_training(name: str, blocks: int = 6) -> torch.nn.Module:
    return make_model(name, dtype=torch.float32, blocks=blocks, **SMALL).train()


def dropping(model: torch.nn.Module) -> BlockDropper:
    dropper = BlockDropper(routing_of(model), "none" if "Bert" in type(model).__name__ else "block")
    dropper.is_active = True
    return dropper


def backward(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Return what a model puts out and the gradients of its parameters."""
    model.zero_grad()
    inputs = tokens(model)
    output = model(input_ids=inputs)[0] if hasattr(model, "config") else model(inputs)
    output.logsumexp(-1).mean().backward()
    return output.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_equal(actual, expected, **tolerance):
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(actual[name], gradient, msg=name, **tolerance)


def assert_dropped_have_none(model, gradients, keep):
    for kept, block in zip(keep, anatomy_of(model).blocks, strict=True):
        of_block = [gradient for name, gradient in gradients.items() if name.startswith(f"{block.path}.")]
        assert of_block
        assert all((gradient is not None) is kept for gradient in of_block)


def intercepted(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [part for part in module.modules() if vars(part).get("_compiled_call_impl") is not None]


class Graphs:
    """A backend that changes nothing and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def count_calls(model: torch.nn.Module) -> list[int]:
    """Count the calls of something inside of each block."""
    calls = [0] * len(anatomy_of(model).blocks)

    def count(index, *_):
        calls[index] += 1

    for index, block in enumerate(anatomy_of(model).blocks):
        first = next(part for part in model.get_submodule(block.path).modules() if isinstance(part, torch.nn.LayerNorm))
        first.register_forward_hook(partial(count, index))
    return calls


class Masks(L.Callback):
    """Notes what was decided for each optimizer step. Stands right of the method."""

    def __init__(self, method) -> None:
        self.method = method
        self.keep: dict[int, list[bool]] = {}
        self.probabilities: dict[int, list[float]] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.keep[trainer.global_step] = list(self.method.keep)
        self.probabilities[trainer.global_step] = list(self.method.keep_probabilities)
