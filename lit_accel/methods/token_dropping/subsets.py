"""Random subsets of tokens: drawing them, taking them out of a sequence, and putting them back.

Shapes: b batch, t tokens, k kept tokens, d features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def sample_tokens(
    num_sequences: int, num_tokens: int, num_kept: int, *, generator: torch.Generator, num_prefix: int = 0
) -> Tensor:
    """Draw tokens of each sequence, every subset being as likely as any other (arXiv 2211.11586, section 3).

    Args:
        num_sequences: b, each of which gets a draw of its own.
        num_tokens: t.
        num_kept: k, from 1 to t.
        generator: Source of the draw; the result lies on its device.
        num_prefix: The first tokens, which are always drawn; at most k.

    Returns:
        Indices in ascending order, so that causal attention stays causal; shape (b, k), int64.
    """
    # Whatever the default dtype: sixteen bits would tie so often that the draw is no longer uniform. A tie still makes
    # no duplicate.
    noise = torch.rand(num_sequences, num_tokens, generator=generator, device=generator.device, dtype=torch.float32)
    noise[:, :num_prefix] = 2.0
    return noise.topk(num_kept, sorted=False).indices.sort().values


def take(x_btd: Tensor, kept_bk: Tensor) -> tuple[Tensor, Tensor]:
    """Take tokens out of sequences.

    Args:
        x_btd: Hidden states.
        kept_bk: Indices of tokens of each sequence.

    Returns:
        The tokens, shape (b, k, d), and what :func:`put` is to put them back into. The latter must go nowhere else:
        its gradient at the tokens taken is replaced by that of the tokens.
    """
    return _Take.apply(x_btd, kept_bk)


def put(rest_btd: Tensor, y_bkd: Tensor, kept_bk: Tensor) -> Tensor:
    """Put tokens back where they were taken from; the others pass unchanged, and so do their gradients.

    Args:
        rest_btd: What :func:`take` returned.
        y_bkd: The new tokens.
        kept_bk: Where they belong.

    Returns:
        Hidden states, shape (b, t, d), in the wider of the two dtypes.
    """
    dtype = torch.promote_types(rest_btd.dtype, y_bkd.dtype)
    return _Put.apply(rest_btd.to(dtype), y_bkd.to(dtype), kept_bk)


def _rows(kept_bk: Tensor, num_tokens: int) -> Tensor:
    # index_select and index_copy over rows are several times faster than gather and scatter over single numbers.
    first = torch.arange(len(kept_bk), device=kept_bk.device).unsqueeze(1) * num_tokens
    return (kept_bk + first).flatten()


def _select(x_btd: Tensor, kept_bk: Tensor) -> Tensor:
    rows = x_btd.flatten(0, 1).index_select(0, _rows(kept_bk, x_btd.shape[1]))
    return rows.view(*kept_bk.shape, x_btd.shape[2])


def _replace(x_btd: Tensor, y_bkd: Tensor, kept_bk: Tensor) -> Tensor:
    rows = _rows(kept_bk, x_btd.shape[1])
    return x_btd.flatten(0, 1).index_copy(0, rows, y_bkd.flatten(0, 1)).view_as(x_btd)


class _Take(Function):
    """Saves the indices and nothing else.

    As two functions whose gradients autograd would add, taking and putting would fill and add three tensors of the
    whole size in the backward pass; here it is one.
    """

    @staticmethod
    def forward(x_btd: Tensor, kept_bk: Tensor) -> tuple[Tensor, Tensor]:
        return _select(x_btd, kept_bk), x_btd.view_as(x_btd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (kept_bk,) = ctx.saved_tensors
        taken_bkd, rest_btd = gradients
        # What the rest has at these rows was overwritten by put, and never left it.
        return _replace(rest_btd, taken_bkd, kept_bk), None


class _Put(Function):
    """The counterpart of :class:`_Take`: the gradient of the rest is passed on whole, for it to replace its rows."""

    @staticmethod
    def forward(rest_btd: Tensor, y_bkd: Tensor, kept_bk: Tensor) -> Tensor:
        return _replace(rest_btd, y_bkd, kept_bk)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (kept_bk,) = ctx.saved_tensors
        (gradient_btd,) = gradients
        return gradient_btd, _select(gradient_btd, kept_bk), None
