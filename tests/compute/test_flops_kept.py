"""The closed form of blocks that run on some of their tokens, against torch's own counter and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from lit_accel.anatomy import Attention, anatomy_of
from lit_accel.compute import forward_flops, training_flops
from lit_accel.compute.flops import attention_pairs, kept_pairs
from lit_accel.draws import generator
from lit_accel.methods.token_dropping.dropper import TokenDropper
from lit_accel.methods.token_dropping.schedule import TokenSchedule
from lit_accel.methods.token_dropping.subsets import sample_tokens
from lit_accel.routing import routing_of
from tests.models import ALL_MODELS, make_model, tokens
from tests.vision import VISION_ZOO


@pytest.fixture(autouse=True)
def plain_attention():
    """The kernel whose products torch's counter sees on every device, masked ones among them."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def in_training(name):
    return make_model(name, dtype=torch.float32, heads=4, head_dim=8, ffn=64, blocks=3).train()


def dropping(model, share, blocks=None, **options):
    """Let tokens be dropped, and return what is said about it: the kept tokens by block."""
    routing, kept = routing_of(model), {}
    routing.listen(lambda index, num_tokens: kept.update({index: num_tokens}))
    blocks = range(len(routing.blocks)) if blocks is None else blocks
    dropper = TokenDropper(routing, blocks, TokenSchedule(share, 10, 1), **options)
    dropper.is_active = True
    return kept


def counted_by_torch(model, x):
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=x) if hasattr(model, "config") else model(x)
        forward = counter.get_total_flops()
        values = output.values() if hasattr(model, "config") else [output]
        sum(v.sum() for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()).backward()
    return forward, counter.get_total_flops()


def closed_form(model, x, kept=None):
    anatomy = anatomy_of(model)
    counts = (forward_flops, training_flops)
    return tuple(count(anatomy, *shape_of(model, x), attention="full", kept=kept).total for count in counts)


def shape_of(model, x):
    return tuple(x.shape) if hasattr(model, "config") else anatomy_of(model).input_shape((x,), {})


def saved(whole, part):
    return tuple(dense - kept for dense, kept in zip(whole, part, strict=True))


@pytest.mark.parametrize("name", ALL_MODELS)
def test_what_is_saved_is_exactly_what_torch_does_not_count(name):
    plain, model = in_training(name), in_training(name)
    x = tokens(model, batch=3)
    whole, closed = counted_by_torch(plain, x), closed_form(model, x)
    kept = dropping(model, 0.3)
    part = counted_by_torch(model, x)
    assert kept
    assert 0 < part[0] < whole[0]
    assert saved(whole, part) == saved(closed, closed_form(model, x, kept))
    # Of older transformers torch counts the rotary angles too, dropping or not.
    if name in VISION_ZOO:
        assert part == closed_form(model, x, kept)
    assert part == pytest.approx(closed_form(model, x, kept), rel=0.01)


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "vit-pooled"])
def test_what_is_dropped_before_the_first_block_is_not_in_any(name):
    model = in_training(name)
    x, prefix = tokens(model, batch=3), model.num_prefix_tokens
    kept = dropping(model, 0.5, scope="input", num_prefix=prefix)
    assert counted_by_torch(model, x) == closed_form(model, x, kept)
    assert kept == dict.fromkeys(range(3), round(0.5 * (9 + prefix)))


@pytest.mark.parametrize("name", sorted({"gpt2-tied", "llama-gqa", "vit", "swin", "swin-padded"} & set(ALL_MODELS)))
def test_activation_checkpointing_repeats_what_was_kept(name):
    results = []
    for share in (None, 0.5):
        model = in_training(name)
        if hasattr(model, "config"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.set_grad_checkpointing()
        x = tokens(model, batch=3)
        kept = {} if share is None else dropping(model, share)
        with set_checkpoint_early_stop(False):
            counted = counted_by_torch(model, x)[1]
        closed = training_flops(
            anatomy_of(model), *shape_of(model, x), attention="full", activation_checkpointing=True, kept=kept
        )
        results.append((counted, closed.total))
    (whole, closed_whole), (part, closed_part) = results
    assert part < whole
    assert whole - part == closed_whole - closed_part


def test_blocks_that_are_not_named_run_on_all_tokens():
    anatomy = anatomy_of(in_training("gpt2-tied"))
    whole, part = forward_flops(anatomy, 2, 16), forward_flops(anatomy, 2, 16, kept={1: 4})
    assert part.blocks[0::2] == whole.blocks[0::2]
    assert part.outside_blocks == whole.outside_blocks
    # 12 embed² weights of matrices here have 4 + 2 · 64 / 32 = 8 for each embed², and 4 · 5 / 2 pairs.
    assert part.blocks[1] == 2 * (2 * 4 * 8 * 32**2 + 4 * 32 * 10)
    assert training_flops(anatomy, 2, 16, kept={1: 4}).blocks[1] == 3 * part.blocks[1]


# Pairs


def allowed(num_tokens, window, causal):
    query, key = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None]
    pairs = key <= query if causal else torch.ones(num_tokens, num_tokens, dtype=torch.bool)
    return pairs if window is None else pairs & ((query - key).abs() < window)


def among(pairs, kept_bk):
    return pairs[kept_bk[:, :, None], kept_bk[:, None]].sum((1, 2))


@given(
    num_tokens=st.integers(1, 8),
    data=st.data(),
    window=st.none() | st.integers(1, 10),
    causal=st.booleans(),
)
@settings(deadline=None)
def test_kept_pairs_are_the_mean_over_all_subsets(num_tokens, data, window, causal):
    num_kept = data.draw(st.integers(1, num_tokens))
    subsets = torch.tensor(list(itertools.combinations(range(num_tokens), num_kept)))
    attention = Attention(heads=("heads",), head_dim="head_dim", causal=causal, window=window)
    mean = among(allowed(num_tokens, window, causal), subsets).double().mean().item()
    pairs = kept_pairs(attention, num_tokens, num_kept)
    assert isinstance(pairs, int)
    assert abs(pairs - mean) <= (1e-9 if window is None else 0.5 + 1e-9)
    assert kept_pairs(attention, num_tokens, num_kept, "full") == num_kept**2
    assert kept_pairs(attention, num_tokens, num_tokens) == attention_pairs(attention, num_tokens)


@pytest.mark.parametrize("causal", [True, False])
def test_kept_pairs_in_a_sliding_window_are_the_mean_over_draws(causal):
    num_tokens, num_kept, window = 96, 30, 16
    pairs = among(
        allowed(num_tokens, window, causal),
        sample_tokens(4_000, num_tokens, num_kept, generator=generator(0)),
    ).double()
    attention = Attention(heads=("heads",), head_dim="head_dim", causal=causal, window=window)
    expected = kept_pairs(attention, num_tokens, num_kept)
    assert abs(pairs.mean() - expected) < 5 * pairs.std() / 4_000**0.5 + 0.5
    # Not those of a window over the kept tokens.
    assert abs(attention_pairs(attention, num_kept) - expected) > 50


def test_of_windows_whole_ones_are_kept():
    attention = Attention(heads=("heads",), head_dim="head_dim", causal=False, tile=9)
    for counted in ("exact", "full"):
        assert kept_pairs(attention, 36, 18, counted) == 2 * 81
