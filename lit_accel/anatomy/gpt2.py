"""GPT-2 of Hugging Face: pre-norm blocks, one fused projection for queries, keys and values, stored input first."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_accel.anatomy.base import Anatomy, AnatomyError, Attention, Size
from lit_accel.anatomy.hugging_face import HuggingFaceFamily, is_causal
from lit_accel.anatomy.registry import register_anatomy

_HEADS = "heads*head_dim"


def _axes(config: Any) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "positions": config.n_positions,
        "embed": config.n_embd,
        "heads": config.n_head,
        "head_dim": config.n_embd // config.n_head,
        "ffn": config.n_inner if config.n_inner is not None else 4 * config.n_embd,
        "classes": config.num_labels,
    }


def _attention(config: Any, index: int) -> Attention:
    return Attention(heads=("heads",), head_dim="head_dim", causal=is_causal(config))


def _resize(config: Any, size: Size) -> None:
    if config.scale_attn_by_inverse_layer_idx and size.depths != (config.n_layer,):
        raise AnatomyError(
            "This GPT-2 scales its attention by the index of the layer (scale_attn_by_inverse_layer_idx), which merged "
            "or repeated blocks cannot keep. Set it to false, or use depth factor 1."
        )
    config.n_embd, config.n_head = size.axes["embed"], size.axes["heads"]
    (config.n_layer,) = size.depths
    # Left unset where it stands for the usual ratio, so that the config of a grown model is the one it began with.
    if config.n_inner is not None or size.axes["ffn"] != 4 * config.n_embd:
        config.n_inner = size.axes["ffn"]


_FAMILY = HuggingFaceFamily(
    name="gpt2",
    container="h",
    block={
        "ln_1.weight": "embed",
        "ln_1.bias": "embed",
        "attn.c_attn.weight": f"in:embed, {_HEADS} + {_HEADS} + {_HEADS}",
        "attn.c_attn.bias": f"{_HEADS} + {_HEADS} + {_HEADS}",
        "attn.c_proj.weight": f"in:{_HEADS}, embed",
        "attn.c_proj.bias": "embed",
        "ln_2.weight": "embed",
        "ln_2.bias": "embed",
        "mlp.c_fc.weight": "in:embed, ffn",
        "mlp.c_fc.bias": "ffn",
        "mlp.c_proj.weight": "in:ffn, embed",
        "mlp.c_proj.bias": "embed",
    },
    body={
        "wte.weight": "vocab, embed",
        "wpe.weight": "positions, embed",
        "ln_f.weight": "embed",
        "ln_f.bias": "embed",
    },
    heads={
        "lm_head.weight": "vocab, in:embed",
        "score.weight": "classes, in:embed",
    },
    fold=("transformer.ln_f.weight", "transformer.ln_f.bias"),
    per_sequence=frozenset(),
    embedding="wte.weight",
    residual="pre_norm",
    branch_outputs=frozenset({"attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"}),
    # Older transformers 5 also pass cache_position on.
    token_dims={"hidden_states": (1,), "attention_mask": (-2, -1), "position_ids": (1,), "cache_position": (0,)},
    width_axes=(("embed",), ("heads",), ("ffn",)),
    attributes={"attn.num_heads": "heads", "attn.split_size": "heads*head_dim"},
    axes=_axes,
    attention=_attention,
    resize=_resize,
)

_MODULE = "transformers.models.gpt2.modeling_gpt2"


@register_anatomy(
    "gpt2",
    [f"{_MODULE}.{name}" for name in ("GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification")],
)
def describe(model: nn.Module) -> Anatomy:
    """Describe a GPT-2."""
    return _FAMILY.describe(model)
