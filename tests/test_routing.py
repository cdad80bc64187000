"""The interception of blocks: skipped ones run nothing, and what is not training is never touched."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from lit_accel.anatomy import anatomy_of
from lit_accel.compute import training_flops
from lit_accel.methods.layer_dropping import BlockDropper
from lit_accel.routing import Order, hidden_states_of, routing_of, with_hidden_states
from tests.models import ALL_MODELS, make_model, outputs, tokens

SMALL = {"heads": 4, "head_dim": 4, "ffn": 32, "blocks": 4}


def scale_for(name):
    return "none" if "bert" in name else "block"


def dropping(model, keep, p=0.5, scale="block"):
    dropper = BlockDropper(routing_of(model), scale)
    dropper.set(keep, [p] * len(keep))
    dropper.is_active = True
    return dropper


def call(model, x, **kwargs):
    result = model(input_ids=x, **kwargs) if hasattr(model, "config") else model(x)
    if isinstance(result, tuple):
        return result[0]
    return result if isinstance(result, torch.Tensor) else next(iter(result.values()))


def in_training(name):
    model = make_model(name, dtype=torch.float32, **SMALL).train()
    if name == "deit-distilled":
        model.set_distilled_training(False)
    return model


def alternating(model):
    return [index % 2 == 0 for index in range(len(routing_of(model).blocks))]


@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_dropped_block_runs_nothing_and_is_the_identity(name):
    model = in_training(name)
    routing = routing_of(model)
    keep = alternating(model)
    calls = dict.fromkeys(range(len(keep)), 0)
    for index, block in enumerate(routing.modules):
        for module in block.modules():
            module.register_forward_hook(lambda *_, index=index: calls.update({index: calls[index] + 1}))
    seen = {}

    def watch(block_call, run):
        output = run(block_call)
        seen[block_call.index] = hidden_states_of(output) is block_call.hidden_states
        return output

    routing.add(watch, Order.PROBE)
    dropper = dropping(model, keep, scale=scale_for(name))
    call(model, tokens(model)).sum().backward()
    for index, (kept, block) in enumerate(zip(keep, routing.modules, strict=True)):
        assert bool(calls[index]) is kept
        assert seen[index] is not kept
        assert all((parameter.grad is not None) is kept for parameter in block.parameters())
    dropper.close()
    routing.remove(watch)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_everything_kept_is_bitwise_the_plain_model(name):
    plain, model = in_training(name), in_training(name)
    x = tokens(model)
    dropping(model, [True] * len(routing_of(model).blocks), p=1.0, scale=scale_for(name))
    assert torch.equal(call(model, x), call(plain, x))
    for each in (model, plain):
        call(each, x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is None if theirs.grad is None else torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_evaluation_copies_and_keys_are_untouched(name):
    model = in_training(name)
    x = tokens(model)
    keys = list(model.state_dict())
    training = call(model, x)
    model.eval()
    evaluated = outputs(model, x)
    dropper = dropping(model, [False] * len(routing_of(model).blocks), scale=scale_for(name))
    for mine, theirs in zip(outputs(model, x), evaluated, strict=True):
        assert torch.equal(mine, theirs)
    model.train()
    assert not torch.equal(call(model, x), training)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(twin, x), training)
    dropper.close()
    assert torch.equal(call(model, x), training)
    assert all("_compiled_call_impl" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "qwen3"])
def test_generation_is_untouched_in_any_mode(name):
    model = in_training(name)
    x = tokens(model)
    dropper = dropping(model, [False] * 4)
    for mode in (True, False):
        model.train(mode)
        generated = model.generate(x, max_new_tokens=6, do_sample=False)
        dropper.is_active = False
        assert torch.equal(model.generate(x, max_new_tokens=6, do_sample=False), generated)
        dropper.is_active = True


@pytest.mark.parametrize("name", ["gpt2-tied", "gpt2-base", "llama-gqa", "mistral"])
def test_no_cache_is_filled_in_training_unless_asked_for(name):
    model = in_training(name)
    x = tokens(model)
    assert model(input_ids=x).past_key_values is not None
    dropper = dropping(model, [True] * 4, p=1.0)
    assert model(input_ids=x).past_key_values is not None
    dropper.set([True, False, True, True], [0.5] * 4)
    assert copy.deepcopy(model)(input_ids=x).past_key_values is not None
    assert model(input_ids=x).past_key_values is None
    # With a cache everything runs.
    model.zero_grad()
    result = model(input_ids=x, use_cache=True)
    result[0].sum().backward()
    assert result.past_key_values.get_seq_length(1) == x.shape[1]
    assert all(p.grad is not None for p in routing_of(model).modules[1].parameters())


class TupleBlock(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, *args, **kwargs):
        return self.block(hidden_states, *args, **kwargs), "weights"


class TupleStack(torch.nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        extras = []
        for block in self.blocks:
            x, extra = block(hidden_states=x)
            extras.append(extra)
        return x, extras


def test_a_tuple_is_answered_with_a_tuple():
    model = make_model("gpt2-base", dtype=torch.float32, **SMALL).train()
    routing = routing_of(model)
    stack = TupleStack(torch.nn.ModuleList(TupleBlock(block) for block in model.h)).train()
    # The routing of older models, whose blocks returned tuples and took their input by keyword.
    routing.modules = list(stack.blocks)
    dropping(model, [False, True, False, True])
    x = torch.randn(2, 5, 16, requires_grad=True)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    output, extras = stack(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert extras == [None, "weights", None, "weights"]
    assert torch.equal(with_hidden_states((x, 1), output)[0], output)
    output.sum().backward()
    assert all(p.grad is None for p in stack.blocks[0].parameters())


def test_the_routing_dies_with_its_model():
    model = in_training("gpt2-tied")
    routing = routing_of(model)
    assert routing_of(model) is routing
    gone = weakref.ref(model)
    dropping(model, [True] * 4)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("scale", ["block", "sublayer"])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit-registers", "deit-distilled", "swin", "vit-respost"])
def test_scaling_amplifies_what_a_block_adds(name, scale):
    model = make_model(name, **SMALL).train()
    routing = routing_of(model)
    num_blocks = len(routing.blocks)
    added = {}

    def record(block_call, run):
        output = run(block_call)
        added[block_call.index] = (block_call.hidden_states, hidden_states_of(output))
        return output

    routing.add(record, Order.PROBE)
    x = tokens(model)
    call(model, x)
    before = added[0]
    # Only the first block runs, so that it is given the same.
    dropper = dropping(model, [True] + [False] * (num_blocks - 1), p=0.5, scale=scale)
    call(model, x)
    after = added[0]
    assert torch.equal(before[0], after[0])
    ratio = (after[1] - after[0]).norm() / (before[1] - before[0]).norm()
    if scale == "block":
        torch.testing.assert_close(after[1] - after[0], 2 * (before[1] - before[0]))
    else:
        # The second branch sees the amplified first one.
        assert 1 < ratio < 4
        assert not torch.allclose(after[1] - after[0], 2 * (before[1] - before[0]))
    dropper.close()
    routing.remove(record)


@pytest.mark.parametrize("residual", [True, False])
def test_the_branch_scale_of_the_paper_is_exact_where_the_second_branch_sees_no_difference(residual):
    """With a feed-forward branch that adds a constant, x + A/p + F/p is what the paper's block computes."""
    model = make_model("gpt2-base", **SMALL).train()
    with torch.no_grad():
        for block in model.h:
            block.mlp.c_proj.weight.zero_()
    block = model.h[0]
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    full = block(x)
    dropper = dropping(model, [True] * 4, p=0.25, scale="sublayer")
    if residual:
        torch.testing.assert_close(block(x) - x, 4 * (full - x))
    else:
        dropper.close()
        assert torch.equal(block(x), full)


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit", "swin"])
def test_the_expectation_over_the_draw_is_the_block(name):
    model = make_model(name, **SMALL).train()
    routing = routing_of(model)
    kept: dict[int, torch.Tensor] = {}
    inputs: dict[int, torch.Tensor] = {}

    def record(block_call, run):
        output = run(block_call)
        inputs[block_call.index], kept[block_call.index] = block_call.hidden_states, hidden_states_of(output)
        return output

    routing.add(record, Order.PROBE)
    x = tokens(model)
    for p in (0.3, 0.5, 0.9):
        dropper = dropping(model, [True] + [False] * (len(routing.blocks) - 1), p=p)
        call(model, x)
        scaled = kept[0]
        dropper.close()
        call(model, x)
        torch.testing.assert_close(p * scaled + (1 - p) * inputs[0], kept[0], rtol=0, atol=1e-12)


class LinearBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x):
        return x + self.linear(x)


@pytest.mark.parametrize(("scale", "is_exact"), [("block", True), ("none", False)])
def test_the_expectation_of_a_linear_stack_is_the_stack_with_every_block(scale, is_exact):
    """Over all masks, each with its probability; blocks are dropped independently."""
    routing = routing_of(make_model("gpt2-base", **SMALL).train())
    torch.manual_seed(0)
    stack = torch.nn.Sequential(*(LinearBlock() for _ in range(4))).train()
    routing.modules = list(stack)
    x = torch.randn(3, 16, dtype=torch.float64)
    full = stack(x)
    keep_probabilities = [0.9, 0.75, 0.5, 0.4]
    dropper = BlockDropper(routing, scale)
    dropper.is_active = True
    expected = torch.zeros_like(full)
    for keep in itertools.product([True, False], repeat=4):
        dropper.set(keep, keep_probabilities)
        weight = math.prod(p if kept else 1 - p for p, kept in zip(keep_probabilities, keep, strict=True))
        expected += weight * stack(x)
    error = (expected - full).abs().max()
    assert error < 1e-12 if is_exact else error > 0.1


def test_drawing_and_skipping_leave_every_global_generator_alone():
    from lit_accel.methods.layer_dropping import sample_blocks

    model = in_training("gpt2-tied")
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002
    dropper = dropping(model, [False] * 4)
    dropper.set(sample_blocks([0.5] * 4, seed=1, step=2), [0.5] * 4)
    call(model, tokens(model))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm", "vit-registers", "swin"])
def test_flops_are_those_of_the_blocks_that_ran(name, monkeypatch):
    is_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: device != ("meta",) and is_enabled(*device))
    transformers.logging.set_verbosity_error()
    with torch.device("meta"):
        model = make_model(name, dtype=torch.float32, heads=4, head_dim=8, ffn=64, blocks=4).train()
    if hasattr(model, "config"):
        model.base_model.warn_if_padding_and_no_attention_mask = lambda *args: None
        model.set_attn_implementation("eager")
    anatomy = anatomy_of(model)
    x = tokens(model).to("meta")
    shape = tuple(x.shape) if hasattr(model, "config") else anatomy.input_shape((x,), {})
    cost = training_flops(anatomy, *shape, attention="full")
    routing = routing_of(model)
    routing._num_outputs[type(routing.modules[0])] = None
    dropper = dropping(model, [True] * len(routing.blocks), p=0.5, scale="none")

    def counted(keep):
        dropper.set(keep, [0.5] * len(keep))
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            # Without a mask and a cache, causal models look for packed sequences, in values.
            mask = {"attention_mask": torch.ones_like(x)} if anatomy.blocks[0].attention.causal else {}
            call(model, x, **mask).sum().backward()
        return counter.get_total_flops()

    others = [False] * (len(routing.blocks) - 1)
    # Of the older transformers torch counts the rotary angles too, which come to nothing.
    assert counted([True, *others]) == pytest.approx(cost.blocks[0] + cost.outside_blocks, rel=1e-4)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        keep = [True, *(torch.rand(len(others), generator=generator) < 0.5).tolist()]
        ran = sum(flops for flops, kept in zip(cost.blocks[1:], keep[1:], strict=True) if kept)
        assert counted(keep) - counted([True, *others]) == ran
