"""Cross entropy over a vocabulary, a few rows at a time.

The logits of a language model are its largest tensor. Taken whole, cross entropy makes three or four copies of it in
32 bits, forward and backward; here each row is read where it is, worked on in a buffer that stays in the cache, and its
gradient written once.

Shapes: n positions, v vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Entries of the buffer: on a CPU it stays in the cache of a core, elsewhere it keeps the number of kernels small.
_CPU_ENTRIES, _DEVICE_ENTRIES = 2**18, 2**27


def cross_entropy_sum(logits_nv: Tensor, targets_n: Tensor, ignored: int) -> Tensor:
    """Sum the cross entropies of positions, computed in 32 bits whatever the logits have (64 if they do).

    Equal to :func:`torch.nn.functional.cross_entropy` of ``logits.float()`` with ``reduction="sum"``, but for rounding.

    Args:
        logits_nv: Scores.
        targets_n: The right entry of each position.
        ignored: The target of positions that do not count.

    Returns:
        A scalar, 0 if no position counts.
    """
    return _CrossEntropySum.apply(logits_nv, targets_n, ignored)


def _pieces(logits_nv: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few rows at a time in 32 bits, in a buffer that each piece overwrites."""
    num_rows, num_entries = logits_nv.shape
    size = max(1, (_CPU_ENTRIES if logits_nv.device.type == "cpu" else _DEVICE_ENTRIES) // num_entries)
    dtype = torch.promote_types(logits_nv.dtype, torch.float32)
    buffer = torch.empty((min(size, num_rows), num_entries), dtype=dtype, device=logits_nv.device)
    for begin in range(0, num_rows, size):
        rows = slice(begin, min(begin + size, num_rows))
        piece = buffer[: rows.stop - begin]
        yield rows, piece.copy_(logits_nv[rows])


class _CrossEntropySum(Function):
    """Saves the logits as they are and one number a row."""

    @staticmethod
    def forward(ctx: Any, logits_nv: Tensor, targets_n: Tensor, ignored: int) -> Tensor:
        counts_n = targets_n != ignored
        entries_n1 = targets_n.where(counts_n, 0).unsqueeze(1)
        dtype = torch.promote_types(logits_nv.dtype, torch.float32)
        normaliser_n1 = torch.empty((len(logits_nv), 1), dtype=dtype, device=logits_nv.device)
        losses_n1 = torch.empty_like(normaliser_n1)
        for rows, piece in _pieces(logits_nv):
            right = piece.gather(1, entries_n1[rows])
            largest = piece.amax(1, keepdim=True)
            normaliser_n1[rows] = piece.sub_(largest).exp_().sum(1, keepdim=True).log_().add_(largest)
            losses_n1[rows] = normaliser_n1[rows] - right
        ctx.save_for_backward(logits_nv, normaliser_n1, entries_n1, counts_n)
        return losses_n1.squeeze(1).where(counts_n, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits_nv, normaliser_n1, entries_n1, counts_n = ctx.saved_tensors
        factor_n1 = gradients[0] * counts_n.unsqueeze(1)
        gradient_nv = torch.empty_like(logits_nv)
        for rows, piece in _pieces(logits_nv):
            probabilities = piece.sub_(normaliser_n1[rows]).exp_()
            factor = factor_n1[rows].to(piece.dtype)
            probabilities.scatter_add_(1, entries_n1[rows], piece.new_full((), -1).expand_as(entries_n1[rows]))
            gradient_nv[rows] = probabilities.mul_(factor)
        return gradient_nv, None, None
