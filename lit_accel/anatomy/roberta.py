"""RoBERTa of Hugging Face: BERT's blocks and embeddings with heads of other names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from lit_accel.anatomy.base import Anatomy
from lit_accel.anatomy.bert import FAMILY
from lit_accel.anatomy.registry import register_anatomy

_FAMILY = replace(
    FAMILY,
    name="roberta",
    heads={
        "lm_head.bias": "vocab",
        "lm_head.dense.weight": "embed, in:embed",
        "lm_head.dense.bias": "embed",
        "lm_head.layer_norm.weight": "embed",
        "lm_head.layer_norm.bias": "embed",
        "lm_head.decoder.weight": "vocab, in:embed",
        "lm_head.decoder.bias": "vocab",
        "classifier.dense.weight": "embed, in:embed",
        "classifier.dense.bias": "embed",
        "classifier.out_proj.weight": "classes, in:embed",
        "classifier.out_proj.bias": "classes",
    },
    fold=("lm_head.layer_norm.weight", "lm_head.layer_norm.bias"),
    per_sequence=frozenset(
        {
            "pooler.dense.weight",
            "roberta.pooler.dense.weight",
            "classifier.dense.weight",
            "classifier.out_proj.weight",
        }
    ),
)

_MODULE = "transformers.models.roberta.modeling_roberta"


@register_anatomy(
    "roberta",
    [
        f"{_MODULE}.{name}"
        for name in ("RobertaModel", "RobertaForMaskedLM", "RobertaForCausalLM", "RobertaForSequenceClassification")
    ],
)
def describe(model: nn.Module) -> Anatomy:
    """Describe a RoBERTa."""
    config: Any = model.config
    # Tokens are numbered from the one after that of padding.
    return replace(_FAMILY.describe(model), num_reserved_positions=config.pad_token_id + 1)
