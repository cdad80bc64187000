"""A model with some of its units off is one smaller model throughout, and survives updates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lit_accel.anatomy import anatomy_of
from lit_accel.draws import generator
from lit_accel.methods.mixed_sparsity import SparseModel
from tests.methods.sparse_units import (
    AXES,
    ENTRIES,
    KINDS,
    NEURONS,
    SWIN,
    TILES,
    TWO_OF_FOUR,
    all_entries_on,
    assert_equal,
    backward,
    everything,
    is_output,
    loss_of,
    moments,
    sizes,
    some,
    sparse,
    step,
    tensors,
)
from tests.models import ALL_MODELS, outputs, relative_error, tokens

# The smaller model


@pytest.mark.parametrize("name", NEURONS)
def test_the_smaller_model_computes_what_the_whole_one_does(name):
    """Outputs and gradients, in every family."""
    masked, compact = (sparse(name, execution=execution) for execution in ("masked", "compact"))
    for each in (masked, compact):
        each.set_masks(some(each))
        each.compact()
    assert compact.is_compact and not masked.is_compact
    assert sum(p.numel() for p in compact.parameters.values()) < sum(p.numel() for p in masked.parameters.values())
    x = tokens(masked.transformer)
    for actual, expected in zip(outputs(compact.transformer, x), outputs(masked.transformer, x), strict=True):
        assert relative_error(actual, expected) < 1e-10
    for each in (masked, compact):
        backward(each)
    masked.mask_gradients()
    compact.expand()
    for parameter, expected in masked.parameters.items():
        if expected.grad is not None:
            torch.testing.assert_close(compact.parameters[parameter].grad, expected.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_so_does_one_of_tiles(name):
    made = sparse(name, ("block", "dense") if name in SWIN else TILES)
    made.set_masks(some(made))
    x = tokens(made.transformer)
    whole = outputs(made.transformer, x)
    made.compact()
    for actual, expected in zip(outputs(made.transformer, x), whole, strict=True):
        assert relative_error(actual, expected) < 1e-10


def fused_adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def looping_adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, foreach=False, fused=False, amsgrad=True)


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


@pytest.mark.parametrize("optimizer", [fused_adamw, looping_adamw, sgd])
@pytest.mark.parametrize(("name", "units"), [*((name, AXES) for name in KINDS), ("gpt2-tied", TILES), ("vit", TILES)])
def test_out_and_back_is_the_identity_bit_for_bit(name, units, optimizer):
    made = sparse(name, units, dtype=torch.float32, optimizer=optimizer)
    numbers, objects = sizes(made.transformer), list(made.transformer.parameters())
    made.set_masks(some(made))
    values = {key: parameter.detach().clone() for key, parameter in made.parameters.items()}
    made.compact()
    made.expand()
    assert_equal(values, {key: parameter.detach() for key, parameter in made.parameters.items()})
    step(made)
    made.expand()
    before = tensors(made)
    assert any(not torch.equal(before[key, "value"], value) for key, value in values.items())
    made.compact()
    assert made.num_reshapings == 5
    made.expand()
    assert_equal(before, tensors(made))
    assert sizes(made.transformer) == numbers
    assert all(old is new for old, new in zip(objects, made.transformer.parameters(), strict=True))
    on = all_entries_on(made, made.masks)
    for key, mask in on.items():
        assert not made.parameters[key].grad[~mask].any()
        assert not any(state[~mask].any() for state in moments(made, key))


def test_modules_say_how_many_heads_and_neurons_they_have():
    made = sparse("gpt2-tied")
    made.set_masks(some(made, 0.25))
    made.compact()
    block = made.transformer.transformer.h[0]
    assert (block.attn.num_heads, block.attn.split_size) == (1, 4)
    assert (block.attn.c_attn.nf, block.attn.c_proj.nx, block.mlp.c_fc.nf, block.mlp.c_proj.nx) == (12, 4, 8, 8)
    made = sparse("bert-mlm")
    made.set_masks(some(made, 0.25))
    made.compact()
    layer = made.transformer.bert.encoder.layer[0]
    attention = layer.attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (1, 4)
    assert (attention.query.out_features, layer.attention.output.dense.in_features) == (4, 4)
    assert (layer.intermediate.dense.out_features, layer.output.dense.in_features) == (8, 8)
    made = sparse("vit")
    made.set_masks(some(made, 0.25))
    made.compact()
    assert made.transformer.blocks[0].attn.num_heads == 1


@pytest.mark.parametrize("units", [AXES, TILES])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit"])
def test_state_dicts_are_those_of_the_whole_model(name, units):
    made = sparse(name, units)
    (optimizer,) = made.optimizers
    wrapper = nn.ModuleDict({"net": made.transformer})
    made.set_masks(some(made))
    step(made)
    assert made.is_compact
    states = copy.deepcopy((wrapper.state_dict(), optimizer.state_dict()))
    made.expand()
    assert_equal(states[0], wrapper.state_dict())
    whole = optimizer.state_dict()
    assert states[1]["param_groups"] == whole["param_groups"]
    assert states[1]["state"].keys() == whole["state"].keys()
    for index, state in whole["state"].items():
        assert_equal(states[1]["state"][index], state)
    # What is saved in a sparse phase is a whole model, which another one takes up.
    fresh = sparse(name, units)
    fresh.transformer.load_state_dict({key.removeprefix("net."): value for key, value in states[0].items()})
    fresh.optimizers[0].load_state_dict(states[1])
    resumed = SparseModel(fresh.transformer, fresh.anatomy, fresh.spaces, "compact", made.masks)
    resumed.optimizers = fresh.optimizers
    for each in (made, resumed):
        step(each, seed=2)
        each.expand()
    assert_equal(tensors(made), tensors(resumed))


@pytest.mark.parametrize("units", [AXES, TILES, ("neuron", "element")])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa"])
def test_the_smaller_model_takes_up_what_another_saved(name, units):
    """The best one so far, say; weights of units that are off among it."""
    donor, made = (sparse(name, units, seed=seed) for seed in (0, 1))
    for each in (donor, made):
        each.set_masks(some(each))
        step(each)
    saved = copy.deepcopy((donor.transformer.state_dict(), donor.optimizers[0].state_dict()))
    shapes = [parameter.shape for parameter in made.parameters.values()]
    nn.ModuleDict({"net": made.transformer}).load_state_dict({f"net.{key}": value for key, value in saved[0].items()})
    made.optimizers[0].load_state_dict(saved[1])
    assert made.is_compact == donor.is_compact
    assert shapes == [parameter.shape for parameter in made.parameters.values()]
    for each in (donor, made):
        step(each, seed=2)
        each.expand()
    assert_equal(tensors(donor), tensors(made))


@pytest.mark.parametrize("units", [AXES, TILES])
def test_a_copy_of_the_smaller_model_is_one_for_good(units):
    made = sparse("gpt2-tied", units)
    made.set_masks(some(made))
    made.compact()
    copied = copy.deepcopy(made.transformer)
    x = tokens(made.transformer)
    expected = outputs(made.transformer, x)
    made.expand()
    for actual, value in zip(outputs(copied, x), expected, strict=True):
        assert torch.equal(actual, value)
    assert {p.shape for p in copied.state_dict().values()} == {p.shape for p in copied.parameters()}


def test_the_anatomy_is_that_of_the_whole_model_throughout():
    made = sparse("gpt2-tied")
    made.set_masks(some(made))
    made.compact()
    assert anatomy_of(made.transformer) == made.anatomy
    made.expand()
    assert anatomy_of(made.transformer) == made.anatomy


@pytest.mark.parametrize("units", [AXES, TILES])
def test_graphs_that_somebody_still_holds_are_no_hindrance(units):
    """Autograd knows a parameter by its shape for as long as a graph of it lives."""
    plain, made = (sparse("gpt2-tied", units) for _ in range(2))
    held = []
    for each in (plain, made):
        each.set_masks(some(each))
        for seed in range(3):
            if each is made:
                held.append(loss_of(each))
            step(each, seed)
            if each is made:
                held.append(loss_of(each))
            each.expand()
    assert_equal(tensors(plain), tensors(made))


def test_where_nothing_is_off_or_nothing_can_be_taken_out_the_model_stays_whole():
    for units, share in ((AXES, 1.0), (TILES, 1.0), (ENTRIES, 0.5), (TWO_OF_FOUR, 0.5)):
        made = sparse("gpt2-tied", units)
        made.set_masks(some(made, share) if share < 1 else everything(made))
        made.compact()
        assert not made.is_compact and made.num_reshapings == 0
        assert made.is_dense == (share == 1)


# What is off


ADAMWS = [fused_adamw, looping_adamw]


@pytest.mark.parametrize("optimizer", ADAMWS)
@pytest.mark.parametrize("units", [ENTRIES, TWO_OF_FOUR, TILES, AXES, ("dense", "dense", "element")])
def test_what_is_off_stays_as_it_was(units, optimizer):
    """Neither gradients nor weight decay nor momentum move it, in the whole model either."""
    made = sparse("gpt2-tied", units, "masked", dtype=torch.float32, optimizer=optimizer)
    step(made)
    made.set_masks(some(made))
    on, zero = all_entries_on(made, made.masks), is_output(made)
    before = {key: made.parameters[key].detach().clone() for key in on}
    for seed in range(3):
        step(made, seed)
        for key, mask in on.items():
            parameter = made.parameters[key]
            assert torch.equal(parameter[~mask], before[key][~mask])
            assert not parameter.grad[~mask].any()
            assert not any(state[~mask].any() for state in moments(made, key))
            assert not zero[key] or not parameter[~mask].any()
            assert (parameter[mask] != before[key][mask]).any()


@pytest.mark.parametrize("units", [AXES, TILES, ("neuron", "element", "element"), ("block", "2:4")])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit-registers"])
def test_both_executions_train_alike(name, units):
    """Through clipping by the norm, and through changes of the topology."""
    both = [sparse(name, units, execution) for execution in ("masked", "compact")]
    for seed, share in enumerate((1.0, 0.5, 0.25, 0.5, 1.0)):
        for each in both:
            each.expand()
            each.set_masks(some(each, share, seed) if share < 1 else everything(each))
            for number in range(3):
                step(each, 10 * seed + number, clip=0.1)
    masked, compact = both
    compact.expand()
    for key, expected in masked.parameters.items():
        torch.testing.assert_close(compact.parameters[key], expected, rtol=1e-8, atol=1e-10)


# An update


def updated_masks(made, seed=5):
    """Half of what is on goes, and as many others come."""
    result = {}
    for name, mask in made.masks.items():
        scores = torch.rand(mask.shape, generator=generator(seed))
        num_on = int(mask[0].sum())
        num_changed = min(num_on, mask.shape[1] - num_on) // 2 or 1
        dropped = scores.masked_fill(~mask, -1).topk(num_changed, 1).indices
        grown = scores.masked_fill(mask, -1).topk(num_changed, 1).indices
        result[name] = mask.scatter(1, dropped, False).scatter(1, grown, True)
    return result


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize(
    ("name", "units"),
    [*((name, AXES) for name in KINDS), *((n, u) for n in ("gpt2-tied", "vit") for u in (TILES, ENTRIES, TWO_OF_FOUR))],
)
def test_survivors_keep_every_bit_and_the_others_begin_anew(name, units, execution):
    made = sparse(name, units, execution, dtype=torch.float32)
    made.set_masks(some(made))
    for seed in range(2):
        step(made, seed)
    made.expand()
    before, old = tensors(made), all_entries_on(made, made.masks)
    masks = updated_masks(made)
    made.set_masks(masks)
    after, new, zero = tensors(made), all_entries_on(made, masks), is_output(made)
    assert_equal(masks, made.masks)
    for key, was_on in old.items():
        survives, grown, dropped = was_on & new[key], new[key] & ~was_on, was_on & ~new[key]
        # Of two groups of queries one takes the place of the other.
        assert (survives.any() or name == "llama-gqa") and grown.any() and dropped.any()
        for kind in ("value", "exp_avg", "exp_avg_sq"):
            assert torch.equal(before[key, kind][survives], after[key, kind][survives])
        for kind in ("exp_avg", "exp_avg_sq"):
            assert before[key, kind][dropped].any()
            assert not after[key, kind][~survives].any()
        if zero[key]:
            assert not after[key, "value"][~survives].any()
        else:
            # What leads into a unit waits for its return.
            assert torch.equal(before[key, "value"], after[key, "value"])
    for key, value in after.items():
        assert key[0] in old or torch.equal(value, before[key])


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("units", [AXES, TILES, ENTRIES, TWO_OF_FOUR])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit-glu", "bert-mlm"])
def test_growing_changes_no_output_and_dropping_does(name, units, execution):
    made = sparse(name, units, execution)
    made.set_masks(some(made, 0.5))
    step(made)
    x = tokens(made.transformer)

    def outputs_with(masks):
        made.expand()
        made.set_masks(masks)
        made.compact()
        return outputs(made.transformer, x)

    others = updated_masks(made)
    if units == TWO_OF_FOUR:
        # Two are on or all.
        larger, smaller = everything(made), others
    else:
        larger = {name: mask | others[name] for name, mask in made.masks.items()}
        # In a run no block is without heads, and the attention of torch 2.11 kills the process that asks for that.
        both = {name: mask & others[name] for name, mask in made.masks.items()}
        smaller = {name: torch.where(both[name].any(1, keepdim=True), both[name], made.masks[name]) for name in both}
    before = outputs_with(made.masks)
    for actual, expected in zip(outputs_with(larger), before, strict=True):
        assert relative_error(actual, expected) < 1e-10
    after = outputs_with(smaller)
    assert max(relative_error(actual, expected) for actual, expected in zip(after, before, strict=True)) > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_newborn_units_learn(name):
    """In one step what comes out of them moves, in two what leads into them does."""
    made = sparse(name)
    masks = some(made)
    made.set_masks(masks)
    made.set_masks(everything(made))
    before, zero = tensors(made), is_output(made)
    born = {key: ~on for key, on in all_entries_on(made, masks).items()}
    step(made, 1)
    for key, entries in born.items():
        gradient = made.parameters[key].grad[entries]
        assert gradient.any() == zero[key]
        if zero[key]:
            assert (made.parameters[key][entries] != 0).all() or name == "vit-glu"
    step(made, 2)
    for key, entries in born.items():
        assert made.parameters[key].grad[entries].any()
        assert (made.parameters[key][entries] != before[key, "value"][entries]).any()


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa"])
def test_were_both_sides_zero_they_never_would(name):
    """The saddle that the input side is kept for."""
    made = sparse(name)
    masks = some(made)
    made.set_masks(masks)
    made.set_masks(everything(made))
    born = {key: ~on for key, on in all_entries_on(made, masks).items()}
    with torch.no_grad():
        for key, entries in born.items():
            made.parameters[key][entries] = 0
    backward(made)
    assert not any(made.parameters[key].grad[entries].any() for key, entries in born.items())
