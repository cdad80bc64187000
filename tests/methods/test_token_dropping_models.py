"""Models of every family on some of their tokens, against references that know nothing of taking and putting."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace

import pytest
import torch
from timm.models.swin_transformer_v2 import window_partition

from lit_accel.methods.token_dropping.dropper import TokenDropper
from lit_accel.methods.token_dropping.schedule import TokenSchedule
from lit_accel.routing import Order, hidden_states_of, routing_of, with_hidden_states
from tests.methods.dropping import assert_gradients_equal, backward, in_training, intercepted
from tests.models import ALL_MODELS, make_model, outputs, tokens
from tests.vision import PADS_WINDOWS, VISION_ZOO

SMALL = {"heads": 2, "head_dim": 8, "ffn": 32, "blocks": 4}
DECODERS = ["gpt2-tied", "llama-gqa", "mistral", "qwen2-tied", "qwen3"]
SWINS = [name for name in VISION_ZOO if "swin" in name]
VITS = ["vit", "vit-registers", "vit-respost", "deit-distilled"]


def in_double(name, **options):
    return make_model(name, **SMALL, **options).train()


def dropping(model, start=0.5, blocks=None, keys=(0,), **options):
    routing = routing_of(model)
    blocks = range(len(routing.blocks)) if blocks is None else blocks
    dropper = TokenDropper(routing, blocks, TokenSchedule(start, 10, 1), **options)
    dropper.is_active = True
    dropper.set(0, keys)
    return dropper


def forward(model, x, **kwargs):
    return model(input_ids=x, **kwargs)[0] if hasattr(model, "config") else model(x, **kwargs)


def calls_of(model, x, **kwargs):
    calls = {}

    def watch(call, run):
        output = run(call)
        calls[call.index] = (call.hidden_states.detach(), hidden_states_of(output).detach())
        return output

    routing = routing_of(model)
    routing.add(watch, Order.PROBE)
    forward(model, x, **kwargs)
    routing.remove(watch)
    return [calls[index] for index in range(len(routing.blocks))]


def visits_of(model, x, **kwargs):
    """Which tokens each block changed."""
    return [(before != after).any(-1) for before, after in calls_of(model, x, **kwargs)]


# What must not change


@pytest.mark.parametrize("step", [0, 10])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_with_every_token_kept_it_is_bitwise_the_plain_model_with_dropout_on(name, step):
    """Early, with more to be kept than there is; and at the end of the schedule."""
    results = []
    for has_dropper in (False, True):
        model = in_training(name, blocks=3)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        if step == 0 and hasattr(model, "config"):
            # A cache lays keys out anew, and of these GPT-2's attention with dropout makes other roundings.
            model.config.use_cache = False
        if has_dropper:
            dropper = dropping(model, 64 if step == 0 else 0.5)
            dropper.set(step, (0,))
        torch.manual_seed(0)
        results.append((*backward(model), torch.get_rng_state()))
    assert dropper.num_restricted == 0
    plain, mine = results
    assert torch.equal(mine[0], plain[0])
    assert_gradients_equal(mine[1], plain[1], rtol=0, atol=0)
    assert torch.equal(mine[2], plain[2])


@pytest.mark.parametrize("name", ALL_MODELS)
def test_evaluation_copies_keys_and_checkpoints_are_those_of_the_plain_model(name):
    model, plain = in_training(name, blocks=3), in_training(name, blocks=3)
    x = tokens(model)
    training = forward(plain, x)
    dropper = dropping(model)
    assert not torch.equal(forward(model, x), training)
    assert dropper.num_restricted > 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(forward(twin, x), training)
    dropper.set(0, (0,))
    for mine, theirs in zip(outputs(model.eval(), x), outputs(plain.eval(), x), strict=True):
        assert torch.equal(mine, theirs)
    assert dropper.num_restricted == 0
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in plain.named_parameters()]
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    dropper.close()
    assert intercepted(model) == []
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert torch.equal(forward(model.train(), x), training)


@pytest.mark.parametrize("name", DECODERS)
def test_generation_and_calls_with_a_cache_are_untouched_in_any_mode(name):
    model = in_training(name, blocks=3)
    x = tokens(model)
    for mode in (True, False):
        model.train(mode)
        expected = model.generate(x, max_new_tokens=6, do_sample=False)
        logits = model(input_ids=x, use_cache=True).logits
        dropper = dropping(model)
        assert torch.equal(model.generate(x, max_new_tokens=6, do_sample=False), expected)
        result = model(input_ids=x, use_cache=True)
        assert torch.equal(result.logits, logits)
        assert result.past_key_values.get_seq_length(1) == x.shape[1]
        assert dropper.num_restricted == 0
        dropper.close()


@pytest.mark.parametrize("name", ["gpt2-tied", "bert-mlm", "vit", "swin-heads"])
def test_a_frozen_block_in_evaluation_mode_sees_every_token(name):
    model = in_training(name, blocks=3)
    dropper, lengths = dropping(model), []
    for module in routing_of(model).modules[:2]:
        module.register_forward_hook(lambda *args: lengths.append(hidden_states_of(args[2]).shape[1:-1].numel()))
    for dropper.is_active, frozen in ((False, False), (True, False), (True, True)):
        routing_of(model).modules[1].train(not frozen)
        forward(model, tokens(model))
    full, kept = lengths[1:3]
    assert kept < full
    assert lengths == [full, full, kept, kept, kept, full]


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit", *SWINS])
def test_an_exception_in_a_block_leaves_nothing_behind(name):
    model = in_training(name, blocks=3)
    x = tokens(model)
    dropping(model)
    expected = forward(model, x)
    # The second block: in Swin it is shifted.
    block = routing_of(model).modules[1]
    state = {key: getattr(block, key, None) for key in ("shift_size", "attn_mask", "dynamic_mask")}

    def fail(*_):
        raise OSError("out of paper")

    handle = next(part for part in block.modules() if not list(part.children())).register_forward_hook(fail)
    with pytest.raises(OSError, match="out of paper"):
        forward(model, x)
    handle.remove()
    assert all(getattr(block, key, None) is value for key, value in state.items())
    assert torch.equal(forward(model, x), expected)


# References at full length


def emulate(model, visits):
    """Compute everything for all tokens, but attend to the kept ones only and throw away what the others became."""
    names = {"attention_mask", "attn_mask"}

    def handler(call, run):
        kept = visits[call.index]
        block, signature = routing_of(model).blocks[call.index], inspect.signature(call.module.forward)
        masked = call
        if block.windows is None:
            # Each token sees itself, so that no row of the mask is empty; for kept ones that is nothing new.
            seen = kept[:, None] | torch.eye(kept.shape[1], dtype=torch.bool)
            if block.attention.causal:
                seen = seen.tril().triu(1 - (block.attention.window or kept.shape[1]))
            bound = signature.bind(*call.args, **call.kwargs)
            bound.arguments[next(iter(names & signature.parameters.keys()))] = seen[:, None]
            masked = replace(call, args=bound.args, kwargs=bound.kwargs)
        output = run(masked)
        y = torch.where(kept.unsqueeze(-1), hidden_states_of(output), call.hidden_states)
        return with_hidden_states(output, y)

    routing_of(model).add(handler, Order.SUBSET)


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "mistral", "qwen3", "bert-mlm", *VITS, *SWINS])
def test_it_equals_a_dense_model_with_masked_attention_and_updates(name):
    """In LLaMA and the like the reference rotates all queries and keys, each by its place in the whole sequence."""
    model, reference = in_double(name), in_double(name)
    x = tokens(model)
    dropping(model)
    visits = visits_of(model, x)
    if name not in SWINS:
        length = visits[0].shape[1]
        assert all((kept.sum(1) == round(0.5 * length)).all() for kept in visits)
    emulate(reference, visits)
    output, gradients = backward(model)
    expected, expected_gradients = backward(reference)
    torch.testing.assert_close(output, expected)
    assert_gradients_equal(gradients, expected_gradients)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_every_parameter_of_a_block_is_trained_with_two_tokens_kept(name):
    model = in_double(name)
    num_blocks = len(routing_of(model).blocks)
    # What is pooled at the end comes from all tokens by way of the last block.
    dropping(model, 0.3 if name in SWINS else 2, blocks=range(1, num_blocks - 1))
    _, gradients = backward(model)
    for index in range(1, num_blocks - 1):
        for key, _ in routing_of(model).modules[index].named_parameters():
            # The softmax does not change when all scores of a query do.
            if not key.endswith(("key.bias", "k_norm.bias")):
                full_name = f"{routing_of(model).blocks[index].path}.{key}"
                assert gradients[full_name].abs().max() > 1e-10, full_name


# Scopes and the prefix


def by_hand(model, x, kept, blocks):
    """A VisionTransformer whose ``blocks`` run on the kept tokens, of which nothing returns if they are the last."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    indices = kept.nonzero()[:, 1].view(len(x), -1, 1).expand(-1, -1, x.shape[2])
    for index, block in enumerate(model.blocks):
        if index == blocks[0]:
            whole, x = x, x.gather(1, indices)
        x = block(x)
        if index == blocks[-1] and index + 1 < len(model.blocks):
            x = whole.scatter(1, indices, x)
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("name", VITS)
def test_by_route_tokens_are_taken_out_and_put_back_once(name):
    model = in_training(name, blocks=5)
    x = tokens(model)
    dropper = dropping(model, blocks=[1, 2, 3], scope="route", num_prefix=1)
    first, *visits, last = visits_of(model, x)
    assert first.all() and last.all() and not visits[0].all()
    assert all(torch.equal(kept, visits[0]) for kept in visits)
    output = forward(model, x)
    dropper.close()
    assert torch.equal(output, by_hand(model, x, visits[0], [1, 2, 3]))


@pytest.mark.parametrize("name", [*VITS, "vit-pooled"])
def test_by_input_it_is_the_plain_model_on_some_patches(name):
    model = in_training(name, blocks=3)
    x, prefix = tokens(model), model.num_prefix_tokens
    dropper = dropping(model, scope="input", num_prefix=prefix)
    inside = []

    def watch(call, run):
        inside.append(call.hidden_states)
        return run(call)

    dropper.routing.add(watch, Order.SUBSET)
    (whole, _), *_ = calls_of(model, x)
    dropper.routing.remove(watch)
    kept = (whole[:, :, None] == inside[0][:, None]).all(-1).any(-1)
    assert kept[:, :prefix].all()
    assert (kept.sum(1) == round(0.5 * whole.shape[1])).all()
    output, gradients = backward(model)
    dropper.close()
    model.zero_grad()
    expected = by_hand(model, x, kept, range(3))
    expected.logsumexp(-1).mean().backward()
    assert torch.equal(output, expected)
    assert_gradients_equal(gradients, {key: p.grad for key, p in model.named_parameters()})


def test_by_input_a_frozen_first_block_leaves_every_patch_to_the_others():
    model = in_training("vit", blocks=3)
    plain = forward(model, tokens(model))
    dropper = dropping(model, scope="input", num_prefix=1)
    forward(model, tokens(model))
    assert dropper.num_restricted == 3
    model.blocks[0].eval()
    torch.testing.assert_close(forward(model, tokens(model)), plain, rtol=0, atol=0)
    assert dropper.num_restricted == 3


@pytest.mark.parametrize("name", VITS)
def test_the_prefix_is_kept_in_every_block(name):
    model = in_training(name, blocks=4)
    prefix = model.num_prefix_tokens
    # Fewer than the prefix are asked for, and one more.
    for start, num_kept in ((1, prefix), (prefix + 1, prefix + 1)):
        dropper = dropping(model, start, num_prefix=prefix)
        for key in range(5):
            dropper.set(0, (key,))
            for kept in visits_of(model, tokens(model)):
                assert kept[:, :prefix].all()
                assert (kept.sum(1) == num_kept).all()
        dropper.close()


# Windows


def assert_whole_windows(kept, block):
    """Of the shifted image timm cuts windows, each of which is kept or dropped; the padding of one may be either."""
    shift, window, (height, width) = block.shift_size, block.window_size, kept.shape[1:]
    rolled = kept.float().unsqueeze(-1).roll((-shift[0], -shift[1]), (1, 2))
    padding = (0, 0, 0, -width % window[1], 0, -height % window[0])
    low, high = (
        window_partition(torch.nn.functional.pad(rolled, padding, value=value), window).flatten(1) for value in (1, 0)
    )
    assert torch.equal(low.amin(1), high.amax(1))
    return low.amin(1).view(len(kept), -1).sum(1)


@pytest.mark.parametrize("size", [12, 20] if PADS_WINDOWS else [12])
@pytest.mark.parametrize("name", SWINS)
def test_kept_windows_are_bitwise_those_of_the_dense_block(name, size):
    # In double precision: in single, products of other numbers of windows may be rounded otherwise.
    model = in_double(name, dynamic_img_size=size != 12) if PADS_WINDOWS else in_double(name)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    dropper = dropping(model)
    kinds, are_alike = set(), []
    for key in range(4):
        dropper.set(0, (key,))
        for module, (before, after) in zip(routing_of(model).modules, calls_of(model, x), strict=True):
            dense = module.forward(before)
            kept = (before != after).any(-1)
            num_windows = -(-before.shape[1] // module.window_size[0]) * -(-before.shape[2] // module.window_size[1])
            assert (assert_whole_windows(kept, module) == max(1, num_windows // 2)).all()
            is_padded = before.shape[1] % module.window_size[0] > 0
            tolerance = {} if is_padded else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(after[kept], dense[kept], **tolerance)
            are_alike.append(torch.equal(kept[0], kept[1]))
            kinds.add((any(module.shift_size), num_windows > 1, is_padded))
    assert {(False, True), (True, True)} <= {kind[:2] for kind in kinds}
    assert not all(are_alike[:2])
    assert any(kind[2] for kind in kinds) == (name == "swin-padded" or size == 20)


def test_a_stage_with_one_window_is_dense():
    model = in_training("swin", blocks=2)
    dropper = dropping(model)
    visits = visits_of(model, tokens(model))
    assert [bool(kept.all()) for kept in visits] == [False] * 2 + [True] * 4
    assert dropper.num_restricted == 2
