"""The closed form against torch's own counter, against brute force, and against a count by hand."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from lit_accel.anatomy import Attention, anatomy_of
from lit_accel.compute import forward_flops, training_flops
from lit_accel.compute.flops import attention_pairs
from tests.models import ZOO, make_config

NUM_SEQUENCES, NUM_TOKENS = 3, 128


def meta_model(name, implementation="sdpa"):
    config = make_config(name, heads=12, head_dim=64, ffn=3072, blocks=2, vocab=8003)
    setattr(config, "n_positions" if "gpt2" in name else "max_position_embeddings", 256)
    with torch.device("meta"):
        model = getattr(transformers, ZOO[name][0])._from_config(config, attn_implementation=implementation)
    # This warning reads token values, which the meta device does not have.
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *args: None
    return model.train()


def counted_by_torch(model, with_mask=False):
    ids = torch.zeros(NUM_SEQUENCES, NUM_TOKENS, dtype=torch.long, device="meta")
    mask = torch.ones_like(ids) if with_mask else None
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        outputs = model(input_ids=ids, attention_mask=mask)
        forward = counter.get_total_flops()
        floats = [v for v in outputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        sum(value.sum() for value in floats).backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_agrees_with_the_counter_of_torch(name, implementation):
    model = meta_model(name, implementation)
    anatomy = anatomy_of(model)
    forward, training = counted_by_torch(model)
    closed_forward = forward_flops(anatomy, NUM_SEQUENCES, NUM_TOKENS, attention="full").total
    closed_training = training_flops(anatomy, NUM_SEQUENCES, NUM_TOKENS, attention="full").total
    assert closed_forward == pytest.approx(forward, rel=0.01)
    assert closed_training == pytest.approx(training, rel=0.01)


@pytest.mark.parametrize("name", ["gpt2-tied", "bert-mlm", "llama-gqa"])
def test_activation_checkpointing_agrees_with_the_counter_of_torch(name):
    model = meta_model(name, "eager")
    # The state of the random number generators is one more thing that the meta device does not have.
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    closed = training_flops(
        anatomy_of(model), NUM_SEQUENCES, NUM_TOKENS, attention="full", activation_checkpointing=True
    )
    # Without a mask and a cache, causal models look for packed sequences, in values.
    with set_checkpoint_early_stop(False):
        counted = counted_by_torch(model, with_mask="bert" not in name)[1]
    assert closed.total == pytest.approx(counted, rel=0.01)


def test_gpt2_small_by_hand():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    tokens, embed, blocks, vocab = 1024, 768, 12, 50257
    # Queries, keys, values and output; the MLP up and down: 12 embed² a block, 2 FLOPs a weight and token.
    matrices = 2 * tokens * (4 * embed**2 + 8 * embed**2)
    # Scores and values over all heads, for tokens (tokens + 1) / 2 pairs.
    attention = 2 * 2 * embed * (tokens * (tokens + 1) // 2)
    head = 2 * tokens * embed * vocab

    flops = forward_flops(anatomy_of(model), num_sequences=1, num_tokens=tokens)

    assert flops.blocks == (matrices + attention,) * blocks
    assert flops.outside_blocks == head
    assert flops.total == blocks * (matrices + attention) + head == 272_339_828_736
    trained = training_flops(anatomy_of(model), 8, tokens, activation_checkpointing=True)
    assert trained.total == 8 * (4 * blocks * (matrices + attention) + 3 * head)


@given(tokens=st.integers(1, 40), window=st.none() | st.integers(1, 50), causal=st.booleans())
def test_pairs_are_those_that_the_mask_allows(tokens, window, causal):
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    allowed = key <= query if causal else torch.ones(tokens, tokens, dtype=torch.bool)
    if window is not None:
        allowed &= (query - key).abs() < window
    attention = Attention(heads=("heads",), head_dim="head_dim", causal=causal, window=window)
    assert attention_pairs(attention, tokens) == allowed.sum()
    assert attention_pairs(attention, tokens, "full") == tokens**2


def test_the_window_is_the_one_that_the_model_masks_with():
    """Mistral's own mask, read off what a token's output depends on."""
    config = make_config("mistral", heads=4, head_dim=4, ffn=32, blocks=1)
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        weights = model(input_ids=torch.arange(3, 14)[None], output_attentions=True).attentions[0]
    num_attended = (weights[0, 0] > 0).sum()
    assert attention_pairs(anatomy_of(model).blocks[0].attention, 11) == num_attended


# Entries of the matrices outside of the blocks, of 768 features, 8003 tokens and 3 classes: of those that are applied
# to each token, and of those that are applied once a sequence.
OUTSIDE = {
    "gpt2-base": (0, 0),
    "gpt2-classifier": (768 * 3, 0),
    "llama-classifier": (768 * 3, 0),
    # The pooler.
    "bert-base": (0, 768 * 768),
    "bert-classifier": (0, 768 * 768 + 768 * 3),
    # What comes before the projection to the vocabulary; whether two sentences belong together, yes or no.
    "bert-mlm": (768 * 768 + 768 * 8003, 0),
    "bert-pretraining": (768 * 768 + 768 * 8003, 768 * 768 + 768 * 2),
    "roberta-mlm": (768 * 768 + 768 * 8003, 0),
    "roberta-classifier": (0, 768 * 768 + 768 * 3),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_heads_and_poolers_by_hand(name):
    """Beside the blocks most of them are less than the tolerance above."""
    anatomy = anatomy_of(meta_model(name))
    of_tokens, of_sequences = OUTSIDE[name]
    for num_tokens in (8, 64):
        expected = 2 * (2 * num_tokens * of_tokens + 2 * of_sequences)
        assert forward_flops(anatomy, 2, num_tokens).outside_blocks == expected
        assert training_flops(anatomy, 2, num_tokens).outside_blocks == 3 * expected


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "qwen3"])
def test_counts_follow_a_size_that_was_never_built(name):
    """A planner asks for the cost of sizes that exist only as anatomies."""
    model = meta_model(name)
    anatomy = anatomy_of(model)
    size = anatomy.reduced(width=2, depth=2)
    with torch.device("meta"):
        built = anatomy_of(anatomy.build(model, size))
    assert forward_flops(anatomy.at(size), 2, 16) == forward_flops(built, 2, 16)
