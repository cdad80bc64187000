"""Each pattern is attention under its mask, whatever formulation computes it, by itself and inside of a model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lit_accel.anatomy import anatomy_of
from lit_accel.anatomy.hugging_face_attention import attend_with
from lit_accel.draws import generator
from lit_accel.methods.mixed_sparsity import AttentionPattern
from lit_accel.methods.mixed_sparsity.attention import PATTERNS
from lit_accel.methods.mixed_sparsity.flex import _block_mask, flex
from tests.models import make_config, make_model, relative_error, tokens

# What each query i sees of the keys j <= i, by the definition of Sparse Transformers.
RULES = {
    "window": lambda i, j, w: i - j < w,
    "strided": lambda i, j, w: (i - j) % w == 0,
    "union": lambda i, j, w: i - j < w or (i - j) % w == 0,
    "fixed": lambda i, j, w: i // w == j // w or j % w == w - 1,
}
KINDS = pytest.mark.parametrize("kind", PATTERNS)


def allowed(kind, window, num_keys, num_queries=None):
    """The reference: which of the keys the last queries see."""
    first = 0 if num_queries is None else num_keys - num_queries
    rule = RULES[kind]
    rows = [[j <= i and rule(i, j, window) for j in range(num_keys)] for i in range(first, num_keys)]
    return torch.tensor(rows, dtype=torch.bool)


def qkv(num_tokens, *, batch=2, heads=2, kv_heads=None, head_dim=4, num_queries=None, seed=0, dtype=torch.float32):
    random = generator(seed)
    return [
        torch.randn(batch, number, length, head_dim, generator=random).to(dtype).requires_grad_()
        for number, length in ((heads, num_queries or num_tokens), *[(kv_heads or heads, num_tokens)] * 2)
    ]


def reference(query, key, value, mask, scale=None):
    """Attention from its definition, in double precision."""
    query, key, value = (x.double() for x in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    key, value = (x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (key, value))
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale) + bias
    return scores.softmax(3) @ value


def assert_same(inputs, actual, expected, tolerance=1e-5):
    """Compare outputs and gradients."""
    upstream = torch.randn(actual.shape, generator=generator(9))
    gradients = [torch.autograd.grad(y, inputs, upstream.to(y.dtype)) for y in (actual, expected)]
    for one, other in zip((actual, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < tolerance * max(1, other.abs().max())


CASES = {"kind": st.sampled_from(PATTERNS), "window": st.integers(1, 12), "num_tokens": st.integers(1, 40)}


# The patterns


@given(**CASES)
def test_the_mask_is_the_rule_and_pairs_are_its_sum(kind, window, num_tokens):
    pattern, expected = AttentionPattern(kind, window), allowed(kind, window, num_tokens)
    assert torch.equal(pattern.mask(num_tokens, num_tokens), expected)
    assert pattern.pairs(num_tokens) == expected.sum()


@given(**CASES, num_queries=st.integers(1, 40))
def test_the_last_keys_are_those_of_the_queries(kind, window, num_tokens, num_queries):
    num_queries = min(num_queries, num_tokens)
    mask = AttentionPattern(kind, window).mask(num_queries, num_tokens)
    assert torch.equal(mask, allowed(kind, window, num_tokens)[num_tokens - num_queries :])
    assert mask[:, -num_queries:].diagonal().all()


@pytest.mark.parametrize(
    ("kind", "pairs", "of_causal", "of_square"),
    [
        ("window", 122_944, {512: 43.7, 1024: 23.4, 2048: 12.1}, 11.7),
        ("strided", 4_608, {512: 1.0, 1024: 0.9, 2048: 0.8}, 0.4),
        ("union", 126_528, {512: 44.3, 1024: 24.1, 2048: 12.8}, 12.1),
        ("fixed", 69_632, {512: 25.7, 1024: 13.3, 2048: 7.0}, 6.6),
    ],
)
def test_pairs_with_a_window_of_128(kind, pairs, of_causal, of_square):
    pattern = AttentionPattern(kind, 128)
    assert pattern.pairs(1024) == pairs
    assert round(100 * pairs / 1024**2, 1) == of_square
    for num_tokens, share in of_causal.items():
        assert round(100 * pattern.pairs(num_tokens) / (num_tokens * (num_tokens + 1) // 2), 1) == share
        assert pattern.pairs(num_tokens) == pattern.mask(num_tokens, num_tokens).sum()


def test_every_kernel_has_a_name_of_its_own():
    patterns = [AttentionPattern(k, w, e) for k in PATTERNS for w in (1, 12, 128) for e in (False, True)]
    assert len({pattern.name for pattern in patterns}) == len(patterns)


# The kernels


@given(
    **CASES,
    kv_heads=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 1_000),
)
@settings(deadline=None)
def test_attention_under_the_mask(kind, window, num_tokens, kv_heads, scale, seed):
    """Outputs and gradients; lengths that are no multiple of the window, shorter ones, and grouped queries."""
    inputs = qkv(num_tokens, heads=4, kv_heads=kv_heads, seed=seed)
    actual = AttentionPattern(kind, window)(*inputs, None, scale=scale)
    assert_same(inputs, actual, reference(*inputs, allowed(kind, window, num_tokens), scale))


@KINDS
def test_so_does_torch_see_it(kind):
    inputs = qkv(384, heads=3, head_dim=16)
    explicit = F.scaled_dot_product_attention(*inputs, AttentionPattern(kind, 64).mask(384, 384))
    assert_same(inputs, AttentionPattern(kind, 64)(*inputs, None), explicit)


@KINDS
@pytest.mark.parametrize("window", [5, 8])
def test_double_precision(kind, window):
    inputs = qkv(29, dtype=torch.float64)
    actual = AttentionPattern(kind, window)(*inputs, None)
    assert_same(inputs, actual, reference(*inputs, allowed(kind, window, 29)), tolerance=1e-12)


@KINDS
@pytest.mark.parametrize("window", [5, 8])
def test_half_precision(kind, window):
    inputs = qkv(29, dtype=torch.bfloat16)
    actual = AttentionPattern(kind, window)(*inputs, None)
    assert actual.dtype == torch.bfloat16
    assert_same(inputs, actual, reference(*inputs, allowed(kind, window, 29)), tolerance=0.05)


@KINDS
@pytest.mark.parametrize("window", [1, 4, 6, 7])
def test_no_later_token_has_any_influence(kind, window):
    """Bit for bit; and there is no gradient from an earlier output to a later token."""
    pattern, num_tokens = AttentionPattern(kind, window), 23
    inputs = qkv(num_tokens)
    before = pattern(*inputs, None)
    for changed in (0, 5, 6, 13, 21, 22):
        for value in (3.0, -1e4):
            others = [x.detach().clone() for x in inputs]
            for other in others:
                other[:, :, changed] += value
            after = pattern(*others, None)
            assert torch.equal(after[:, :, :changed], before[:, :, :changed])
            assert (after[:, :, changed] != before[:, :, changed]).any()
        gradients = torch.autograd.grad(before[:, :, : changed + 1].sum(), inputs, retain_graph=True)
        assert not any(gradient[:, :, changed + 1 :].any() for gradient in gradients)


def padding_mask(num_tokens, num_padded, num_queries=None):
    """Causal, and blind to the first tokens of the second sequence; as models pass it on."""
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :num_padded] = False
    # A padded query has to see something.
    mask[1, 0, range(num_padded), range(num_padded)] = True
    return mask[:, :, num_tokens - (num_queries or num_tokens) :]


@KINDS
@pytest.mark.parametrize("form", ["bool", "float", "bias"])
@pytest.mark.parametrize(("window", "num_queries"), [(4, 17), (5, 17), (4, 3)])
def test_what_the_model_masks_besides(kind, form, window, num_queries):
    num_tokens = 17
    inputs = qkv(num_tokens, heads=4, kv_heads=2, num_queries=num_queries)
    mask = padding_mask(num_tokens, 3, num_queries)
    both = allowed(kind, window, num_tokens, num_queries) & mask
    bias = torch.randn(both.shape, generator=generator(4)) if form == "bias" else torch.zeros(both.shape)
    given_mask = mask if form == "bool" else bias.masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = both if form == "bool" else bias.double().masked_fill(~both, -torch.inf)
    assert_same(inputs, AttentionPattern(kind, window)(*inputs, given_mask), reference(*inputs, expected))


@KINDS
@pytest.mark.parametrize("num_queries", [1, 5, 18])
def test_keys_of_a_cache(kind, num_queries):
    inputs = qkv(19, heads=4, kv_heads=2, num_queries=num_queries)
    pattern = AttentionPattern(kind, 4)
    actual = pattern(*inputs, None)
    assert_same(inputs, actual, reference(*inputs, allowed(kind, 4, 19, num_queries)))
    # They are the last rows of the whole.
    query, key, value = qkv(19, heads=4, kv_heads=2)
    whole = pattern(query, key, value, None)
    part = pattern(query[:, :, -num_queries:], key, value, None)
    torch.testing.assert_close(part, whole[:, :, -num_queries:], rtol=1e-5, atol=1e-6)


@KINDS
@pytest.mark.parametrize("form", ["bool", "float"])
def test_keys_of_a_cache_that_is_not_full(kind, form):
    """Of a fixed length: where a query is, only its mask says, and the second sequence began three tokens later."""
    num_keys, filled, num_queries = 24, 15, 4
    inputs = qkv(num_keys, heads=4, kv_heads=2, num_queries=num_queries)
    mask = padding_mask(num_keys, 3)[:, :, filled - num_queries : filled]
    both = allowed(kind, 4, num_keys)[filled - num_queries : filled] & mask
    given_mask = mask if form == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert_same(inputs, AttentionPattern(kind, 4)(*inputs, given_mask), reference(*inputs, both))


@KINDS
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("window", "num_tokens"), [(8, 128), (128, 300)])
def test_the_kernel_of_accelerators(kind, window, num_tokens):
    """Here it is not compiled and has no backward pass: only that it is given the same pattern."""
    query, key, value = (x.detach() for x in qkv(num_tokens, heads=4, kv_heads=2, head_dim=16))
    pattern = AttentionPattern(kind, window)
    actual = flex(pattern, query, key, value, 0.3)
    expected = reference(query, key, value, allowed(kind, window, num_tokens), 0.3)
    assert (actual - expected).abs().max() < 1e-5


@KINDS
def test_what_validation_leaves_to_the_kernel_of_accelerators_can_be_trained_with(kind):
    """The backward pass refuses to save a tensor of inference mode, in which Lightning validates before it trains."""
    _block_mask.cache_clear()
    with torch.inference_mode():
        mask = _block_mask(AttentionPattern(kind, 8), 300, torch.device("cpu"))
    tensors = [part for part in mask.as_tuple() if isinstance(part, torch.Tensor)]
    assert len(tensors) >= 8
    assert not any(part.is_inference() for part in tensors)


@KINDS
@pytest.mark.parametrize("num_queries", [5, 19])
@pytest.mark.parametrize("with_mask", [False, True])
def test_evaluation_follows_the_pattern_if_it_is_to(kind, num_queries, with_mask):
    inputs = qkv(19, num_queries=num_queries)
    mask = padding_mask(19, 3, num_queries) if with_mask else None
    dense = torch.ones(num_queries, 19, dtype=torch.bool).tril(19 - num_queries)
    dense, sparse = (m & mask if with_mask else m for m in (dense, allowed(kind, 4, 19, num_queries)))
    for in_evaluation, training in ((True, True), (True, False), (False, True), (False, False)):
        actual = AttentionPattern(kind, 4, in_evaluation)(*inputs, mask, training=training)
        expected = sparse if training or in_evaluation else dense
        assert_same(inputs, actual, reference(*inputs, expected))


@KINDS
@pytest.mark.parametrize("with_mask", [False, True])
def test_dropout_changes_outputs_in_their_draws_and_not_in_expectation(kind, with_mask):
    pattern, num_tokens, num_draws, probability = AttentionPattern(kind, 4), 10, 4_000, 0.4
    query, key, value = (x.detach().expand(num_draws, -1, -1, -1) for x in qkv(num_tokens, batch=1, heads=1))
    mask = padding_mask(num_tokens, 0)[:1] if with_mask else None
    exact = pattern(query, key, value, mask)
    assert torch.equal(pattern(query, key, value, mask, dropout=0.0), exact)
    torch.manual_seed(0)
    drawn = pattern(query, key, value, mask, dropout=probability)
    # Weights of what is seen are dropped one by one, and the others grow in proportion: the variance by hand.
    weights = reference(query[:1], key[:1], torch.eye(num_tokens)[None, None], allowed(kind, 4, num_tokens))
    variance = weights.square() @ value[:1].double().square() * probability / (1 - probability)
    error = drawn.double().mean(0) - exact[0].double()
    assert (error.abs() < 6 * (variance[0] / num_draws).sqrt() + 1e-6).all()
    torch.testing.assert_close(drawn.double().var(0), variance[0], rtol=0.25, atol=1e-6)


# Models


MODELS = pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "llama-mqa", "qwen3"])
SIZE = {"heads": 4, "head_dim": 4, "ffn": 16, "blocks": 2}


def model_of(name):
    return make_model(name, dtype=torch.float32, **SIZE).train()


def run(model, x, mask=None):
    """Logits, and the gradients of all parameters."""
    model.zero_grad()
    logits = model(input_ids=x, attention_mask=mask, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_run(actual, expected):
    assert relative_error(actual[0], expected[0]) < 1e-5
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max()), name


@MODELS
@KINDS
def test_a_model_that_attends_by_a_pattern(name, kind):
    """Against the model's own attention under a mask that says the same."""
    model, pattern = model_of(name), AttentionPattern(kind, 4)
    x = tokens(model, length=14)
    plain = run(model, x)
    expected = run(model, x, allowed(kind, 4, 14).expand(2, 1, -1, -1))
    undo = anatomy_of(model).attend(model, pattern)
    assert_same_run(run(model, x), expected)
    assert relative_error(expected[0], plain[0]) > 1e-3
    undo()
    again = run(model, x)
    assert torch.equal(again[0], plain[0])
    assert all(torch.equal(again[1][key], gradient) for key, gradient in plain[1].items())


@MODELS
@KINDS
def test_a_model_whose_input_is_padded(name, kind):
    model = model_of(name)
    x = tokens(model, length=14)
    padded = torch.ones_like(x)
    padded[1, :5] = 0
    positions = (padded.cumsum(1) - 1).clamp(min=0)
    mask = (allowed(kind, 4, 14) & padding_mask(14, 5)).expand(2, 1, -1, -1)
    expected = model(input_ids=x, attention_mask=mask, position_ids=positions, use_cache=False).logits
    anatomy_of(model).attend(model, AttentionPattern(kind, 4))
    actual = model(input_ids=x, attention_mask=padded, position_ids=positions, use_cache=False).logits
    assert relative_error(actual[padded.bool()], expected[padded.bool()]) < 1e-5


@MODELS
@KINDS
def test_a_model_that_generates_with_a_cache(name, kind):
    model = model_of(name).eval()
    x = tokens(model, length=14)
    anatomy_of(model).attend(model, AttentionPattern(kind, 4))
    with torch.no_grad():
        whole = model(input_ids=x, use_cache=False).logits
        cache, parts = None, []
        for part in x.split([9, 1, 1, 3], 1):
            result = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            parts.append(result.logits)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-5


@MODELS
@pytest.mark.parametrize("in_evaluation", [True, False])
def test_a_model_whose_cache_has_a_fixed_length(name, in_evaluation):
    """While it is empty there is no mask, and the queries are at its beginning."""
    model = model_of(name).eval()
    x = tokens(model, length=14)
    anatomy_of(model).attend(model, AttentionPattern("union", 4, in_evaluation))
    cache, parts = transformers.StaticCache(model.config, max_cache_len=20), []
    with torch.no_grad():
        whole = model(input_ids=x, use_cache=False).logits
        for part in x.split([9, 1, 4], 1):
            parts.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-5


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa"])
def test_a_model_in_evaluation_and_its_own_dropout(name):
    config = make_config(name, **SIZE)
    setattr(config, "attn_pdrop" if "gpt2" in name else "attention_dropout", 0.5)
    model = type(model_of(name))(config)
    model.load_state_dict(model_of(name).state_dict())
    x = tokens(model, length=14)
    with torch.no_grad():
        dense = model.eval()(input_ids=x).logits
        undo = anatomy_of(model).attend(model, AttentionPattern("union", 4, in_evaluation=False))
        assert relative_error(model(input_ids=x).logits, dense) < 1e-5
        undo()
        anatomy_of(model).attend(model, AttentionPattern("union", 4))
        first, second = (model(input_ids=x).logits for _ in range(2))
        assert torch.equal(first, second) and relative_error(first, dense) > 1e-3
        first, second = (model.train()(input_ids=x).logits for _ in range(2))
        assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa"])
def test_nothing_of_it_is_saved(name, tmp_path):
    model = model_of(name)

    def saved(path):
        model.save_pretrained(path)
        return {key: value.clone() for key, value in model.state_dict().items()}, json.loads(
            (path / "config.json").read_text()
        )

    states, config = saved(tmp_path / "dense")
    dictionary, text = model.config.to_dict(), model.config.to_json_string()
    undo = anatomy_of(model).attend(model, AttentionPattern("fixed", 4))
    others, other_config = saved(tmp_path / "sparse")
    assert other_config == config
    assert (model.config.to_dict(), model.config.to_json_string()) == (dictionary, text)
    assert states.keys() == others.keys()
    assert all(torch.equal(states[key], value) for key, value in others.items())
    loaded = type(model).from_pretrained(tmp_path / "sparse")
    undo()
    x = tokens(model)
    assert torch.equal(loaded.train()(input_ids=x).logits, model(input_ids=x).logits)
    assert loaded.config._attn_implementation == model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("share_config", [False, True])
def test_two_models_attend_each_in_its_own_way(share_config):
    dense, near, far = (model_of("gpt2-tied") for _ in range(3))
    if share_config:
        config = dense.config
        near, far = (type(dense)(config).train() for _ in range(2))
        for model in (near, far):
            model.load_state_dict(dense.state_dict())
    undo = anatomy_of(near).attend(near, AttentionPattern("window", 3))
    anatomy_of(far).attend(far, AttentionPattern("window", 9))
    x = tokens(dense, length=14)
    logits = [model(input_ids=x).logits for model in (dense, near, far)]
    errors = [relative_error(one, other) for one, other in ((logits[0], logits[1]), (logits[1], logits[2]))]
    assert min(errors) > 1e-3
    undo()
    assert torch.equal(near(input_ids=x).logits, logits[0])
    assert torch.equal(far(input_ids=x).logits, logits[2])
    if share_config:
        assert near.config is dense.config


def test_only_causal_models_can():
    assert anatomy_of(make_model("bert-mlm", **SIZE)).attend is None
    assert anatomy_of(make_model("vit", **SIZE)).attend is None
    config = make_config("bert-mlm", **SIZE)
    config.is_decoder = True
    decoder = transformers.BertLMHeadModel(config).train()
    x = tokens(decoder, length=14)
    expected = run(decoder, x, allowed("union", 4, 14).expand(2, 1, -1, -1))
    anatomy_of(decoder).attend(decoder, AttentionPattern("union", 4))
    assert_same_run(run(decoder, x), expected)


@pytest.mark.parametrize("in_evaluation", [True, False])
def test_packed_sequences_that_are_told_by_their_boundaries(in_evaluation):
    """As to a kernel for them, which gets no mask: no token sees one of another sequence."""
    torch.manual_seed(0)
    model = make_model("llama-gqa", dtype=torch.float64)
    ids = torch.randint(model.config.vocab_size, (1, 12))
    given = {
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None],
        "cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 5, 12], dtype=torch.int32),
    }
    undo = attend_with(model, AttentionPattern("window", 4, in_evaluation))
    model.train(in_evaluation)
    whole = model(input_ids=ids, **given).logits
    alone = [model(input_ids=ids[:, part]).logits for part in (slice(0, 5), slice(5, 12))]
    undo()
    torch.testing.assert_close(whole, torch.cat(alone, dim=1))
