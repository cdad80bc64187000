"""Attention for short sequences on a CPU.

At the study's sizes the backward pass of torch's fused attention is the slowest part of an optimizer step on a CPU, and
plain matrix products in the type of the queries are faster. All arms use the same function, so it changes how long the
study takes and not what is compared.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "short_sequences"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend to all tokens, or to those before in a causal model, without padding and dropout.

    Args:
        module: The attention layer; its ``is_causal`` is followed.
        query: Of shape (batch, heads, tokens, features), as are all others.
        key: Of the same shape.
        value: Of the same shape.
        attention_mask: Not used: nothing in the study is padded.
        scaling: Of the scores; default is one over the root of the features.
        dropout: Must be 0.
        **options: What else transformers passes.

    Returns:
        The outputs, of shape (batch, tokens, heads, features), and nothing in the place of weights.
    """
    if dropout:
        raise ValueError(f"dropout is {dropout}; this attention has none.")
    batch, heads, tokens, features = query.shape
    flat = [part.reshape(batch * heads, tokens, features) for part in (query, key, value)]
    # Autocast would make softmax's input and output fp32: twice the memory, and memory is what is short.
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.baddbmm(
            _bias(tokens, bool(getattr(module, "is_causal", False)), query.dtype),
            flat[0],
            flat[1].transpose(1, 2),
            alpha=scaling or features**-0.5,
        )
        outputs = torch.bmm(scores.softmax(-1), flat[2])
    return outputs.view(batch, heads, tokens, features).transpose(1, 2).contiguous(), None


@cache
def _bias(tokens: int, is_causal: bool, dtype: torch.dtype) -> Tensor:
    bias = torch.zeros(tokens, tokens, dtype=dtype)
    return bias.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf")) if is_causal else bias


# What imports the study's models needs it known to transformers by its name.
AttentionInterface.register(NAME, attend)
