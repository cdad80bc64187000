"""Small models of every family, with values that hide no error: no norm at one, no bias at zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.vision import PADS_WINDOWS, VISION_ZOO, images, make_vision_module

transformers.logging.set_verbosity_error()

# (class, config overrides): heads, tied and untied, grouped and multi-query attention, per-head query norms.
ZOO: dict[str, tuple[str, dict]] = {
    "gpt2-tied": ("GPT2LMHeadModel", {}),
    "gpt2-untied": ("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    "gpt2-base": ("GPT2Model", {}),
    "gpt2-classifier": ("GPT2ForSequenceClassification", {"num_labels": 3}),
    "bert-mlm": ("BertForMaskedLM", {}),
    "bert-untied": ("BertForMaskedLM", {"tie_word_embeddings": False}),
    "bert-base": ("BertModel", {}),
    "bert-pretraining": ("BertForPreTraining", {}),
    "bert-classifier": ("BertForSequenceClassification", {"num_labels": 3}),
    "roberta-mlm": ("RobertaForMaskedLM", {}),
    "roberta-classifier": ("RobertaForSequenceClassification", {"num_labels": 3}),
    "llama": ("LlamaForCausalLM", {"kv_heads": 12}),
    "llama-gqa": ("LlamaForCausalLM", {"kv_heads": 6}),
    "llama-gqa-tied": ("LlamaForCausalLM", {"kv_heads": 6, "tie_word_embeddings": True}),
    "llama-mqa": ("LlamaForCausalLM", {"kv_heads": 1}),
    "llama-classifier": ("LlamaForSequenceClassification", {"kv_heads": 6, "num_labels": 3}),
    "mistral": ("MistralForCausalLM", {"kv_heads": 6, "sliding_window": 4}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"kv_heads": 6, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"kv_heads": 6, "head_dim": 6}),
}

ALL_MODELS = sorted([*ZOO, *VISION_ZOO])


def make_config(
    name: str, *, heads: int = 12, head_dim: int = 4, ffn: int = 96, blocks: int = 12, vocab: int = 53
) -> transformers.PretrainedConfig:
    """Return the config of a model of the zoo; 12 heads and blocks divide by 2, 3 and 4."""
    class_name, extra = ZOO[name]
    extra = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **extra}
    config_class = getattr(transformers, class_name).config_class
    if "gpt2" in name:
        return config_class(
            n_embd=heads * head_dim,
            n_head=heads,
            n_inner=ffn,
            n_layer=blocks,
            vocab_size=vocab,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **extra,
        )
    shape = {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "num_hidden_layers": blocks,
        "vocab_size": vocab,
        "max_position_embeddings": 32,
    }
    if "bert" in name:
        return config_class(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **extra)
    kv_heads = extra.pop("kv_heads")
    # Keep the ratio of query to key-value heads whatever the number of heads.
    kv_heads = max(1, heads * kv_heads // 12)
    return config_class(**shape, num_key_value_heads=kv_heads, **extra)


def make_model(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **size: int) -> nn.Module:
    """Build a model of the zoo in eval mode, every parameter away from its initial value."""
    if name == "swin-padded" and not PADS_WINDOWS:
        pytest.skip("this timm builds a SwinV2 only where windows fill the image")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name in VISION_ZOO:
            model = make_vision_module(name, **{"heads": 12, "head_dim": 4, "ffn": 96, "blocks": 12, **size})
        else:
            model = getattr(transformers, ZOO[name][0])(make_config(name, **size))
        model = model.to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(model: Any, batch: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    """Draw token ids for a model, none of them padding; images for a vision model."""
    if not hasattr(model, "config"):
        return images(model, batch, seed)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)


def outputs(model: Any, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return the floating-point outputs of a model: logits, or hidden states of a base model."""
    with torch.no_grad():
        if not hasattr(model, "config"):
            return [model(inputs)]
        result = model(input_ids=inputs)
    return [value for value in result.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()
