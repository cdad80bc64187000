"""What a model has become since it was built goes over to the model of another size that takes its place."""

from __future__ import annotations

import pytest
import torch
import transformers

from lit_accel import Level, MultiLevelTraining, Phase
from lit_accel.anatomy import AnatomyError, anatomy_of, lost_in_resize, uses_activation_checkpointing
from lit_accel.methods.multilevel import Interpolation, coalesce, interpolate, level_map
from tests.models import make_model, relative_error, tokens
from tests.training import SIZE, TinyModule, loader, make_trainer

DOWN_AND_UP = [Phase(0, 1), Phase(1, 2), Phase(0)]


def small_and_back(model, width=2, depth=2):
    """Shrink a model, and grow the small one again, which has learned nothing."""
    step = level_map(anatomy_of(model), width=width, depth=depth)
    small = coalesce(model, step)
    return small, interpolate(model, small, step, Interpolation(coarse=1, fine=0))


def fit(tmp_path, module, method, **options):
    make_trainer(tmp_path, callbacks=[method], **{"max_steps": 4, **options}).fit(module, loader())


@pytest.mark.parametrize("name", ["llama", "gpt2-tied", "bert-mlm"])
def test_frozen_embeddings_pass_gradients_on_to_checkpointed_blocks(name, tmp_path):
    """Reentrant checkpoints of inputs without a gradient have none themselves: nothing but the head would learn."""
    module = TinyModule(name)
    module.net.gradient_checkpointing_enable({"use_reentrant": True})
    module.net.get_input_embeddings().weight.requires_grad_(False)
    module.net.enable_input_require_grads()
    small, grown = small_and_back(module.net)
    for model in (small, grown):
        ids = tokens(model)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        trained = [p for p in model.base_model.parameters() if p.requires_grad]
        assert len(trained) > 10
        assert sum(p.grad is None for p in trained) <= 1  # BERT's pooler is not called
    assert lost_in_resize(module.net, anatomy_of(module.net)) == []
    assert (
        not coalesce(make_model(name, **SIZE), level_map(anatomy_of(module.net))).get_input_embeddings()._forward_hooks
    )


def test_a_loss_function_of_ones_own(tmp_path):
    module, calls = TinyModule(), []

    def smoothed(logits, labels, vocab_size, **_):
        calls.append(module.net.config.n_layer)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)

    module.net.loss_function = smoothed
    module.loss = lambda ids: module.net(input_ids=ids, labels=ids).loss
    fit(tmp_path, module, MultiLevelTraining(phases=DOWN_AND_UP))
    assert [n for i, n in enumerate(calls) if n != calls[i - 1] or i == 0] == [4, 2, 4]
    assert len(calls) >= 4


def test_functions_that_were_put_onto_a_module_are_named():
    model = make_model("gpt2-tied", **SIZE)
    model.transformer.h[1].mlp.forward = lambda x: x
    model.mask_of = lambda ids: ids > 0
    assert lost_in_resize(model, anatomy_of(model)) == ["mask_of of the model", "forward of transformer.h.1.mlp"]


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen3"])
def test_buffers_that_were_rounded_stay_rounded(name):
    """Angles of rotary embeddings in bfloat16 are other angles; built anew they would be those of float32."""
    model = make_model(name, dtype=torch.bfloat16, **SIZE)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    small, grown = small_and_back(model)
    assert torch.equal(small.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    ids = tokens(model)
    assert torch.equal(grown.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    assert small.model.rotary_emb.inv_freq is not model.model.rotary_emb.inv_freq


@pytest.mark.parametrize("flags", [[True, False, True, False], [False, True, True, True]])
def test_blocks_that_are_checkpointed_in_part_are_refused(flags, tmp_path):
    module = TinyModule("llama")
    module.net.gradient_checkpointing_enable({"use_reentrant": False})
    assert uses_activation_checkpointing(module.net)
    for block, flag in zip(module.net.model.layers, flags, strict=True):
        block.gradient_checkpointing = flag
    with pytest.raises(AnatomyError, match=r"Some LlamaDecoderLayer .* others do not.*every_n_layers=1"):
        fit(tmp_path, module, MultiLevelTraining(phases=DOWN_AND_UP))
    assert module.losses == []


HEADS = {
    "GPT2ForTokenClassification": transformers.GPT2Config(
        n_embd=16, n_head=4, n_layer=4, vocab_size=64, n_positions=16, num_labels=3, pad_token_id=0
    ),
    "BertForQuestionAnswering": transformers.BertConfig(
        hidden_size=16, num_attention_heads=4, num_hidden_layers=4, intermediate_size=32, vocab_size=64
    ),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("phases", [[Phase(0, 1), Phase(1)], DOWN_AND_UP], ids=["ends small", "V-cycle"])
def test_a_model_around_the_transformer_is_saved_as_what_it_is(head, phases, tmp_path):
    """Its configuration is that of the transformer inside, whose depth changes."""
    module = TinyModule(net=getattr(transformers, head)(HEADS[head]))
    module.loss = lambda ids: next(iter(module.net(input_ids=ids).values())).square().mean()
    fit(tmp_path, module, MultiLevelTraining([Level(width=1, depth=2)], phases))
    model = module.net.eval()
    assert model.config is model.base_model.config
    assert model.config.num_hidden_layers == (4 if phases is DOWN_AND_UP else 2)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    ids = torch.arange(3, 15)[None]
    for one, other in zip(model(input_ids=ids).values(), again(input_ids=ids).values(), strict=True):
        assert relative_error(other, one) < 1e-6


@pytest.mark.parametrize("shape", [(4, 2, 12), (3, 12)])
def test_sequences_of_several_choices_are_that_many_sequences(shape):
    input_shape = anatomy_of(make_model("gpt2-base", **SIZE)).input_shape
    ids = torch.ones(shape, dtype=torch.long)
    expected = ids.numel() // 12, 12
    assert input_shape((), {"input_ids": ids}) == input_shape((ids,), {}) == expected
    assert input_shape((), {"inputs_embeds": torch.ones(*shape, 16)}) == expected
