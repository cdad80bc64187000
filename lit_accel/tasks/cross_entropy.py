"""Cross entropy over a vocabulary, a few rows at a time.

The logits of a language model are its largest tensor. Taken whole, cross entropy makes three or four copies of it in
32 bits, forward and backward; here each row is read where it is, worked on in a buffer that stays in the cache, and its
gradient written at once: the probabilities are at hand then, and the backward pass has only to scale them.

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
# Probabilities below 6e-8 are nothing in fp16, whose loss scale comes with the backward pass: they are kept times a
# power of two, which rounds nothing.
_KEPT_SCALES = {torch.float16: 2.0**10}


def cross_entropy_sum(logits_nv: Tensor, targets_n: Tensor, ignored: int) -> Tensor:
    """Sum the cross entropies of positions, computed in 32 bits whatever the logits have (64 if they do).

    Equal to :func:`torch.nn.functional.cross_entropy` of ``logits.float()`` with ``reduction="sum"``, but for rounding.
    The gradient is rounded to the precision of the logits twice: before it is scaled by that of the loss, and after.

    Args:
        logits_nv: Scores.
        targets_n: The right entry of each position.
        ignored: The target of positions that do not count.

    Returns:
        A scalar, 0 if no position counts.
    """
    return _CrossEntropySum.apply(logits_nv, targets_n, ignored)


def _pieces(values_nv: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few rows at a time in 32 bits, in a buffer that each piece overwrites."""
    num_rows, num_entries = values_nv.shape
    size = max(1, (_CPU_ENTRIES if values_nv.device.type == "cpu" else _DEVICE_ENTRIES) // num_entries)
    dtype = torch.promote_types(values_nv.dtype, torch.float32)
    buffer = torch.empty((min(size, num_rows), num_entries), dtype=dtype, device=values_nv.device)
    for begin in range(0, num_rows, size):
        rows = slice(begin, min(begin + size, num_rows))
        piece = buffer[: rows.stop - begin]
        yield rows, piece.copy_(values_nv[rows])


class _CrossEntropySum(Function):
    """Saves the gradient of each row's loss, as large as the logits, and which rows count."""

    @staticmethod
    def forward(ctx: Any, logits_nv: Tensor, targets_n: Tensor, ignored: int) -> Tensor:
        counts_n = targets_n != ignored
        entries_n1 = targets_n.where(counts_n, 0).unsqueeze(1)
        dtype = torch.promote_types(logits_nv.dtype, torch.float32)
        losses_n1 = torch.empty((len(logits_nv), 1), dtype=dtype, device=logits_nv.device)
        gradient_nv = torch.empty_like(logits_nv) if ctx.needs_input_grad[0] else None
        ctx.scale = _KEPT_SCALES.get(logits_nv.dtype, 1.0)
        for rows, piece in _pieces(logits_nv):
            right, largest = piece.gather(1, entries_n1[rows]), piece.amax(1, keepdim=True)
            probabilities = torch.softmax(piece, 1, out=piece)
            # That of the largest score is at least one in v, so that its logarithm is exact enough; that of the right
            # one may be too small for 32 bits.
            losses_n1[rows] = largest - probabilities.amax(1, keepdim=True).log_() - right
            if gradient_nv is not None:
                probabilities.scatter_add_(1, entries_n1[rows], piece.new_full((), -1).expand_as(entries_n1[rows]))
                gradient_nv[rows] = probabilities if ctx.scale == 1 else probabilities.mul_(ctx.scale)
        ctx.save_for_backward(gradient_nv, counts_n)
        return losses_n1.squeeze(1).where(counts_n, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        kept_nv, counts_n = ctx.saved_tensors
        factor_n1 = gradients[0] / ctx.scale * counts_n.unsqueeze(1)
        # In 32 bits: a rounded factor would put the whole gradient off by that. And in a new tensor: a graph may be
        # retained and gone through again.
        gradient_nv = torch.empty_like(kept_nv)
        for rows, piece in _pieces(kept_nv):
            gradient_nv[rows] = piece.mul_(factor_n1[rows].to(piece.dtype))
        return gradient_nv, None, None
