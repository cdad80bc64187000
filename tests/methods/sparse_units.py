"""Units of the models of the zoo, and sparse models of them: what the tests of both share."""

from __future__ import annotations

import torch
from torch import nn

from lit_accel.anatomy import anatomy_of
from lit_accel.draws import generator
from lit_accel.methods.mixed_sparsity import MatrixUnits, SparseModel, spaces_of
from tests.models import ALL_MODELS, make_model, tokens
from tests.vision import VISION_ZOO

SIZE = {"heads": 4, "head_dim": 4, "ffn": 32, "blocks": 2}
NORMALISED = {"vit-swiglu"}
SWIN = {name for name in VISION_ZOO if "swin" in name} - NORMALISED
NEURONS = sorted(set(ALL_MODELS) - NORMALISED)
HEADS = sorted(set(NEURONS) - SWIN - {"llama-mqa"})
# Each kind of layout: fused and stored inputs first, separate, grouped queries, packed, packed gates, stages.
KINDS = ["gpt2-tied", "bert-mlm", "llama-gqa", "vit", "vit-glu", "swin"]
AXES, TILES, ENTRIES, TWO_OF_FOUR = ("neuron", "head"), ("block", "block"), ("element", "element"), ("2:4", "2:4")


def spaces(name, ffn="neuron", attention="head", head="dense", tile=4, quantum=1, model=None):
    if attention == "head" and name not in HEADS:
        attention = "dense"
    if ffn == "neuron" and name not in NEURONS:
        ffn = "dense"
    model = make_model(name, **SIZE) if model is None else model
    return spaces_of(anatomy_of(model), ffn, attention, head, tile=tile, quantum=quantum)


def sparse(name, units=AXES, execution="compact", dtype=torch.float64, optimizer=None, seed=0):
    """A model in training mode of which nothing is off yet, and its optimizer."""
    model = make_model(name, dtype=dtype, seed=seed, **SIZE).train()
    made = SparseModel(model, anatomy_of(model), spaces(name, *units, model=model), execution)
    optimizer = torch.optim.AdamW if optimizer is None else optimizer
    made.optimizers = [optimizer(model.parameters(), lr=1e-2)]
    return made


def some(sparse_model, share=0.5, seed=0):
    """Masks with about a share of the units on, as many in each group, and never none; half of them of N:M."""
    random = generator(seed)
    return {
        name: torch.rand(space.num_groups, space.num_units, generator=random).argsort(1)
        < (2 if getattr(space, "quota", None) else max(1, round(share * space.num_units)))
        for name, space in sparse_model.spaces.items()
    }


def everything(sparse_model):
    return {name: torch.ones_like(mask) for name, mask in sparse_model.masks.items()}


def entries_on(space, mask):
    """Which entries of each parameter are on, by name."""
    if isinstance(space, MatrixUnits):
        return {space.parameter: space.entries(mask)}
    result = {}
    for carrier in space.carriers:
        on = torch.zeros(carrier.layout.shape(space.axes), dtype=torch.bool)
        on.index_fill_(carrier.dim, space.positions(carrier, mask[0].nonzero().flatten()), True)
        result[carrier.name] = on
    return result


def all_entries_on(sparse_model, masks):
    return {k: v for name, space in sparse_model.spaces.items() for k, v in entries_on(space, masks[name]).items()}


def is_output(sparse_model):
    """Of each parameter with units: whether it is zero where they are off."""
    return {
        name: isinstance(space, MatrixUnits) or next(c.is_output for c in space.carriers if c.name == name)
        for space in sparse_model.spaces.values()
        for name in space.names
    }


def loss_of(sparse_model, seed=1):
    model = sparse_model.transformer
    x = tokens(model, seed=seed)
    result = model(x) if not hasattr(model, "config") else model(input_ids=x)
    values = result.values() if hasattr(model, "config") else [result]
    return sum(v.square().mean() for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())


def backward(sparse_model, seed=1):
    loss_of(sparse_model, seed).backward()


def step(sparse_model, seed=1, clip=None):
    """One step of training, as the callback makes it."""
    (optimizer,) = sparse_model.optimizers
    optimizer.zero_grad()
    sparse_model.compact()
    backward(sparse_model, seed)
    sparse_model.mask_gradients()
    if clip is not None:
        nn.utils.clip_grad_norm_(sparse_model.transformer.parameters(), clip)
    optimizer.step()
    sparse_model.hold_off()


def moments(sparse_model, name):
    parameter = sparse_model.parameters[name]
    return [v for v in sparse_model.optimizers[0].state[parameter].values() if torch.is_tensor(v) and v.dim()]


def tensors(sparse_model):
    """Everything that a parameter has: values, gradient, optimizer state."""
    found = {}
    for name, parameter in sparse_model.parameters.items():
        state = sparse_model.optimizers[0].state.get(parameter, {})
        of_parameter = {"value": parameter.detach(), "gradient": parameter.grad, **state}
        found |= {(name, key): value.clone() for key, value in of_parameter.items() if torch.is_tensor(value)}
    return found


def sizes(model):
    """All numbers that modules keep: of heads, of features."""
    return {
        (path, key): value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool)
    }


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
