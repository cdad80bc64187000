"""LLaMA-like models of Hugging Face: grouped-query attention, rotary embedding, RMSNorm, SwiGLU.

Query heads are two axes, ``kv_heads * queries_per_kv``: query heads that share a key-value head stay together
when key-value heads are merged, and where these cannot be divided (one key-value head, say), the queries within
each group are merged instead. Rotary tables depend on ``head_dim`` alone, which never changes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_accel.anatomy.base import Anatomy, Attention, Size
from lit_accel.anatomy.hugging_face import HuggingFaceFamily, is_causal, resized_layer_types
from lit_accel.anatomy.registry import register_anatomy

_QUERIES = "kv_heads*queries_per_kv*head_dim"
_KEYS = "kv_heads*head_dim"


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _axes(config: Any) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "kv_heads": config.num_key_value_heads,
        "queries_per_kv": config.num_attention_heads // config.num_key_value_heads,
        "head_dim": _head_dim(config),
        "ffn": config.intermediate_size,
        "classes": config.num_labels,
    }


def _resize(config: Any, size: Size) -> None:
    # Written down first: where it is not, the classes derive it from the width that is about to change.
    config.head_dim = _head_dim(config)
    config.hidden_size = size.axes["embed"]
    config.num_key_value_heads = size.axes["kv_heads"]
    config.num_attention_heads = size.axes["kv_heads"] * size.axes["queries_per_kv"]
    config.intermediate_size = size.axes["ffn"]
    (num_blocks,) = size.depths
    if num_blocks != config.num_hidden_layers:
        resized_layer_types(config, num_blocks)
        config.num_hidden_layers = num_blocks


def _attention(config: Any, index: int) -> Attention:
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[index] != "sliding_attention":
        window = None
    return Attention(heads=("kv_heads", "queries_per_kv"), head_dim="head_dim", causal=is_causal(config), window=window)


_FAMILY = HuggingFaceFamily(
    name="llama",
    container="layers",
    block={
        "self_attn.q_proj.weight": f"{_QUERIES}, in:embed",
        "self_attn.q_proj.bias": _QUERIES,
        "self_attn.k_proj.weight": f"{_KEYS}, in:embed",
        "self_attn.k_proj.bias": _KEYS,
        "self_attn.v_proj.weight": f"{_KEYS}, in:embed",
        "self_attn.v_proj.bias": _KEYS,
        "self_attn.o_proj.weight": f"embed, in:{_QUERIES}",
        "self_attn.o_proj.bias": "embed",
        "self_attn.q_norm.weight": "head_dim",
        "self_attn.k_norm.weight": "head_dim",
        "mlp.gate_proj.weight": "ffn, in:embed",
        "mlp.gate_proj.bias": "ffn",
        "mlp.up_proj.weight": "ffn, in:embed",
        "mlp.up_proj.bias": "ffn",
        "mlp.down_proj.weight": "embed, in:ffn",
        "mlp.down_proj.bias": "embed",
        "input_layernorm.weight": "embed",
        "post_attention_layernorm.weight": "embed",
    },
    body={"embed_tokens.weight": "vocab, embed", "norm.weight": "embed"},
    heads={"lm_head.weight": "vocab, in:embed", "score.weight": "classes, in:embed"},
    fold=("model.norm.weight",),
    per_sequence=frozenset(),
    embedding="embed_tokens.weight",
    residual="pre_norm",
    branch_outputs=frozenset(
        {"self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias"}
    ),
    token_dims={
        "hidden_states": (1,),
        "attention_mask": (-2, -1),
        "position_ids": (1,),
        "position_embeddings": (1,),
        "cache_position": (0,),
    },
    width_axes=(("embed",), ("kv_heads", "queries_per_kv"), ("ffn",)),
    axes=_axes,
    attention=_attention,
    resize=_resize,
)

_CLASSES = [
    f"transformers.models.{package}.modeling_{package}.{prefix}{suffix}"
    for package, prefix in (
        ("llama", "Llama"),
        ("mistral", "Mistral"),
        ("qwen2", "Qwen2"),
        ("qwen3", "Qwen3"),
    )
    for suffix in ("Model", "ForCausalLM", "ForSequenceClassification")
]


@register_anatomy("llama", _CLASSES)
def describe(model: nn.Module) -> Anatomy:
    """Describe a LLaMA, Mistral, Qwen2 or Qwen3."""
    return _FAMILY.describe(model)
