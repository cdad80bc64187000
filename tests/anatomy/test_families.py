"""What the anatomy says of each family, against the models themselves."""

from __future__ import annotations

import gc
import inspect
import weakref

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_accel.anatomy import (
    AnatomyError,
    anatomy_of,
    build_resized,
    compile_blocks,
    find_transformer,
    register_anatomy,
)
from lit_accel.compute import forward_flops
from tests.models import ZOO, make_config, make_model

SIZE = {"heads": 4, "head_dim": 4, "ffn": 32, "blocks": 4}


@pytest.fixture(params=sorted(ZOO))
def model(request):
    return make_model(request.param, **SIZE)


def test_every_parameter_has_a_layout_of_its_shape(model):
    anatomy = anatomy_of(model)
    shapes = {name: layout.shape(anatomy.size.axes) for name, layout in anatomy.parameters.items()}
    assert shapes == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert anatomy.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_blocks_are_the_models_blocks_in_order(model):
    anatomy = anatomy_of(model)
    modules = [model.get_submodule(block.path) for block in anatomy.blocks]
    assert len(modules) == 4
    assert len({type(module) for module in modules}) == 1
    called = []
    hooks = [module.register_forward_pre_hook(lambda module, args: called.append(module)) for module in modules]
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert called == modules
    assert len(hooks) == 4


def test_token_dimensions_of_the_arguments_of_a_block(model):
    """Twice the tokens must change exactly the declared dimensions of what a block is called with."""
    anatomy = anatomy_of(model)
    block = model.get_submodule(anatomy.blocks[0].path)
    calls = []

    def keep(module, args, kwargs):
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        flat = {**bound, **bound.pop("kwargs", {})}
        calls.append({key: value for key, value in flat.items() if key != "self"})

    block.register_forward_pre_hook(keep, with_kwargs=True)
    for length in (5, 10):
        # Padding on the left, so that a mask must be passed on.
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, 0] = 0
        model(input_ids=torch.full((2, length), 7), attention_mask=mask)

    def shapes(value):
        if isinstance(value, torch.Tensor):
            return [value.shape]
        return [shape for item in value for shape in shapes(item)] if isinstance(value, tuple) else []

    assert "attention_mask" in calls[0]
    for key in calls[0]:
        for short, long in zip(shapes(calls[0][key]), shapes(calls[1][key]), strict=True):
            grown = {dim for dim in range(len(short)) if long[dim] == 2 * short[dim] == 10}
            declared = {dim % len(short) for dim in anatomy.blocks[0].token_dims.get(key, ())}
            assert grown == declared, key


def test_branch_outputs_are_what_a_branch_adds(model):
    """With them at zero, a block of pre-norm form is the identity."""
    anatomy = anatomy_of(model)
    block = anatomy.blocks[0]
    module = model.get_submodule(block.path)
    locals_ = dict(module.named_parameters())
    present = block.branch_outputs & locals_.keys()
    assert len(present) >= 2
    if block.residual == "pre_norm":
        with torch.no_grad():
            for name in present:
                locals_[name].zero_()
        seen = []
        module.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
        model(input_ids=torch.tensor([[3, 4, 5]]))
        torch.testing.assert_close(seen[0][1], seen[0][0])


def test_ties_are_found(model):
    anatomy = anatomy_of(model)
    tied = getattr(model, "all_tied_weights_keys", {})
    assert {frozenset(group) for group in anatomy.tied} == {frozenset(pair) for pair in tied.items()}
    assert bool(anatomy.tied_heads) == any("weight" in name for name in tied)
    assert any(layout.fold for layout in anatomy.parameters.values()) == bool(anatomy.tied_heads)


def test_a_resized_model_is_of_the_same_class_and_loads_strictly(model):
    anatomy = anatomy_of(model)
    size = anatomy.reduced(width=2, depth=2)
    small = build_resized(model, anatomy, size)
    assert type(small) is type(model)
    assert anatomy_of(small) == anatomy.at(size)
    assert anatomy.at(size).at(anatomy.size) == anatomy
    assert small.config.vocab_size == model.config.vocab_size
    clone = type(model)(type(model.config)(**small.config.to_dict()))
    small.load_state_dict(clone.to(torch.float64).state_dict(), strict=True)
    back = build_resized(small, anatomy_of(small), anatomy.size)
    ignored = {"architectures", "transformers_version", "dtype", "_name_or_path", "n_inner", "head_dim"}
    old, new = model.config.to_dict(), back.config.to_dict()
    assert {key for key in old if old[key] != new.get(key)} <= ignored


def test_what_is_carried_over_to_another_size():
    model = make_model("gpt2-tied", dtype=torch.bfloat16, **SIZE).train()
    model.transformer.wpe.weight.requires_grad_(False)
    model.transformer.h.requires_grad_(False)
    compile_blocks(model, backend="eager")
    model.config._attn_implementation = "eager"
    anatomy = anatomy_of(model)
    state = torch.get_rng_state()
    small = build_resized(model, anatomy, anatomy.reduced(2, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert small.training
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in frozen if ".h." in name or "wpe" in name}
    assert len(frozen) == 2 * 12 + 1
    assert all(block._compiled_call_impl is not None for block in small.transformer.h)
    assert small.config._attn_implementation == "eager"
    assert small.lm_head.weight is small.transformer.wte.weight


def test_activation_checkpointing_is_carried_over():
    model = make_model("llama-gqa", **SIZE).train()
    model._set_gradient_checkpointing(True, torch.utils.checkpoint.checkpoint)
    anatomy = anatomy_of(model)
    small = build_resized(model, anatomy, anatomy.reduced(1, 2))
    assert all(layer.gradient_checkpointing for layer in small.model.layers)


def dropout_rates(model):
    """Every dropout probability of a model: those of modules, and those that attention keeps as plain numbers."""
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    for name, module in model.named_modules():
        numbers = {key: value for key, value in vars(module).items() if "dropout" in key and isinstance(value, float)}
        rates |= {f"{name}.{key}": value for key, value in numbers.items()}
    return rates


def set_dropout(model, rate):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = rate


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_dropout_is_that_of_the_model_and_not_of_its_config(name, rate):
    """Whoever has switched it off (or on) after building the model must not find it changed by a resize."""
    model = make_model(name, **SIZE)
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(model.config, key):
            setattr(model.config, key, 0.1)
    if hasattr(model.config, "attention_dropout"):
        model.config.attention_dropout = 0.1
    set_dropout(model, rate)
    anatomy = anatomy_of(model)
    small = build_resized(model, anatomy, anatomy.reduced(2, 2))
    back = build_resized(small, anatomy_of(small), anatomy.size)
    assert dropout_rates(model) == dropout_rates(back)
    assert {rate} == set(dropout_rates(small).values())


def test_dropout_of_a_block_is_that_of_the_block_that_it_is_like():
    model = make_model("gpt2-tied", **SIZE)
    for index, block in enumerate(model.transformer.h):
        block.mlp.dropout.p = 0.1 * index
    model.transformer.h[2].attn.resid_dropout = nn.Identity()
    model.config.resid_pdrop = 0.5
    anatomy = anatomy_of(model)
    small = build_resized(model, anatomy, anatomy.reduced(1, 2))
    assert [block.mlp.dropout.p for block in small.transformer.h] == [0.0, 0.2]
    assert [block.attn.resid_dropout.p for block in small.transformer.h] == [0.0, 0.0]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(ZOO)),
    heads=st.sampled_from([2, 4, 6, 12]),
    head_dim=st.sampled_from([2, 4, 6]),
    ffn=st.integers(1, 40),
    blocks=st.integers(1, 6),
)
def test_any_size_is_described(name, heads, head_dim, ffn, blocks):
    with torch.device("meta"):
        model = make_model(name, heads=heads, head_dim=head_dim, ffn=ffn, blocks=blocks)
    assert len(anatomy_of(model).blocks) == blocks


def test_an_unknown_model_is_told_what_to_do():
    class MyTransformer(nn.Module):
        pass

    with pytest.raises(AnatomyError, match=r"(?s)MyTransformer.*gpt2: .*GPT2LMHeadModel.*register_anatomy"):
        anatomy_of(MyTransformer())


def test_an_unnamed_parameter_is_an_error():
    model = make_model("gpt2-tied", **SIZE)
    model.transformer.h[1].attn.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(AnatomyError, match=r"transformer.h.1.attn.extra.* has no layout"):
        anatomy_of(model)


def test_an_unknown_buffer_is_an_error():
    model = make_model("gpt2-tied", **SIZE)
    model.register_buffer("scale", torch.ones(3))
    with pytest.raises(AnatomyError, match="scale"):
        anatomy_of(model)


def test_a_parameter_of_another_shape_is_an_error():
    model = make_model("gpt2-tied", **SIZE)
    model.resize_token_embeddings(77)
    model.config.vocab_size = 53
    with pytest.raises(AnatomyError, match="config and the weights disagree"):
        anatomy_of(model)


def test_attention_that_depends_on_the_layers_index_keeps_its_depth():
    config = transformers.GPT2Config(
        n_layer=4, n_embd=16, n_head=4, vocab_size=60, scale_attn_by_inverse_layer_idx=True
    )
    model = transformers.GPT2Model(config)
    anatomy = anatomy_of(model)
    assert anatomy_of(build_resized(model, anatomy, anatomy.reduced(2, 1))).size == anatomy.reduced(2, 1)
    with pytest.raises(AnatomyError, match=r"scale_attn_by_inverse_layer_idx.*depth factor 1"):
        build_resized(model, anatomy, anatomy.reduced(1, 2))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-tied"])
def test_encoders_made_of_decoders_see_all_tokens(name):
    """As transformers has it: is_causal=False in the configuration."""
    found = {}
    for is_causal in (True, False):
        model = make_model(name)
        model.config.is_causal = is_causal
        anatomy = anatomy_of(model)
        assert (anatomy.attend is not None) == is_causal
        found[is_causal] = forward_flops(anatomy, 1, 16).blocks[0]
    assert found[False] > found[True]


@pytest.mark.parametrize("is_direct", [True, False])
def test_without_a_pooler(is_direct):
    config = make_config("bert-base")
    model = (
        transformers.BertModel(config, add_pooling_layer=False)
        if is_direct
        else transformers.BertForTokenClassification(config).bert
    )
    anatomy = anatomy_of(model)
    small = build_resized(model, anatomy, anatomy.reduced(2, 2))
    assert small.pooler is None
    assert anatomy_of(small).size == anatomy.reduced(2, 2)


def test_blocks_that_were_taken_out_must_be_said():
    model = make_model("bert-mlm")
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    with pytest.raises(AnatomyError, match=r"has 2 blocks in bert\.encoder\.layer, and its config says \d"):
        anatomy_of(model)
    model.config.num_hidden_layers = 2
    assert len(anatomy_of(model).blocks) == 2


def test_a_model_is_described_without_its_state_dict(monkeypatch):
    """Of a sharded model that would put it together, in the middle of a forward pass perhaps."""
    model = make_model("gpt2-tied")
    monkeypatch.setattr(type(model), "state_dict", lambda *args, **kwargs: pytest.fail("a state dict was made"))
    anatomy_of(model)


@pytest.mark.parametrize("kind", ["buffer", "extra state"])
def test_what_a_state_dict_holds_besides_is_not_passed_over(kind):
    model = make_model("gpt2-tied")
    if kind == "buffer":
        model.transformer.register_buffer("passing", torch.zeros(1), persistent=False)
        anatomy_of(model)
        model.transformer.register_buffer("own", torch.zeros(1))
    else:

        class Stateful(torch.nn.Identity):
            def get_extra_state(self):
                return 1

        model.transformer.drop = Stateful()
    with pytest.raises(AnatomyError, match="keeps buffers"):
        anatomy_of(model)


def test_what_else_is_compiled_is_nobodys_business():
    module = torch.nn.ModuleDict({"net": make_model("gpt2-tied"), "proj": torch.compile(torch.nn.Linear(4, 4))})
    assert find_transformer(module)[0] == "net"
    module["net"] = torch.compile(module["net"], backend="eager")
    with pytest.raises(AnatomyError, match="compile_blocks"):
        find_transformer(module)


def test_blocks_that_attend_in_different_ways_keep_their_depth():
    config = transformers.Qwen2Config(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        intermediate_size=16,
        vocab_size=31,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
    )
    model = transformers.Qwen2ForCausalLM(config)
    anatomy = anatomy_of(model)
    assert [block.attention.window for block in anatomy.blocks] == [None, None, 4, 4]
    assert anatomy_of(build_resized(model, anatomy, anatomy.reduced(2, 1))).size.depths == (4,)
    with pytest.raises(AnatomyError, match="depth factor 1"):
        build_resized(model, anatomy, anatomy.reduced(2, 2))


def test_subclasses_are_found_through_their_bases():
    class MyGPT(transformers.GPT2LMHeadModel):
        pass

    assert anatomy_of(MyGPT(make_model("gpt2-tied", **SIZE).config)).family == "gpt2"


def test_users_can_register_their_own():
    class Mine(transformers.GPT2Model):
        pass

    class Other(nn.Module):
        pass

    @register_anatomy("mine", [Other])
    def describe(model):
        return anatomy_of(make_model("gpt2-tied", **SIZE))

    assert anatomy_of(Other()).family == "gpt2"


def test_finding_the_transformer_does_not_keep_it():
    """A resize looks for what it replaces: the memory of that must not wait for the next collection of garbage."""
    host = nn.Module()
    host.backbone = make_model("gpt2-tied", **SIZE)
    kept = weakref.ref(host.backbone)
    gc.collect()
    gc.disable()
    try:
        find_transformer(host)
        host.backbone = nn.Identity()
        assert kept() is None
    finally:
        gc.enable()


def test_finding_the_transformer():
    host = nn.Module()
    host.backbone = nn.Sequential(make_model("gpt2-tied", **SIZE))
    path, model = find_transformer(host)
    assert path == "backbone.0"
    assert model is host.backbone[0]
