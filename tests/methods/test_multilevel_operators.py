"""The algebra of coalescing, de-coalescing and interpolation, on every family."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_accel.anatomy import AnatomyError, anatomy_of, build_resized
from lit_accel.methods.multilevel import Interpolation, coalesce, decoalesce, interpolate, level_map
from tests.models import ALL_MODELS, make_model, outputs, relative_error, tokens

# Enough to be divided by two and by four; the property test below has more.
FEW = 4
NOT_POST_NORM = [name for name in ALL_MODELS if "bert" not in name]


def small_and_map(name, *, width=2, depth=1, dtype=torch.float64, **options):
    """A trained-looking small model, and the map from the large model it belongs to."""
    return small_of(make_model(name, dtype=dtype), width=width, depth=depth, **options)


def small_of(large, *, width=2, depth=1, **options):
    lm = level_map(anatomy_of(large), width=width, depth=depth, **options)
    small = build_resized(large, lm.large, lm.small.size)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return small, lm


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(ALL_MODELS),
    factor=st.sampled_from([2, 3, 4]),
    depth_factor=st.sampled_from([1, 2, 3, 4]),
    width_grouping=st.sampled_from(["block", "adjacent"]),
    depth_grouping=st.sampled_from(["adjacent", "stack"]),
    depth_mode=st.sampled_from(["avg", "ode", "zero"]),
    head_dim=st.sampled_from([2, 4]),
    ffn=st.sampled_from([24, 60]),
)
def test_coalescing_undoes_decoalescing(
    name, factor, depth_factor, width_grouping, depth_grouping, depth_mode, head_dim, ffn
):
    if depth_mode == "zero" and "bert" in name:
        depth_mode = "ode"
    anatomy = anatomy_of(make_model(name, head_dim=head_dim, ffn=ffn))
    lm = level_map(
        anatomy,
        width=factor,
        depth=depth_factor,
        width_grouping=width_grouping,
        depth_grouping=depth_grouping,
        depth_mode=depth_mode,
    )
    generator = torch.Generator().manual_seed(0)
    small = {
        key: torch.randn(layout.shape(lm.small.size.axes), generator=generator, dtype=torch.float64)
        for key, layout in lm.small.parameters.items()
    }
    grown = decoalesce(small, lm)
    assert {key: value.shape for key, value in grown.items()} == {
        key: layout.shape(anatomy.size.axes) for key, layout in anatomy.parameters.items()
    }
    back = coalesce(grown, lm)
    for key, value in small.items():
        assert (back[key] - value).abs().max() <= 1e-12


@pytest.fixture(scope="module")
def wide():
    """Models that no test changes."""
    return cache(partial(make_model, blocks=FEW))


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("grouping", ["block", "adjacent"])
def test_growing_the_width_preserves_the_function(name, factor, grouping, wide):
    small, lm = small_of(wide(name), width=factor, width_grouping=grouping)
    large = decoalesce(small, lm)
    for actual, expected in zip(outputs(large, tokens(large)), outputs(small, tokens(small)), strict=True):
        if actual.shape != expected.shape:  # hidden states: the small ones, each repeated
            if grouping == "block":
                expected = expected.repeat(*(1,) * (expected.ndim - 1), factor)
            else:
                expected = expected.repeat_interleave(factor, dim=-1)
        assert relative_error(actual, expected) <= 1e-10


@pytest.mark.parametrize("name", ["gpt2-tied", "gpt2-untied", "bert-mlm", "llama", "llama-gqa", "llama-gqa-tied"])
def test_growing_the_width_preserves_the_function_in_single_precision(name):
    small, lm = small_and_map(name, dtype=torch.float32)
    large = decoalesce(small, lm)
    for actual, expected in zip(outputs(large, tokens(large)), outputs(small, tokens(small)), strict=True):
        assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("name", NOT_POST_NORM)
@pytest.mark.parametrize("grouping", ["adjacent", "stack"])
def test_growing_the_depth_by_empty_branches_preserves_the_function(name, grouping):
    small, lm = small_and_map(name, width=1, depth=3, depth_mode="zero", depth_grouping=grouping)
    large = decoalesce(small, lm)
    for actual, expected in zip(outputs(large, tokens(large)), outputs(small, tokens(small)), strict=True):
        assert torch.equal(actual, expected)


def test_growing_the_depth_by_copies_changes_the_function():
    small, lm = small_and_map("gpt2-tied", width=1, depth=2, depth_mode="avg")
    large = decoalesce(small, lm)
    actual, expected = (outputs(model, tokens(small))[0] for model in (large, small))
    assert relative_error(actual, expected) > 1e-2


def test_copies_of_a_block_take_half_of_its_step_each():
    """And blocks that are merged take all of their steps, while everything else is copied and averaged."""
    large = make_model("gpt2-tied", blocks=FEW)
    small, lm = small_of(large, width=1, depth=2, depth_mode="ode")
    large, small = parameters(large), parameters(small)
    grown, merged = decoalesce(small, lm), coalesce(large, lm)
    names = [name.removeprefix("transformer.h.0.") for name in small if name.startswith("transformer.h.0.")]
    steps = {f"{branch}.c_proj.{kind}" for branch in ("attn", "mlp") for kind in ("weight", "bias")}
    assert steps < set(names)
    for name in names:
        divisor = 2 if name in steps else 1
        for index in range(FEW):
            block, source = f"transformer.h.{index}.{name}", f"transformer.h.{index // 2}.{name}"
            assert torch.equal(grown[block], small[source] / divisor), block
        for index in range(FEW // 2):
            first, second = (large[f"transformer.h.{2 * index + other}.{name}"] for other in range(2))
            assert torch.equal(merged[f"transformer.h.{index}.{name}"], (first + second) * divisor / 2), name


def test_unfolded_tied_head_would_change_the_function():
    """The factor that the last norm carries is needed: without it the logits are twice too large."""
    small, lm = small_and_map("gpt2-tied")
    large = decoalesce(small, lm)
    with torch.no_grad():
        large.transformer.ln_f.weight.mul_(2)
        large.transformer.ln_f.bias.mul_(2)
    actual, expected = (outputs(model, tokens(small))[0] for model in (large, small))
    assert relative_error(actual, expected) > 0.5


def test_empty_branches_are_refused_for_post_norm_blocks():
    with pytest.raises(AnatomyError, match="normalised after the addition"):
        level_map(anatomy_of(make_model("bert-mlm")), depth_mode="zero")


@pytest.mark.parametrize(("argument", "value"), [("width", 5), ("depth", 5)])
def test_a_factor_that_does_not_divide_is_refused(argument, value):
    with pytest.raises(AnatomyError, match="cannot be divided by 5"):
        level_map(anatomy_of(make_model("gpt2-tied")), **{argument: value})


def test_an_unknown_grouping_is_refused():
    with pytest.raises(ValueError, match="'block', 'adjacent'"):
        level_map(anatomy_of(make_model("gpt2-tied")), width_grouping="random")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALL_MODELS)
def test_interpolation_replaces_the_coarse_part_and_shrinks_the_fine_one(name):
    large = make_model(name, blocks=FEW)
    small, lm = small_of(large, width=2, depth=2)
    old = lm.apply(parameters(large), "coalesce")
    smooth = lm.apply(old, "decoalesce")
    for coarse, fine in ((0.25, 0.25), (0.5, 0.5), (1.0, 0.0), (1.0, 0.5), (0.3, 0.8)):
        merged = parameters(interpolate(large, small, lm, Interpolation(coarse, fine)))
        mixed = {key: (1 - coarse) * old[key] + coarse * value for key, value in parameters(small).items()}
        grown = lm.apply(mixed, "decoalesce")
        for key, value in parameters(large).items():
            expected = grown[key] + (1 - fine) * (value - smooth[key])
            torch.testing.assert_close(merged[key], expected, rtol=0, atol=1e-12, msg=f"{key}, {coarse}, {fine}")


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_ends_of_interpolation_are_bitwise(name, dtype):
    large = make_model(name, dtype=dtype, blocks=FEW)
    small, lm = small_of(large, width=2, depth=2)
    for result, expected in (
        (interpolate(large, small, lm, Interpolation.of_alpha(0)), large),
        (interpolate(large, small, lm, Interpolation.of_alpha(1)), decoalesce(small, lm)),
        (interpolate(large, coalesce(large, lm), lm, Interpolation(coarse=1, fine=0)), large),
    ):
        for key, value in parameters(expected).items():
            assert torch.equal(result.get_parameter(key), value), key


def halves(state):
    return {name: tensor.bfloat16() for name, tensor in state.items()}


def singles(state):
    return {name: tensor.float() for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit-registers"])
@pytest.mark.parametrize("operator", ["coalesce", "decoalesce", "coalesce_t", "decoalesce_t"])
def test_maps_of_half_precision_round_once(name, operator, wide):
    """However many terms a sum has: here up to 64."""
    small, lm = small_of(wide(name), width=4, depth=4)
    state = halves(parameters(wide(name) if operator in ("coalesce", "decoalesce_t") else small))
    expected = halves(lm.apply(singles(state), operator))
    for key, value in lm.apply(state, operator).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(("coarse", "fine"), [(0.3, 0.8), (0.3, 0.3), (1.0, 0.0)])
def test_interpolation_in_half_precision_rounds_once(coarse, fine, wide):
    small, lm = small_of(wide("gpt2-tied"), width=2, depth=2)
    # Their means are numbers in half precision: else the coalesced model is rounded too, as the small one was.
    large = {name: (tensor * 16).round().clamp(-16, 16) / 16 for name, tensor in parameters(wide("gpt2-tied")).items()}
    large, small = halves(large), halves(parameters(small))
    expected = halves(interpolate(singles(large), singles(small), lm, Interpolation(coarse, fine)))
    for key, value in interpolate(large, small, lm, Interpolation(coarse, fine)).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_share_outside_of_the_unit_interval_is_refused(value):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Interpolation.of_alpha(value)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_operators_are_adjoint_pairs(name):
    large = make_model(name)
    for mode in ("avg", "ode", "zero") if "bert" not in name else ("avg", "ode"):
        lm = level_map(anatomy_of(large), width=2, depth=3, depth_mode=mode)
        small, _ = small_of(large, width=2, depth=3)
        x, y = parameters(large), parameters(small)

        def dot(a, b):
            return sum((a[key] * b[key]).sum() for key in a)

        for operator, adjoint, source, target in (
            ("coalesce", "coalesce_t", x, y),
            ("decoalesce", "decoalesce_t", y, x),
        ):
            left = dot(lm.apply(source, operator), target)
            right = dot(source, lm.apply(target, adjoint))
            torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize(("width_grouping", "depth_grouping"), [("block", "adjacent"), ("adjacent", "stack")])
def test_levels_compose_both_ways(name, width_grouping, depth_grouping, wide):
    large = parameters(wide(name))
    for depth_mode in ("avg", "ode", "zero") if "bert" not in name else ("avg", "ode"):
        options = {"width_grouping": width_grouping, "depth_grouping": depth_grouping, "depth_mode": depth_mode}
        first = level_map(anatomy_of(wide(name)), **options)
        second = level_map(first.small, **options)
        # Six key-value heads divide once by two; the second time the queries of each group merge.
        at_once = level_map(first.large, width=4, depth=4, **options)
        small = at_once.apply(large, "coalesce")
        for actual, expected in (
            (second.apply(first.apply(large, "coalesce"), "coalesce"), small),
            (first.apply(second.apply(small, "decoalesce"), "decoalesce"), at_once.apply(small, "decoalesce")),
        ):
            assert actual.keys() == expected.keys()
            for key, value in actual.items():
                torch.testing.assert_close(value, expected[key], rtol=1e-13, atol=1e-13, msg=f"{key}, {depth_mode}")


@pytest.mark.parametrize("name", ["gpt2-tied", "bert-mlm", "llama-gqa-tied"])
def test_state_dicts_are_mapped_like_models(name):
    large = make_model(name)
    lm = level_map(anatomy_of(large))
    state = coalesce(large.state_dict(), lm)
    small = coalesce(large, lm)
    assert state.keys() == small.state_dict().keys()
    small.load_state_dict(state)
    expected = coalesce(large, lm).state_dict()
    for key, value in state.items():
        assert torch.equal(value, expected[key])
    grown = decoalesce(state, lm)
    large.load_state_dict(grown)
    with pytest.raises(KeyError, match="missing"):
        coalesce({key: value for key, value in state.items() if "norm" not in key.lower()}, lm)


@pytest.mark.parametrize("name", ["gpt2-tied", "bert-mlm", "llama-gqa"])
def test_models_are_neither_changed_nor_aliased(name):
    large = make_model(name)
    before = parameters(large)
    lm = level_map(anatomy_of(large), width=1, depth=1)
    for result in (
        coalesce(large, lm),
        decoalesce(large, lm),
        interpolate(large, large, lm, Interpolation.of_alpha(0)),
    ):
        with torch.no_grad():
            for parameter in result.parameters():
                parameter.zero_()
    for key, value in before.items():
        assert torch.equal(large.get_parameter(key), value)


def test_fused_projections_keep_queries_keys_and_values_apart():
    large = make_model("gpt2-tied")
    embed = large.config.n_embd
    with torch.no_grad():
        bias = large.transformer.h[0].attn.c_attn.bias
        bias.copy_(torch.arange(3).repeat_interleave(embed))
    lm = level_map(anatomy_of(large), width=3, depth=1)
    bias = coalesce(large, lm).transformer.h[0].attn.c_attn.bias
    assert torch.equal(bias.detach(), torch.arange(3.0, dtype=bias.dtype).repeat_interleave(embed // 3))


def test_width_coalescing_keeps_the_spread_of_a_fresh_initialisation():
    import transformers

    config = transformers.GPT2Config(n_embd=256, n_head=4, n_layer=1, vocab_size=64, n_positions=16)
    large = transformers.GPT2LMHeadModel(config)
    small = coalesce(large, level_map(anatomy_of(large), width=2, depth=1))
    name = "transformer.h.0.attn.c_attn.weight"
    ratio = small.get_parameter(name).std() / large.get_parameter(name).std()
    assert 0.95 < ratio < 1.05
