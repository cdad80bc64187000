"""Another attention kernel for Hugging Face models, through the registry that transformers has for them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_accel.anatomy.base import AttentionKernel

_OWN: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def attend_with(model: nn.Module, kernel: AttentionKernel) -> Callable[[], None]:
    """Have a Hugging Face model attend with another kernel.

    Args:
        model: The model.
        kernel: The kernel.

    Returns:
        What gives the model its own attention back.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
            # A cache of fixed length that is being filled: what comes after the queries is still empty.
            key, value = (x[:, :, : query.shape[2]] for x in (key, value))
        if attention_mask is None and (ends := kwargs.get("cu_seq_lens_q")) is not None:
            # Kernels for packed sequences get their boundaries, and no mask.
            attention_mask = _within_sequences(ends, query.shape[2])
        out = kernel(query, key, value, attention_mask, scale=scaling, dropout=dropout, training=bool(module.training))
        return out.transpose(1, 2).contiguous(), None

    name = f"lit_accel_{kernel.name}"
    AttentionInterface.register(name, attend)
    # The masks of torch's own kernel: none at all where attention is causal and nothing is padded.
    AttentionMaskInterface.register(name, sdpa_mask)
    before = [(module, config) for module in model.modules() if (config := _config_of(module)) is not None]
    # Copies: other models may have been made from the same configuration.
    copies = {id(config): copy.copy(config) for _, config in before}
    for own in copies.values():
        own._attn_implementation = name
    for module, config in before:
        module.config = copies[id(config)]
    _OWN[model] = getattr(before[0][1], "_attn_implementation", None)

    def undo() -> None:
        _OWN.pop(model, None)
        for module, config in before:
            module.config = config

    return undo


def _within_sequences(boundaries: Tensor, num_tokens: int) -> Tensor:
    """Return which earlier tokens of its own sequence each token sees.

    Args:
        boundaries: Where each packed sequence begins, and where the last one ends; shape (sequences + 1,).
        num_tokens: Tokens of all of them.
    """
    places = torch.arange(num_tokens, device=boundaries.device)
    sequence = torch.searchsorted(boundaries.to(places.dtype), places, right=True)
    return (sequence[:, None] == sequence[None]).tril()[None, None]


def own_implementation(model: nn.Module, present: str | None) -> str | None:
    """Return the name of a model's own attention, whichever it attends by now.

    Args:
        model: The model.
        present: The name that its configuration has.
    """
    return _OWN.get(model, present)


def _config_of(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation") else None
