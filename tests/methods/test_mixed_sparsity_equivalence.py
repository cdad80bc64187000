"""Neurons and heads taken out of a model train as if they were masked in it, and as in a loop that knows only masks."""

from __future__ import annotations

import math
from functools import partial

import lightning.pytorch as L
import pytest
import torch

from lit_accel.methods.mixed_sparsity.refusals import SUPPORTED_OPTIMIZERS
from tests.methods.mixed_sparsity import (
    ELEMENTS,
    FAMILIES,
    TILES,
    AnyFamily,
    Watch,
    entries_on,
    fit,
    method,
    units_for,
    whole,
)

STEPS = 50
MST = {"stages": [(0, 0.0), (5, 0.25), (10, 0.5), (35, 0.25), (42, 0.0)], "update_every": 3}
CLIP = 0.5
DECAY = 0.1


class Trajectory(L.Callback):
    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(whole(pl_module))


def run(folder, name, execution, *, dtype=torch.float32, lr=1e-3, make_optimizer=None, **given):
    callback = method(**{**MST, **units_for(name), **given}, execution=execution)
    watch, trajectory = Watch(callback), Trajectory()
    module = AnyFamily(name, lr=lr, dtype=dtype, make_optimizer=make_optimizer)
    fit(folder, [callback, watch, trajectory], module, max_steps=STEPS, gradient_clip_val=CLIP)
    return module, watch, trajectory.weights


def without_key_biases(name, tensor):
    """The same for all keys of a query, they have no gradient: Adam makes steps of what is left by rounding."""
    if name.endswith(("attn.c_attn.bias", "attn.qkv.bias")):
        queries, _, values = tensor.chunk(3)
        return torch.cat([queries, values])
    return tensor.new_zeros(()) if name.endswith("key.bias") else tensor


def assert_close(mine, theirs, tolerance, clean=lambda name, tensor: tensor):
    assert len(mine) == len(theirs) == STEPS
    for step, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        for name, value in other.items():
            difference = (clean(name, one[name]) - clean(name, value)).abs().max()
            assert difference <= tolerance, (step, name, difference)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_compact_is_masked(tmp_path, name, dtype, tolerance):
    compact, mine, weights = run(tmp_path, name, "compact", dtype=dtype)
    masked, theirs, expected = run(tmp_path, name, "masked", dtype=dtype)
    assert mine.digests == theirs.digests
    # In restoration too, and where units come and go.
    assert {5, 6, 10, 12, 15, 35, 42} <= set(mine.changes)
    assert compact.seen == pytest.approx(masked.seen, abs=tolerance)
    assert_close(weights, expected, tolerance, without_key_biases if dtype == torch.float32 else lambda _, t: t)


def test_tiles_taken_out_are_tiles_masked(tmp_path):
    compact, mine, weights = run(tmp_path, "gpt2-tied", "compact", dtype=torch.float64, **TILES)
    masked, theirs, expected = run(tmp_path, "gpt2-tied", "masked", dtype=torch.float64, **TILES)
    assert mine.digests == theirs.digests
    assert_close(weights, expected, 1e-10)


def test_neurons_beside_entries(tmp_path):
    units = {"attention_units": "element", "head_units": "element"}
    _, mine, weights = run(tmp_path, "gpt2-tied", "compact", dtype=torch.float64, **units)
    _, theirs, expected = run(tmp_path, "gpt2-tied", "masked", dtype=torch.float64, **units)
    assert mine.digests == theirs.digests
    assert_close(weights, expected, 1e-10)


OPTIMIZERS = {kind.__name__: kind for kind in SUPPORTED_OPTIMIZERS} | {
    "SGD with momentum": partial(torch.optim.SGD, momentum=0.9),
    "RMSprop, centered": partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "AdamW, amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "AdamW, fused": partial(torch.optim.AdamW, fused=True),
}


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_optimizer_does_the_same_to_both(tmp_path, optimizer):
    options = {"dtype": torch.float64, "make_optimizer": partial(OPTIMIZERS[optimizer], weight_decay=DECAY)}
    if optimizer.startswith("SGD"):
        options["lr"] = 0.1
    _, mine, weights = run(tmp_path, "gpt2-tied", "compact", **options)
    _, theirs, expected = run(tmp_path, "gpt2-tied", "masked", **options)
    assert mine.digests == theirs.digests
    assert_close(weights, expected, 1e-9)


def is_chosen_by_gradient(before, after):
    """Whether an update must wait for the gradients of the whole model; else it comes before the forward pass."""
    return any(
        # Three quarters of the grown ones, unless all that were off come back.
        math.floor(0.75 * int((mask & ~before[name]).sum(1)[0])) > 0 and not (mask | before[name]).all()
        for name, mask in after.items()
    )


def reference(masks, dtype, lr=1e-3, betas=(0.9, 0.999), epsilon=1e-8):
    """Train a whole GPT-2 by hand: what of it is off in each step, and nothing else of the method."""
    module = AnyFamily("gpt2-tied", dtype=dtype)
    parameters = dict(module.net.named_parameters())
    first = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    second = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    before = {name: torch.ones_like(mask) for name, mask in masks[0].items()}
    losses, trajectory = [], []

    def switch(stays):
        for name, mask in entries_on("gpt2-tied", parameters, stays).items():
            first[name] *= mask
            second[name] *= mask
        # What comes out of a unit is zero while it is off, and when it is born.
        for name, mask in entries_on("gpt2-tied", parameters, stays, ["out"]).items():
            parameters[name].data *= mask

    for step in range(STEPS):
        stays = {name: before[name] & mask for name, mask in masks[step].items()}
        is_late = is_chosen_by_gradient(before, masks[step])
        if not is_late:
            switch(stays)
        loss = module.loss(torch.arange(8) + 8 * step)
        losses.append(loss.item())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        with torch.no_grad():
            if is_late:
                switch(stays)
            on = entries_on("gpt2-tied", parameters, masks[step])
            on = {name: on.get(name, torch.ones_like(each, dtype=torch.bool)) for name, each in parameters.items()}
            gradients = {name: gradient * on[name] for name, gradient in gradients.items()}
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
            for name, parameter in parameters.items():
                gradient = gradients[name] * min(1.0, CLIP / (norm + 1e-6))
                first[name] = betas[0] * first[name] + (1 - betas[0]) * gradient
                second[name] = betas[1] * second[name] + (1 - betas[1]) * gradient**2
                mean, square = first[name] / (1 - betas[0] ** (step + 1)), second[name] / (1 - betas[1] ** (step + 1))
                decayed = parameter * (1 - lr * DECAY) - lr * mean / (square.sqrt() + epsilon)
                parameter.copy_(torch.where(on[name], decayed, parameter))
        before = masks[step]
        trajectory.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    return losses, trajectory


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_both_are_a_loop_that_knows_only_the_masks(tmp_path, execution, dtype, tolerance):
    module, watch, weights = run(tmp_path, "gpt2-tied", execution, dtype=dtype)
    losses, expected = reference(watch.masks, dtype)
    assert module.seen == pytest.approx(losses, abs=tolerance)
    assert_close(weights, expected, tolerance, without_key_biases if dtype == torch.float32 else lambda _, t: t)


def test_entries_are_a_loop_that_knows_only_the_masks(tmp_path):
    """The same with masks on entries, by stepping torch's optimizer and undoing what it did to what is off."""
    module, watch, weights = run(tmp_path, "llama-gqa", "compact", dtype=torch.float64, **ELEMENTS)
    plain = AnyFamily("llama-gqa", lr=1e-3, dtype=torch.float64)
    optimizer = plain.configure_optimizers()
    parameters = dict(plain.net.named_parameters())
    before = {name: torch.ones_like(mask) for name, mask in watch.masks[0].items()}
    for step in range(STEPS):
        masks = watch.masks[step]
        is_late = is_chosen_by_gradient(before, masks)

        def switch(stays):
            for name, mask in stays.items():
                parameter = parameters[name]
                parameter.data *= mask.view(parameter.shape)
                for value in optimizer.state[parameter].values():
                    if value.ndim:
                        value *= mask.view(parameter.shape)

        stays = {name: before[name] & mask for name, mask in masks.items()}
        if not is_late:
            switch(stays)
        optimizer.zero_grad()
        plain.loss(torch.arange(8) + 8 * step).backward()
        if is_late:
            switch(stays)
        for name, mask in masks.items():
            parameters[name].grad *= mask.view(parameters[name].shape)
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step()
        for name, mask in masks.items():
            parameters[name].data *= mask.view(parameters[name].shape)
        before = masks
        for name, parameter in parameters.items():
            assert (weights[step][name] - parameter).abs().max() < 1e-12, (step, name)
