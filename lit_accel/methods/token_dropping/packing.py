"""Sequences that are packed into one: where each of them ends among the kept tokens.

Shapes: b batch, t tokens, k kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def numbers_of_kept(numbers: Tensor, kept_bk: Tensor) -> Tensor:
    """Number the kept tokens of each sequence; a new one begins where the old numbers do not go up by one.

    Args:
        numbers: Of all tokens, shape (b, t) or (1, t); or (t,) for places in a cache, which are no sequences.
        kept_bk: Indices of the kept tokens.
    """
    num_kept = kept_bk.shape[1]
    if numbers.ndim == 1:
        return torch.arange(num_kept, device=numbers.device, dtype=numbers.dtype)
    jumps = numbers.diff(prepend=numbers[:, :1] - 1) != 1
    sequence = jumps.cumsum(1).expand(len(kept_bk), -1).gather(1, kept_bk)
    position = torch.arange(num_kept, device=kept_bk.device).expand_as(kept_bk)
    is_first = sequence.diff(prepend=sequence[:, :1] - 1) != 0
    return (position - torch.where(is_first, position, 0).cummax(1).values).to(numbers.dtype)


def boundaries_of_kept(boundaries: Tensor, kept_k: Tensor) -> Tensor:
    """Return where packed sequences begin among the kept tokens; one that has lost all of them is empty.

    Args:
        boundaries: Where each begins among all tokens, and after them where the last one ends.
        kept_k: Indices of the kept tokens, in ascending order.
    """
    return torch.searchsorted(kept_k, boundaries.to(kept_k.dtype)).to(boundaries.dtype)
