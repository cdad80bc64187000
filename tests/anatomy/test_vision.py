"""What the anatomy says of timm's vision models, against the models themselves."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

from lit_accel.anatomy import AnatomyError, anatomy_of, build_resized, compile_blocks, uses_activation_checkpointing
from lit_accel.methods.multilevel import coalesce, decoalesce, level_map
from tests.models import make_model, outputs, relative_error, tokens
from tests.vision import PADS_WINDOWS, VISION_ZOO, images, make_vision_module

SIZE = {"heads": 4, "head_dim": 4, "ffn": 32, "blocks": 4}


@pytest.fixture(params=sorted(VISION_ZOO))
def model(request):
    return make_model(request.param, **SIZE)


def test_blocks_are_the_models_blocks_in_order(model):
    anatomy = anatomy_of(model)
    called, paths = [], {module: name for name, module in model.named_modules()}
    for module in model.modules():
        if type(module).__name__.endswith("Block"):
            module.register_forward_pre_hook(lambda module, args: called.append(paths[module]))
    model(images(model))
    assert called == [block.path for block in anatomy.blocks]


def test_token_dimensions_of_a_block(model):
    seen = {}
    anatomy = anatomy_of(model)
    for block in anatomy.blocks:
        hook = functools.partial(lambda block, module, args: seen.update({block: args[0].shape}), block.path)
        model.get_submodule(block.path).register_forward_pre_hook(hook)
    x = images(model, batch=3)
    num_sequences, num_tokens = anatomy.input_shape((x,), {})
    model(x)
    for block in anatomy.blocks:
        shape = seen[block.path]
        num_block_tokens = torch.tensor([shape[dim] for dim in block.token_dims["x"]]).prod().item()
        assert shape[0] == num_sequences == 3
        assert num_block_tokens == anatomy.places[block.place](1, num_tokens)


def test_branch_outputs_are_what_a_branch_adds(model):
    block = anatomy_of(model).blocks[0]
    module = model.get_submodule(block.path)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name in block.branch_outputs & parameters.keys():
            parameters[name].zero_()
    seen = []
    module.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    model(images(model))
    assert torch.equal(seen[0][1], seen[0][0])


def test_a_resized_model_has_the_anatomy_of_its_size(model):
    anatomy = anatomy_of(model)
    size = anatomy.reduced(width=2, depth=2)
    assert anatomy_of(build_resized(model, anatomy, size)) == anatomy.at(size)
    assert anatomy.at(size).at(anatomy.size) == anatomy
    assert torch.isfinite(outputs(coalesce(model, level_map(anatomy)), tokens(model))[0]).all()


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "vit-registers", "swin"])
def test_copies_look_like_new_models(name):
    model, fresh = make_model(name, **SIZE), make_model(name, heads=2, head_dim=4, ffn=16, blocks=2)
    anatomy = anatomy_of(model)
    small = build_resized(model, anatomy, anatomy.reduced(width=2, depth=2))
    small.load_state_dict(fresh.state_dict(), strict=True)
    assert repr(small) == repr(fresh)
    assert small.feature_info == fresh.feature_info
    assert small.num_features == fresh.num_features
    assert {k: v.shape for k, v in small.named_buffers()} == {k: v.shape for k, v in fresh.named_buffers()}
    for actual, expected in zip(small.buffers(), fresh.buffers(), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(outputs(small, images(small))[0], outputs(fresh, images(fresh))[0])


@settings(max_examples=25, deadline=None)
@given(
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    heads=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=3, max_size=3),
    window=st.integers(1, 5) if PADS_WINDOWS else st.sampled_from([2, 4]),
    factor=st.sampled_from([2, 3]),
    depth=st.sampled_from([1, 2, 3]),
    mode=st.sampled_from(["avg", "ode", "zero"]),
)
def test_any_swin_grows_without_changing_its_function(depths, heads, window, factor, depth, mode):
    """Width always; depth where the new branches are empty."""
    large = (
        SwinTransformerV2(
            img_size=16,
            patch_size=2,
            num_classes=3,
            embed_dim=24,
            depths=tuple(2 * number for number in depths),
            num_heads=tuple(heads[: len(depths)]),
            window_size=window,
            mlp_ratio=1.0,
            drop_path_rate=0.0,
        )
        .double()
        .eval()
    )
    factors = [depth if number % depth == 0 and mode == "zero" else 1 for number in depths]
    lm = level_map(anatomy_of(large), width=factor, depth=factors, depth_mode=mode)
    small = coalesce(large, lm)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.2)
    x = images(large)[..., :16, :16].repeat(1, 1, 2, 2)[..., :16, :16]
    assert relative_error(decoalesce(small, lm)(x), small(x)) <= 1e-10
    back = coalesce(decoalesce(small, lm), lm)
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(back.get_parameter(name), parameter, rtol=1e-12, atol=1e-12)


def test_swin_merges_blocks_of_one_kind():
    """Plain blocks meet plain ones and shifted ones shifted ones, of one stage."""
    anatomy = anatomy_of(make_model("swin", heads=2, head_dim=2, ffn=8, blocks=6))
    lm = level_map(anatomy, depth=[1, 3])
    assert lm.small.size.depths == (2, 4)
    name = "layers.1.blocks.{}.norm1.weight"
    assert lm.sources(name.format(0), "coalesce") == [name.format(index) for index in (0, 2, 4)]
    assert lm.sources(name.format(3), "coalesce") == [name.format(index) for index in (7, 9, 11)]
    assert lm.sources(name.format(5), "decoalesce") == [name.format(1)]
    stacked = level_map(anatomy, depth=[1, 3], depth_grouping="stack")
    assert stacked.sources(name.format(1), "coalesce") == [name.format(index) for index in (1, 5, 9)]


def test_one_depth_factor_is_for_the_stages_that_it_divides():
    swin = anatomy_of(timm.create_model("swinv2_tiny_window8_256", img_size=64))
    assert swin.size.depths == (2, 2, 6, 2)
    assert swin.reduced(width=1, depth=3).depths == (2, 2, 2, 2)
    with pytest.raises(AnatomyError, match=r"2, 2, 6, 2 blocks a stage, which are merged in units of 2.*divided by 2"):
        swin.reduced(width=2, depth=2)
    with pytest.raises(AnatomyError, match="one factor a stage"):
        swin.reduced(width=2, depth=[1, 3])


def test_heads_that_cannot_be_halved_become_narrower():
    swin = anatomy_of(timm.create_model("swinv2_tiny_window8_256", img_size=64))
    axes = swin.reduced(width=2, depth=3).axes
    assert [axes[f"heads_{stage}"] for stage in range(4)] == [3, 3, 6, 12]
    assert [axes[f"head_dim_{stage}"] for stage in range(4)] == [16, 32, 32, 32]
    with pytest.raises(AnatomyError, match="heads is 3"):
        anatomy_of(timm.create_model("deit_tiny_patch16_224")).reduced(width=2)


def drop_path_rates(model):
    blocks = [model.get_submodule(block.path) for block in anatomy_of(model).blocks]
    return [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_stochastic_depth_follows_the_depth(name):
    large, small = (
        make_vision_module(name, heads=4, head_dim=4, ffn=32, blocks=blocks, drop_path_rate=0.3) for blocks in (6, 2)
    )
    anatomy = anatomy_of(large)
    shrunk = build_resized(large, anatomy, anatomy.reduced(width=2, depth=3))
    assert drop_path_rates(shrunk) == pytest.approx(drop_path_rates(small))
    assert any(isinstance(module, DropPath) and module.training for module in shrunk.modules())
    grown = build_resized(shrunk, anatomy_of(shrunk), anatomy.size)
    assert drop_path_rates(grown) == pytest.approx(drop_path_rates(large))


def test_stochastic_depth_survives_a_level_of_one_block():
    large = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, num_heads=2, depth=2, drop_path_rate=0.2)
    anatomy = anatomy_of(large)
    one = build_resized(large, anatomy, anatomy.reduced(width=1, depth=2))
    assert drop_path_rates(one) == [0.0]
    assert drop_path_rates(build_resized(one, anatomy_of(one), anatomy.size)) == pytest.approx([0.0, 0.2])


def test_what_is_carried_over_to_another_size():
    model = make_model("deit-distilled", dtype=torch.bfloat16, **SIZE).train()
    model.set_grad_checkpointing()
    model.set_distilled_training(True)
    model.pos_embed.requires_grad_(False)
    compile_blocks(model, backend="eager")
    holder = nn.Module()
    holder.register_parameter("big", nn.Parameter(torch.ones(3)))
    model.blocks[0].register_forward_hook(holder.forward)
    model.blocks[1].forward = lambda x: x
    anatomy = anatomy_of(model)
    small = build_resized(model, anatomy, anatomy.reduced(2, 2))
    assert uses_activation_checkpointing(small)
    assert small.distilled_training
    assert small.training
    assert not small.pos_embed.requires_grad
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert all(block._compiled_call_impl is not None for block in small.blocks)
    # What was put onto the old modules stays with them.
    assert not any(module._forward_hooks or "forward" in vars(module) for module in small.modules())
    assert "forward" in vars(model.blocks[1])


def test_unknown_parts_are_refused():
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "depth": 1}
    with pytest.raises(AnatomyError, match="ParallelScalingBlock"):
        anatomy_of(VisionTransformer(block_fn=ParallelScalingBlock, **shape))
    with pytest.raises(AnatomyError, match="patch_drop_rate"):
        anatomy_of(VisionTransformer(patch_drop_rate=0.5, **shape))
    with pytest.raises(AnatomyError, match=r"attn_pool.* has no layout"):
        anatomy_of(VisionTransformer(global_pool="map", class_token=False, **shape))
    plain = VisionTransformer(norm_layer=functools.partial(nn.LayerNorm, elementwise_affine=False), **shape)
    with pytest.raises(AnatomyError, match="elementwise_affine=True"):
        build_resized(plain, anatomy_of(plain), anatomy_of(plain).reduced(2, 1))


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224",
        "deit_base_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_giant_patch14_dinov2",
        "vit_base_patch16_clip_224",
        "swinv2_base_window8_256",
        "swinv2_small_window16_256",
    ],
)
def test_models_of_timm_are_described_as_they_are(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    anatomy = anatomy_of(model)
    assert anatomy.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    with torch.device("meta"):
        small = anatomy.build(model, anatomy.reduced(width=2, depth=1))
    assert anatomy_of(small).num_parameters < anatomy.num_parameters / 3
