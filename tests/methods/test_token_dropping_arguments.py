"""What a block is called with besides hidden states is restricted to the same tokens, or refused by its name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from lit_accel.draws import generator
from lit_accel.methods.token_dropping.arguments import UnroutableArgumentError, restrict
from lit_accel.methods.token_dropping.dropper import TokenDropper
from lit_accel.methods.token_dropping.schedule import TokenSchedule
from lit_accel.methods.token_dropping.subsets import sample_tokens
from lit_accel.routing import BlockCall, routing_of
from tests.methods.dropping import assert_gradients_equal
from tests.models import make_model, tokens

B, H, T, K, D = 3, 3, 11, 5, 4
KEPT = sample_tokens(B, T, K, generator=generator(0))
HIDDEN = torch.randn(B, K, D)


@pytest.fixture(scope="module")
def llama():
    return routing_of(make_model("llama-gqa", heads=4, head_dim=4, ffn=8, blocks=1))


@pytest.fixture(scope="module")
def vit():
    return routing_of(make_model("vit", heads=4, head_dim=4, ffn=8, blocks=1))


def restricted(routing, *args, kept=KEPT, num_tokens=T, block=None, **kwargs):
    (module,), name = routing.modules, next(iter(routing.blocks[0].token_dims))
    full = torch.randn(len(kept), num_tokens, D)
    call = BlockCall(0, module, name, (full, *args), kwargs)
    return restrict(call, block or routing.blocks[0], HIDDEN, kept, num_tokens)


def of_each(value, *dims, kept=KEPT):
    """The reference, one sequence at a time; ``value`` has a batch dimension."""
    parts = []
    for part, index in zip(value.expand(len(kept), *value.shape[1:]), kept, strict=True):
        for dim in dims:
            part = part.index_select(dim, index)
        parts.append(part)
    return torch.stack(parts)


def mask_of(shape, dtype):
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return drawn < 0.5 if dtype == torch.bool else drawn.to(dtype)


# Forms of masks


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [*((b, h, q, T) for b in (1, B) for h in (1, H) for q in (1, T)), (B, 1, T, 1)],
)
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_mask_means_for_the_kept_tokens_what_it_meant_for_all(name, shape, dtype, request):
    """Broadcast as attention does it, over (batch, heads, queries, keys). There are as many heads as sequences."""
    routing = request.getfixturevalue(name)
    keyword = "attention_mask" if name == "llama" else "attn_mask"
    mask = mask_of(shape, dtype)
    part = restricted(routing, **{keyword: mask}).kwargs[keyword]
    assert part.dtype == dtype
    assert torch.equal(part.broadcast_to(B, H, K, K), of_each(mask.broadcast_to(B, H, T, T), -1, -2))
    assert part.numel() <= B * H * K * K


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_pairs_may_have_two_dimensions_with_timm(vit, dtype):
    mask = mask_of((T, T), dtype)
    part = restricted(vit, attn_mask=mask).kwargs["attn_mask"]
    assert part.dtype == dtype
    assert torch.equal(part.broadcast_to(B, H, K, K), of_each(mask.broadcast_to(B, H, T, T), -1, -2))


@pytest.mark.parametrize("shape", [(1, T, T), (H, T, T)])
def test_a_mask_of_heads_is_not_taken_for_one_of_sequences(vit, shape):
    mask = mask_of(shape, torch.bool)
    try:
        part = restricted(vit, attn_mask=mask).kwargs["attn_mask"]
    except UnroutableArgumentError:
        return
    assert torch.equal(part.broadcast_to(B, H, K, K), of_each(mask.broadcast_to(B, H, T, T), -1, -2))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("num_sequences", [1, B, T])
def test_a_mask_of_tokens_stays_one(llama, dtype, num_sequences):
    """Also of as many sequences as tokens, where another one of two dimensions would look the same."""
    kept = sample_tokens(num_sequences, T, K, generator=generator(0))
    for rows in {1, num_sequences}:
        mask = mask_of((rows, T), dtype)
        part = restricted(llama, attention_mask=mask, kept=kept).kwargs["attention_mask"]
        assert torch.equal(part, mask.expand(num_sequences, T).gather(1, kept))


def test_what_is_not_given_stays_so(llama):
    call = restricted(llama, None, attention_mask=None, position_ids=None, use_cache=False)
    assert call.args[1] is None
    assert call.kwargs == {"attention_mask": None, "position_ids": None, "use_cache": False}


@pytest.mark.parametrize("batch", [1, B])
def test_rotary_tables_go_with_their_tokens(llama, batch):
    tables = (torch.randn(batch, T, D), torch.randn(batch, T, D))
    parts = restricted(llama, position_embeddings=tables).kwargs["position_embeddings"]
    assert isinstance(parts, tuple)
    for part, table in zip(parts, tables, strict=True):
        assert torch.equal(part, of_each(table, 0))


def test_positional_arguments_are_known_by_their_place(llama):
    mask, numbers = mask_of((1, 1, T, T), torch.bool), torch.arange(T)[None]
    by_place = restricted(llama, mask, numbers)
    by_name = restricted(llama, attention_mask=mask, position_ids=numbers)
    assert by_place.args[0] is by_name.args[0] is HIDDEN
    assert torch.equal(by_place.args[1], by_name.kwargs["attention_mask"])
    assert torch.equal(by_place.args[2], by_name.kwargs["position_ids"])


def test_hidden_states_by_keyword(llama):
    call = BlockCall(0, llama.modules[0], "hidden_states", (), {"hidden_states": torch.randn(B, T, D)})
    assert restrict(call, llama.blocks[0], HIDDEN, KEPT, T).kwargs["hidden_states"] is HIDDEN


def test_hidden_states_come_first_whatever_a_block_calls_them(llama):
    class Renamed(torch.nn.Module):
        def forward(self, x, attention_mask=None):
            return x

    mask = mask_of((1, 1, T, T), torch.bool)
    call = BlockCall(0, Renamed(), "hidden_states", (torch.randn(B, T, D), mask), {})
    hidden, part = restrict(call, llama.blocks[0], HIDDEN, KEPT, T).args
    assert hidden is HIDDEN
    assert torch.equal(part, of_each(mask, -1, -2))


# Numbers of tokens


@st.composite
def packed(draw):
    """Lengths of the documents of each row, all rows being equally long, and how many tokens are kept."""
    rows = draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=3))
    longest = max(map(sum, rows))
    for row in rows:
        if longest > sum(row):
            row.append(longest - sum(row))
    return rows, draw(st.integers(1, longest)), draw(st.integers(0, 1000))


@given(packed())
@settings(deadline=None)
def test_numbers_begin_anew_where_a_document_does(llama, case):
    rows, num_kept, seed = case
    first = seed % 3
    numbers = torch.stack([torch.cat([torch.arange(length) + first for length in row]) for row in rows])
    document = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
    kept = sample_tokens(len(rows), numbers.shape[1], num_kept, generator=generator(seed))
    call = restricted(llama, position_ids=numbers, kept=kept, num_tokens=numbers.shape[1])
    kept_of_each = zip(rows, document.gather(1, kept), strict=True)
    lengths = [length for row, part in kept_of_each for length in part.bincount(minlength=len(row)).tolist() if length]
    part = call.kwargs["position_ids"]
    assert part.shape == kept.shape
    assert part.dtype == numbers.dtype
    assert torch.equal(part.flatten(), torch.cat([torch.arange(length) for length in lengths]))
    # What FlashAttention is told of it.
    (boundaries, _), (longest, _) = prepare_fa_kwargs_from_position_ids(part)
    assert boundaries.diff().tolist() == lengths
    assert longest == max(lengths)


def test_numbers_shared_by_the_batch_and_places_in_a_cache(llama):
    call = restricted(llama, position_ids=torch.arange(T)[None], cache_position=torch.arange(T))
    assert torch.equal(call.kwargs["position_ids"], torch.arange(K).expand(B, K))
    assert torch.equal(call.kwargs["cache_position"], torch.arange(K))


# Boundaries of packed sequences


def packed_in_one(lengths, **longest):
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, **longest}


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data(), st.integers(0, 1000))
@settings(deadline=None)
def test_boundaries_are_those_of_the_kept_tokens_of_each_document(llama, lengths, data, seed):
    num_tokens = sum(lengths)
    kept = sample_tokens(1, num_tokens, data.draw(st.integers(1, num_tokens)), generator=generator(seed))
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    expected = document[kept[0]].bincount(minlength=len(lengths))
    given = packed_in_one(lengths, max_length_q=max(lengths), max_length_k=torch.tensor(max(lengths)))
    parts = restricted(llama, **given, kept=kept, num_tokens=num_tokens).kwargs
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert parts[name].dtype == torch.int32
        assert parts[name][0] == 0
        assert torch.equal(parts[name].diff(), expected.int())
    assert type(parts["max_length_q"]) is int
    assert parts["max_length_q"] == parts["max_length_k"] == expected.max()
    assert isinstance(parts["max_length_k"], torch.Tensor)


def test_boundaries_that_are_not_given_stay_so(llama):
    values = {"cu_seq_lens_q": None, "max_length_q": None}
    assert restricted(llama, **values).kwargs == values


# Refusals


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"])
def test_boundaries_of_a_batch_that_is_not_packed_into_one_are_refused(llama, name):
    value = packed_in_one([5, 6], max_length_q=6, max_length_k=6)[name]
    with pytest.raises(UnroutableArgumentError, match=f"'{name}' .* has 3 of them.*DataCollatorWithFlattening"):
        restricted(llama, **{name: value})


def test_the_longest_of_packed_sequences_is_refused_without_their_boundaries(llama):
    with pytest.raises(UnroutableArgumentError, match="'max_length_k' is given and 'cu_seq_lens_k' is no tensor"):
        restricted(llama, max_length_k=6, kept=KEPT[:1])


@pytest.mark.parametrize(
    "value",
    [torch.randn(B, T), torch.randn(1, D, T), (torch.randn(2), [torch.randn(T)]), {"inner": torch.randn(T, 2)}],
)
def test_an_unknown_argument_with_an_entry_a_token_is_refused_by_name(llama, value):
    with pytest.raises(UnroutableArgumentError, match=r"LlamaDecoderLayer was called with 'novelty' of shape"):
        restricted(llama, novelty=value)


def test_an_unknown_argument_of_another_size_passes(llama):
    values = {"novelty": torch.randn(B, T + 1), "text": "x", "number": T}
    call = restricted(llama, **values)
    assert all(call.kwargs[name] is value for name, value in values.items())


def test_too_many_positional_arguments_are_refused_by_number(llama):
    with pytest.raises(UnroutableArgumentError, match="'argument 7'"):
        restricted(llama, *[None] * 6, torch.randn(B, T))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (SimpleNamespace(shape=(B, 1, T, T)), "is a SimpleNamespace"),
        (torch.ones(B, 1, T, T + 2), "neither one entry nor one for each"),
        (torch.ones(B, T - 1), "neither one entry nor one for each"),
        (torch.ones(T, T), "11 entries in its first dimension, and there are 3 sequences"),
        (torch.ones(B + 1, 1, T, T), "4 entries in its first dimension, and there are 3 sequences"),
    ],
)
def test_a_mask_of_another_form_is_refused(llama, mask, message):
    with pytest.raises(UnroutableArgumentError, match=f"'attention_mask' .*{message}"):
        restricted(llama, attention_mask=mask)


def test_a_mask_of_as_many_sequences_as_tokens_is_refused_unless_it_has_four_dimensions(vit):
    kept = sample_tokens(T, T, K, generator=generator(0))
    with pytest.raises(UnroutableArgumentError, match="as many sequences as tokens"):
        restricted(vit, attn_mask=torch.ones(T, T), kept=kept)
    mask = mask_of((T, 1, T, T), torch.bool)
    part = restricted(vit, attn_mask=mask, kept=kept).kwargs["attn_mask"]
    assert torch.equal(part, of_each(mask, -1, -2, kept=kept))


def test_a_sliding_window_needs_a_mask_of_pairs(llama):
    def windowed(window):
        block = llama.blocks[0]
        return replace(block, attention=replace(block.attention, window=window))

    for missing in ({}, {"attention_mask": None}, {"attention_mask": torch.ones(B, T)}):
        with pytest.raises(UnroutableArgumentError, match="sees 4 of 11 tokens back"):
            restricted(llama, block=windowed(4), **missing)
    mask = mask_of((1, 1, T, T), torch.bool)
    by_name = restricted(llama, block=windowed(4), attention_mask=mask).kwargs["attention_mask"]
    assert torch.equal(by_name, of_each(mask, -1, -2))
    assert torch.equal(restricted(llama, mask, block=windowed(4)).args[1], by_name)
    assert restricted(llama, block=windowed(T), attention_mask=None).kwargs["attention_mask"] is None


# Whole models

SMALL = {"heads": 4, "head_dim": 4, "ffn": 16, "blocks": 4}
DECODERS = ["gpt2-tied", "llama-gqa", "mistral", "qwen2-tied", "qwen3"]


def dropping(model, seed=0):
    dropper = TokenDropper(routing_of(model), (1, 2), TokenSchedule(0.6, 10, 1), seed=seed)
    dropper.is_active = True
    dropper.set(0, (0,))
    return dropper


def in_training(name, **size):
    model = make_model(name, **{**SMALL, **size}).train()
    dropping(model)
    return model


@pytest.mark.parametrize("name", [*DECODERS, "bert-mlm", "roberta-mlm"])
def test_the_fused_kernel_without_a_mask_computes_what_explicit_masks_say(name):
    results = []
    for implementation in ("sdpa", "eager"):
        model = in_training(name)
        model.set_attn_implementation(implementation)
        logits = model(input_ids=tokens(model)).logits
        logits.logsumexp(-1).mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_gradients_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "qwen3", "bert-mlm", "vit", "deit-distilled"])
def test_the_kernel_is_the_fused_one(name, monkeypatch):
    model = in_training(name)
    attention, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watch(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        seen.append((query.shape[2], key.shape[2], attn_mask is None, is_causal))
        return attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    x = tokens(model)
    model(input_ids=x) if hasattr(model, "config") else model(x)
    block = routing_of(model).blocks[0]
    full = seen[0][0]
    kept = round(0.6 * full)
    assert kept < full
    assert seen == [(length, length, True, block.attention.causal) for length in (full, kept, kept, full)]


@pytest.mark.parametrize("name", DECODERS)
def test_documents_of_a_packed_sequence_do_not_see_each_other(name):
    model = in_training(name)
    x = tokens(model)
    numbers = torch.cat([torch.arange(4), torch.arange(7)]).expand(2, -1)
    document = (torch.arange(11) >= 4).long()
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    if name == "mistral":
        causal = causal.triu(-3)
    mask = (causal & (document[:, None] == document[None]))[None, None]

    def logits(x, **kwargs):
        return model(input_ids=x, position_ids=numbers, **kwargs).logits

    given = logits(x, attention_mask=mask)
    # Without a mask Hugging Face finds the documents in their positions.
    torch.testing.assert_close(logits(x), given)
    assert not torch.allclose(logits(x, attention_mask=causal[None, None]), given)
    other = x.clone()
    other[:, :4] = other[:, :4] % 50 + 3
    changed = logits(other, attention_mask=mask)
    assert torch.equal(changed[:, 4:], given[:, 4:])
    assert not torch.equal(changed[:, :4], given[:, :4])


@pytest.fixture
def by_token_mask():
    """An attention that is given which tokens there are, as flash kernels are; and the masks that it got."""
    name, seen = "by_token_mask", []

    def attend(module, query, key, value, mask, scaling=None, **kwargs):
        seen.append(mask)
        pairs = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        pairs = pairs.tril() if module.is_causal else pairs
        # A query that sees nothing would get no number.
        pairs = pairs if mask is None else pairs & mask[:, None, None].bool() | torch.eye(len(pairs), dtype=torch.bool)
        attention = torch.nn.functional.scaled_dot_product_attention
        out = attention(query, key, value, attn_mask=pairs, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, flash_attention_mask)
    yield name, seen
    AttentionInterface._global_mapping.pop(name)
    AttentionMaskInterface._global_mapping.pop(name)


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "qwen3", "bert-mlm", "roberta-mlm"])
@pytest.mark.parametrize("num_sequences", [2, 11])
def test_a_kernel_that_is_given_a_mask_of_tokens_computes_what_masks_of_pairs_say(name, num_sequences, by_token_mask):
    mask = torch.ones(num_sequences, 11, dtype=torch.long)
    mask[0, -4:] = mask[1, :2] = 0
    results = []
    for implementation in (by_token_mask[0], "sdpa"):
        model = in_training(name)
        model.set_attn_implementation(implementation)
        logits = model(input_ids=tokens(model, num_sequences), attention_mask=mask).logits[mask == 1]
        logits.logsumexp(-1).mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_gradients_equal(results[0][1], results[1][1])
    assert [part.shape for part in by_token_mask[1]] == [(num_sequences, length) for length in (11, 7, 7, 11)]


@pytest.fixture
def by_boundaries():
    """An attention that goes by boundaries alone, as the kernels for packed sequences do; and what it was told."""
    name, seen = "by_boundaries", []

    def attend(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs):
        seen.append((query.shape[2], cu_seq_lens_q, max_length_q, mask is None))
        sizes = cu_seq_lens_q.diff().tolist()
        parts = zip(*(states.split(sizes, 2) for states in (query, key, value)), strict=True)
        attention = torch.nn.functional.scaled_dot_product_attention
        attended = [attention(*part, is_causal=True, scale=scaling, enable_gqa=True) for part in parts]
        return torch.cat(attended, 2).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    yield name, seen
    AttentionInterface._global_mapping.pop(name)
    AttentionMaskInterface._global_mapping.pop(name)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-tied", "qwen3"])
def test_a_kernel_that_goes_by_boundaries_computes_what_masks_say(name, by_boundaries):
    """A batch of Hugging Face's collator: lists of numbers, packed into one row."""
    lengths = (4, 1, 6, 9)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": list(range(3, 3 + length))} for length in lengths])
    batch.pop("labels")
    results = []
    for implementation in (by_boundaries[0], "sdpa"):
        model = in_training(name)
        model.set_attn_implementation(implementation)
        # Without boundaries, masks are made of the positions.
        given = {name: batch[name] for name in ("input_ids", "position_ids")} if implementation == "sdpa" else batch
        logits = model(**given, use_cache=False).logits
        logits.logsumexp(-1).mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_gradients_equal(results[0][1], results[1][1])
    num_tokens, num_kept = sum(lengths), round(0.6 * sum(lengths))
    assert [num for num, *_ in by_boundaries[1]] == [num_tokens, num_kept, num_kept, num_tokens]
    for num, boundaries, longest, is_alone in by_boundaries[1]:
        assert is_alone
        assert (boundaries[0], boundaries[-1]) == (0, num)
        assert longest == boundaries.diff().max()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert-mlm", "roberta-mlm", "gpt2-tied", "llama-gqa", "mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_in_the_padding_does_not_matter(name, side, implementation):
    # Eager attention in double precision has no number for what a padded query sees.
    model = in_training(name, dtype=torch.float32)
    model.set_attn_implementation(implementation)
    x, mask = tokens(model), torch.ones(2, 11, dtype=torch.long)
    mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    other = torch.where(mask == 1, x, x % 50 + 3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    first, second = (model(input_ids=ids, attention_mask=mask, position_ids=positions).logits for ids in (x, other))
    assert torch.equal(first[mask == 1], second[mask == 1])
    assert not torch.equal(first[mask == 0], second[mask == 0])
    assert first.isfinite().all()


@pytest.mark.parametrize(("name", "first"), [("bert-mlm", 0), ("roberta-mlm", 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_encoder_may_be_given_the_positions_that_it_would_give_itself(name, first, batch):
    # Not twice the same model: it would draw other tokens to drop.
    told, alone = in_training(name), in_training(name)
    x = tokens(alone)
    numbers = torch.arange(first, first + 11).expand(batch, -1)
    assert torch.equal(told(input_ids=x, position_ids=numbers).logits, alone(input_ids=x).logits)
    assert not torch.equal(told(input_ids=x, position_ids=numbers.flip(1)).logits, alone(input_ids=x).logits)


@pytest.mark.parametrize("name", DECODERS)
def test_a_token_has_no_influence_on_earlier_ones(name):
    model = in_training(name)
    x = tokens(model)
    expected = model(input_ids=x).logits
    for position in (1, 5, 10):
        other = x.clone()
        other[:, position] = other[:, position] % 50 + 3
        changed = model(input_ids=other).logits
        assert torch.equal(changed[:, :position], expected[:, :position])
        assert not torch.equal(changed[:, position], expected[:, position])
