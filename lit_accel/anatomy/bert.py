"""BERT of Hugging Face: post-norm blocks, separate projections, a masked-LM head tied to the embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_accel.anatomy.base import Anatomy, Attention, Size
from lit_accel.anatomy.hugging_face import HuggingFaceFamily
from lit_accel.anatomy.registry import register_anatomy

_HEADS = "heads*head_dim"


def _axes(config: Any) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "positions": config.max_position_embeddings,
        "token_types": config.type_vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "ffn": config.intermediate_size,
        "classes": config.num_labels,
    }


def _attention(config: Any, index: int) -> Attention:
    return Attention(heads=("heads",), head_dim="head_dim", causal=config.is_decoder)


def _resize(config: Any, size: Size) -> None:
    config.hidden_size = size.axes["embed"]
    config.num_attention_heads = size.axes["heads"]
    config.intermediate_size = size.axes["ffn"]
    (config.num_hidden_layers,) = size.depths


FAMILY = HuggingFaceFamily(
    name="bert",
    container="encoder.layer",
    block={
        **{f"attention.self.{name}.weight": f"{_HEADS}, in:embed" for name in ("query", "key", "value")},
        **{f"attention.self.{name}.bias": _HEADS for name in ("query", "key", "value")},
        "attention.output.dense.weight": f"embed, in:{_HEADS}",
        "attention.output.dense.bias": "embed",
        "attention.output.LayerNorm.weight": "embed",
        "attention.output.LayerNorm.bias": "embed",
        "intermediate.dense.weight": "ffn, in:embed",
        "intermediate.dense.bias": "ffn",
        "output.dense.weight": "embed, in:ffn",
        "output.dense.bias": "embed",
        "output.LayerNorm.weight": "embed",
        "output.LayerNorm.bias": "embed",
    },
    body={
        "embeddings.word_embeddings.weight": "vocab, embed",
        "embeddings.position_embeddings.weight": "positions, embed",
        "embeddings.token_type_embeddings.weight": "token_types, embed",
        "embeddings.LayerNorm.weight": "embed",
        "embeddings.LayerNorm.bias": "embed",
        "pooler.dense.weight": "embed, in:embed",
        "pooler.dense.bias": "embed",
    },
    heads={
        "cls.predictions.bias": "vocab",
        "cls.predictions.transform.dense.weight": "embed, in:embed",
        "cls.predictions.transform.dense.bias": "embed",
        "cls.predictions.transform.LayerNorm.weight": "embed",
        "cls.predictions.transform.LayerNorm.bias": "embed",
        "cls.predictions.decoder.weight": "vocab, in:embed",
        "cls.predictions.decoder.bias": "vocab",
        "cls.seq_relationship.weight": "2, in:embed",
        "cls.seq_relationship.bias": "2",
        "classifier.weight": "classes, in:embed",
        "classifier.bias": "classes",
    },
    fold=("cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias"),
    per_sequence=frozenset(
        {
            "pooler.dense.weight",
            "bert.pooler.dense.weight",
            "classifier.weight",
            "cls.seq_relationship.weight",
        }
    ),
    embedding="embeddings.word_embeddings.weight",
    residual="post_norm",
    branch_outputs=frozenset(
        {
            "attention.output.dense.weight",
            "attention.output.dense.bias",
            "output.dense.weight",
            "output.dense.bias",
        }
    ),
    # Embeddings have used the positions already. Where the model is given them, its blocks hand them on to kernels.
    token_dims={"hidden_states": (1,), "attention_mask": (-2, -1), "position_ids": (1,), "cache_position": (0,)},
    width_axes=(("embed",), ("heads",), ("ffn",)),
    attributes={"attention.self.num_attention_heads": "heads", "attention.self.all_head_size": "heads*head_dim"},
    axes=_axes,
    attention=_attention,
    resize=_resize,
)

_MODULE = "transformers.models.bert.modeling_bert"
_CLASSES = (
    "BertModel",
    "BertForMaskedLM",
    "BertLMHeadModel",
    "BertForPreTraining",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
)


@register_anatomy("bert", [f"{_MODULE}.{name}" for name in _CLASSES])
def describe(model: nn.Module) -> Anatomy:
    """Describe a BERT."""
    return FAMILY.describe(model)
