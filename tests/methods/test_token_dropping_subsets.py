"""Subsets are uniform and a function of their keys; taking them out and putting them back changes nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from lit_accel.draws import generator
from lit_accel.methods.token_dropping.dropper import TokenDropper
from lit_accel.methods.token_dropping.schedule import TokenSchedule
from lit_accel.methods.token_dropping.subsets import put, sample_tokens, take
from lit_accel.routing import Order, hidden_states_of, routing_of
from tests.models import make_model, tokens


@st.composite
def draws(draw):
    """Numbers of sequences, tokens, kept tokens and prefix tokens, and a seed."""
    num_tokens = draw(st.integers(1, 20))
    num_kept = draw(st.integers(1, num_tokens))
    return (
        draw(st.integers(1, 4)),
        num_tokens,
        num_kept,
        draw(st.integers(0, num_kept)),
        draw(st.integers(0, 10_000)),
    )


def sample(num_sequences, num_tokens, num_kept, num_prefix=0, seed=0):
    return sample_tokens(num_sequences, num_tokens, num_kept, generator=generator(seed), num_prefix=num_prefix)


def gathered(x_btd, kept_bk):
    return x_btd.gather(1, kept_bk.unsqueeze(2).expand(-1, -1, x_btd.shape[2]))


def replaced(x_btd, y_bkd, kept_bk):
    """The reference, by plain autograd."""
    return x_btd.scatter(1, kept_bk.unsqueeze(2).expand_as(y_bkd), y_bkd)


def on_subset(block, x_btd, kept_bk):
    taken, rest = take(x_btd, kept_bk)
    return put(rest, block(taken), kept_bk)


def is_dropped(kept_bk, num_tokens):
    return torch.ones(len(kept_bk), num_tokens, dtype=torch.bool).scatter(1, kept_bk, value=False)


# Which tokens


@given(draws())
def test_indices_are_sorted_unique_in_range_and_begin_with_the_prefix(case):
    num_sequences, num_tokens, num_kept, num_prefix, _ = case
    kept_bk = sample(*case)
    assert kept_bk.dtype == torch.int64
    assert kept_bk.shape == (num_sequences, num_kept)
    assert (kept_bk.diff(dim=1) > 0).all()
    assert kept_bk.min() >= 0 and kept_bk.max() < num_tokens
    assert torch.equal(kept_bk[:, :num_prefix], torch.arange(num_prefix).expand(num_sequences, -1))


@pytest.mark.parametrize("tie", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_prefix", [0, 3])
def test_a_tie_makes_no_duplicate(monkeypatch, tie, num_prefix):
    monkeypatch.setattr(torch, "rand", lambda *size, generator, **options: torch.full(size, tie, **options))
    kept_bk = sample(4, 300, 17, num_prefix)
    assert (kept_bk.diff(dim=1) > 0).all()
    assert torch.equal(kept_bk[0, :num_prefix], torch.arange(num_prefix))


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_every_token_and_every_pair_is_as_likely_as_any_other(num_prefix):
    num_draws, num_tokens, num_kept = 20_000, 9, 5
    free, drawn = num_tokens - num_prefix, num_kept - num_prefix
    is_kept = ~is_dropped(sample(num_draws, num_tokens, num_kept, num_prefix, seed=1), num_tokens)
    chosen = is_kept[:, num_prefix:].double()
    together = chosen.T @ chosen
    one, two = drawn / free, drawn * (drawn - 1) / (free * (free - 1))
    expected = torch.full((free, free), two).fill_diagonal_(one)
    sigma = (num_draws * expected * (1 - expected)).sqrt()
    assert ((together - num_draws * expected).abs() < 5 * sigma).all()
    assert is_kept[:, :num_prefix].all()


def test_so_is_every_place_of_a_long_sequence():
    """In sixteen bits the greatest numbers of a thousand tie, and the first or the last of them would win."""
    num_draws, num_tokens = 4_000, 1_000
    drawn = sample(num_draws, num_tokens, 1, seed=2).double()
    sigma = num_tokens / (12 * num_draws) ** 0.5
    assert abs(drawn.mean() - (num_tokens - 1) / 2) < 5 * sigma


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_draw_does_not_depend_on_the_default_dtype(dtype):
    """Lightning sets it during a training step in 16-true and bf16-true."""
    expected = sample_tokens(4, 4096, 1024, generator=generator(0))
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        drawn = sample_tokens(4, 4096, 1024, generator=generator(0))
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(drawn, expected)


def test_a_draw_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    sample(4, 20, 7)
    assert torch.equal(torch.get_rng_state(), state)


# Out and back


@given(draws())
def test_dropped_rows_are_the_input_and_kept_rows_the_block_of_what_was_gathered(case):
    num_tokens, kept_bk = case[1], sample(*case)
    x = torch.randn(case[0], num_tokens, 3)
    linear = torch.nn.Linear(3, 3)
    y = on_subset(linear, x, kept_bk)
    dropped = is_dropped(kept_bk, num_tokens)
    assert torch.equal(y[dropped], x[dropped])
    assert torch.equal(gathered(y, kept_bk), linear(gathered(x, kept_bk)))


@given(draws())
def test_the_gradient_of_dropped_rows_is_what_came_from_above(case):
    num_tokens, kept_bk = case[1], sample(*case)
    x = torch.randn(case[0], num_tokens, 3, requires_grad=True)
    upstream = torch.randn(case[0], num_tokens, 3)
    on_subset(torch.tanh, x, kept_bk).backward(upstream)
    dropped = is_dropped(kept_bk, num_tokens)
    assert torch.equal(x.grad[dropped], upstream[dropped])
    part = gathered(x.detach(), kept_bk).requires_grad_()
    part.tanh().backward(gathered(upstream, kept_bk))
    assert torch.equal(gathered(x.grad, kept_bk), part.grad)


@given(draws())
def test_with_an_identity_between_them_they_are_one_bitwise(case):
    kept_bk = sample(*case)
    x = torch.randn(*case[:2], 3, requires_grad=True)
    upstream = torch.randn_like(x)
    y = on_subset(lambda taken: taken, x, kept_bk)
    y.backward(upstream)
    assert torch.equal(y, x)
    assert torch.equal(x.grad, upstream)


@given(draws())
@settings(max_examples=10, deadline=None)
def test_first_and_second_derivatives(case):
    kept_bk = sample(*case)
    x = torch.randn(*case[:2], 2, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(x_btd, scale_d):
        return on_subset(lambda taken: (taken * scale_d).sin(), x_btd, kept_bk).square()

    assert gradcheck(function, (x, scale))
    assert gradgradcheck(function, (x, scale))


def test_what_else_uses_the_input_gets_its_gradient():
    kept_bk, again_bk = sample(3, 10, 4, seed=1), sample(3, 10, 6, seed=2)
    x = torch.randn(3, 10, 5, dtype=torch.float64, requires_grad=True)

    def gradient(function):
        y = function(torch.sin, x, kept_bk) * x.cos()
        total = (y + function(torch.tanh, x, again_bk) + x).square().sum() + x[:, 3].sum()
        return torch.autograd.grad(total, x)[0]

    reference = gradient(lambda block, x_btd, kept: replaced(x_btd, block(gathered(x_btd, kept)), kept))
    torch.testing.assert_close(gradient(on_subset), reference)


def test_what_is_taken_and_never_put_back_gets_its_gradient():
    kept_bk = sample(3, 10, 4)
    x = torch.randn(3, 10, 5, requires_grad=True)
    taken, _ = take(x, kept_bk)
    taken.square().sum().backward()
    reference = torch.autograd.grad(gathered(x, kept_bk).square().sum(), x)[0]
    assert torch.equal(x.grad, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_hidden_states_is_saved(dtype):
    kept_bk = sample(4, 32, 8)
    x = torch.randn(4, 32, 64, requires_grad=True)
    sizes = []
    with saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda saved: saved):
        y = on_subset(lambda taken: taken.to(dtype), x, kept_bk)
    y.sum().backward()
    assert sizes and max(sizes) <= kept_bk.numel()


@pytest.mark.parametrize(
    ("of_input", "of_block"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_two_precisions_meet_in_the_wider_one(of_input, of_block):
    kept_bk = sample(3, 10, 4)
    x = torch.randn(3, 10, 5).to(of_input).requires_grad_()
    y = on_subset(lambda taken: taken.to(of_block).sin(), x, kept_bk)
    wider = torch.promote_types(of_input, of_block)
    dropped = is_dropped(kept_bk, 10)
    assert y.dtype == wider
    assert torch.equal(y[dropped], x.detach().to(wider)[dropped])
    assert torch.equal(gathered(y, kept_bk), gathered(x, kept_bk).to(of_block).sin().to(wider))
    upstream = torch.randn(3, 10, 5).to(wider)
    y.backward(upstream)
    assert x.grad.dtype == of_input
    assert torch.equal(x.grad[dropped], upstream.to(of_input)[dropped])


# The draws of a model


NUM_LAYERS = 6


def gpt2():
    return make_model("gpt2-base", dtype=torch.float32, heads=1, head_dim=4, ffn=4, blocks=NUM_LAYERS).train()


def visited(dropper, model, x, keys):
    """Which tokens each block changed; shape (layers, batch, tokens)."""
    changed = {}

    def watch(call, run):
        output = run(call)
        changed[call.index] = (hidden_states_of(output) != call.hidden_states).any(2)
        return output

    dropper.set(0, keys)
    dropper.is_active = True
    dropper.routing.add(watch, Order.PROBE)
    # Without gradients nothing would be dropped.
    model(input_ids=x)
    dropper.routing.remove(watch)
    return torch.stack([changed[index] for index in range(NUM_LAYERS)])


def dropper_of(model, scope="layer", seed=0):
    return TokenDropper(routing_of(model), range(NUM_LAYERS), TokenSchedule(5, 10, 1), scope=scope, seed=seed)


@pytest.mark.parametrize("scope", ["layer", "route"])
def test_visits_of_a_token_are_binomial_by_layer_and_all_or_none_by_route(scope):
    model = gpt2()
    dropper, x = dropper_of(model, scope), tokens(model, batch=1024, length=8)
    visits = torch.cat([visited(dropper, model, x, (step,)).sum(0) for step in range(4)])
    share, num_draws = 5 / 8, len(visits)
    for number in range(NUM_LAYERS + 1):
        if scope == "layer":
            expected = math.comb(NUM_LAYERS, number) * share**number * (1 - share) ** (NUM_LAYERS - number)
        else:
            expected = {0: 1 - share, NUM_LAYERS: share}.get(number, 0.0)
        sigma = math.sqrt(num_draws * expected * (1 - expected))
        # One place at a time: the tokens of a sequence are not independent of each other.
        counts = (visits == number).sum(0)
        assert ((counts - num_draws * expected).abs() <= 5 * sigma).all()


def test_the_same_keys_give_the_same_sets_and_others_unrelated_ones():
    model = gpt2()
    x = tokens(model, batch=64, length=8)
    dropper = dropper_of(model)
    first = visited(dropper, model, x, (3, 1))
    visited(dropper, model, x, (4, 1))
    assert torch.equal(visited(dropper, model, x, (3, 1)), first)
    assert (first.sum(2) == 5).all()
    batch, rank = (visited(dropper, model, x, keys) for keys in ((4, 1), (3, 2)))
    dropper.close()
    seed = visited(dropper_of(model, seed=1), model, x, (3, 1))
    # By layers, by sequences, by batches, by ranks and by seeds: two independent sets of 5 in 8 share 25/8 tokens.
    others = [(first, first.roll(1, 0)), (first, first.roll(1, 1)), (first, batch), (first, rank), (first, seed)]
    for mine, theirs in others:
        num_shared = (mine & theirs).sum(2).double()
        sigma = math.sqrt(25 / 8 * 3 / 8 * 3 / 7 / num_shared.numel())
        assert abs(num_shared.mean() - 25 / 8) < 5 * sigma
