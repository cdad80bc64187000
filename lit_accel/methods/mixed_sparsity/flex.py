"""Patterns of attention by PyTorch's FlexAttention, which skips whole tiles of pairs; it trains on CUDA only."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

if TYPE_CHECKING:
    from lit_accel.methods.mixed_sparsity.attention import AttentionPattern


def flex(pattern: AttentionPattern, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attend by a pattern.

    Args:
        pattern: The pattern.
        query: Shape (batch, heads, tokens, head_dim).
        key: Shape (batch, kv_heads, tokens, head_dim).
        value: Like ``key``.
        scale: What scores are multiplied by; default is ``head_dim ** -0.5``.

    Returns:
        Shape (batch, heads, tokens, head_dim).
    """
    # Not compiled it computes every pair. On a CPU it has no backward pass, and serves to be checked.
    attend: Any = _compiled() if query.is_cuda else flex_attention
    out: Tensor = attend(
        query,
        key,
        value,
        block_mask=_block_mask(pattern, query.shape[2], query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@lru_cache(maxsize=16)
def _block_mask(pattern: AttentionPattern, num_tokens: int, device: torch.device) -> BlockMask:
    def allows(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return pattern.allows(i, j)

    # The first call may be one of validation, whose tensors the backward pass of a later one could not save.
    with torch.inference_mode(False):
        return create_block_mask(allows, None, None, num_tokens, num_tokens, device=device)
