"""Hybrid sparse attention: the causal patterns of Sparse Transformers (arXiv 1904.10509), each as its definition, an
explicit mask, and as a formulation that computes little more than the pairs it needs.

Legend: b batch, h heads, t tokens, k head_dim, c chunks of ``window`` tokens, w window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

PatternName = Literal["window", "strided", "fixed", "union"]
PATTERNS: tuple[PatternName, ...] = get_args(PatternName)


@dataclass(frozen=True)
class AttentionPattern:
    """A sparse causal attention pattern, and an attention kernel that follows it.

    Query i sees the keys j <= i for which

    - ``"window"``: ``i - j < window``;
    - ``"strided"``: ``i - j`` is a multiple of ``window``;
    - ``"union"``: one of these two holds;
    - ``"fixed"``: j is in the same chunk of ``window`` tokens, or is the last of an earlier chunk.

    Args:
        kind: Which.
        window: The window, stride or length of a chunk, in tokens.
        in_evaluation: Whether it is followed in evaluation mode too.
    """

    kind: PatternName
    window: int
    in_evaluation: bool = True

    @property
    def name(self) -> str:
        """A name for this kernel."""
        return f"{self.kind}_{self.window}" + ("" if self.in_evaluation else "_in_training")

    def pairs(self, num_tokens: int) -> int:
        """Count the pairs of a query and a key in one head over one sequence.

        Args:
            num_tokens: Tokens of the sequence.
        """
        window = min(self.window, num_tokens)
        chunks, rest = divmod(num_tokens, self.window)
        # For each token, the number of whole windows before it.
        older = self.window * chunks * (chunks - 1) // 2 + rest * chunks
        if self.kind == "strided":
            return num_tokens + older
        if self.kind == "fixed":
            return chunks * self.window * (self.window + 1) // 2 + rest * (rest + 1) // 2 + older
        local = window * (window + 1) // 2 + (num_tokens - window) * window
        return local if self.kind == "window" else local + older

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        """Return whether queries i see keys j, both by their place in the sequence."""
        distance = i - j
        local, strided = distance < self.window, distance % self.window == 0
        if self.kind == "fixed":
            allowed = (i // self.window == j // self.window) | (j % self.window == self.window - 1)
        else:
            allowed = {"window": local, "strided": strided, "union": local | strided}[self.kind]
        return allowed & (distance >= 0)

    def mask(self, num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
        """Return which keys each query sees, shape (queries, keys); the last keys are those of the queries."""
        i = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        return self.allows(i, torch.arange(num_keys, device=device)[None])

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        training: bool = True,
    ) -> Tensor:
        """Attend; see :class:`~lit_accel.anatomy.AttentionKernel`.

        Where something is masked besides, or there are more keys than queries, by the explicit mask: exact, and slower
        than dense attention.
        """
        num_queries, num_keys = query.shape[2], key.shape[2]
        follows = training or self.in_evaluation
        if query.is_cuda and follows and mask is None and num_queries == num_keys and not dropout:
            # Where it is used, and not before: it brings the compiler with it.
            from lit_accel.methods.mixed_sparsity.flex import flex

            return flex(self, query, key, value, scale)
        if key.shape[1] != query.shape[1]:
            num_repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(num_repeats, dim=1) for x in (key, value))
        if mask is not None or num_queries != num_keys:
            if follows:
                allowed = (
                    self.mask(num_queries, num_keys, query.device)
                    if mask is None or num_queries == num_keys
                    # Of a cache of fixed length the last keys may still be empty.
                    else self.allows(_places(mask), torch.arange(num_keys, device=query.device))
                )
                mask = allowed if mask is None else _both(allowed, mask)
            elif mask is None:
                mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
                mask = mask.tril(num_keys - num_queries)
            return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
        if not follows or self.pairs(num_keys) == num_keys * (num_keys + 1) // 2:
            return F.scaled_dot_product_attention(query, key, value, None, dropout, is_causal=True, scale=scale)
        # Padded to whole windows at the end, where no earlier token sees it.
        padding = -num_keys % self.window
        if padding:
            query, key, value = (F.pad(x, (0, 0, 0, padding)) for x in (query, key, value))
        attend = {"window": _window, "strided": _strided, "fixed": _fixed, "union": _union}[self.kind]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return attend(query, key, value, self.window, scale, dropout)[:, :, :num_keys]


def _places(mask: Tensor) -> Tensor:
    """Return where each query is: at the last key that it may see, itself. Shape (..., queries, 1)."""
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return (allowed * torch.arange(mask.shape[-1], device=mask.device)).amax(-1, keepdim=True)


def _both(allowed: Tensor, mask: Tensor) -> Tensor:
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def _chunks(x_bhtk: Tensor, window: int) -> Tensor:
    """Return chunks of tokens: shape (b * h, c, w, k)."""
    return x_bhtk.flatten(0, 1).unflatten(1, (-1, window))


def _whole(x: Tensor, like_bhtk: Tensor) -> Tensor:
    """Undo :func:`_chunks`."""
    return x.flatten(1, 2).view(like_bhtk.shape)


def _spans(x_bhtk: Tensor, chunk: int, window: int) -> Tensor:
    """Return each chunk after the window before it: shape (b * h, chunks, window + chunk, k)."""
    # Copied piece by piece: the backward pass of overlapping views is slow.
    num_before = window // chunk
    padded = F.pad(_chunks(x_bhtk, chunk), (0, 0, 0, 0, num_before, 0))
    num_chunks = padded.shape[1] - num_before
    return torch.cat([padded[:, first : first + num_chunks] for first in range(num_before + 1)], dim=2)


def _span_mask(num_chunks: int, chunk: int, window: int, device: torch.device) -> Tensor:
    """Return which keys of its span each query sees: shape (chunks, chunk, window + chunk)."""
    i = torch.arange(chunk, device=device)[:, None] + window
    j = torch.arange(window + chunk, device=device)[None]
    # Before the first token there is nothing.
    exists = torch.arange(num_chunks, device=device)[:, None, None] * chunk + j >= window
    return exists & (i >= j) & (i - j < window)


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(3, dtype=torch.promote_types(scores.dtype, torch.float32))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    """Attend within each chunk to the keys that were gathered for it, of which the mask hides some."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    # The fused kernel of CPUs gains little on so few keys: by plain products it is 1.1 to 2 times faster.
    scores = (q * scale) @ k.transpose(2, 3) + _as_bias(mask, q.dtype)
    return F.dropout(_softmax(scores).to(v.dtype), dropout) @ v


def _window(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, dropout: float) -> Tensor:
    # Shorter chunks compute fewer pairs in vain, which pays where products are slow.
    chunk = window // 2 if query.dtype == torch.float32 and window % 2 == 0 else window
    q, k, v = _chunks(query, chunk), _spans(key, chunk, window), _spans(value, chunk, window)
    return _whole(_attend(q, k, v, _span_mask(q.shape[1], chunk, window, q.device), scale, dropout), query)


def _strided(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, dropout: float) -> Tensor:
    # Tokens that are whole windows apart make sequences of their own.
    q, k, v = (_chunks(x, window).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale)
    return _whole(out.transpose(1, 2), query)


def _fixed(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, dropout: float) -> Tensor:
    q, k, v = (_chunks(x, window) for x in (query, key, value))
    num_chunks = q.shape[1]

    def with_summaries(x: Tensor) -> Tensor:
        last = x[:, :, -1]
        return torch.cat([last[:, None].expand(-1, num_chunks, -1, -1), x], dim=2)

    chunk = torch.arange(num_chunks, device=q.device)
    earlier = (chunk[None] < chunk[:, None])[:, None].expand(-1, window, -1)
    own = torch.ones(window, window, dtype=torch.bool, device=q.device).tril().expand(num_chunks, -1, -1)
    mask = torch.cat([earlier, own], dim=2)
    return _whole(_attend(q, with_summaries(k), with_summaries(v), mask, scale, dropout), query)


def _union(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, dropout: float) -> Tensor:
    # Each query has strided keys of its own, so that no fused kernel fits: one softmax over both kinds of scores.
    q, k, v = (_chunks(x, window) for x in (query, key, value))
    num_chunks = q.shape[1]
    mask = _span_mask(num_chunks, window, window, q.device)
    q = q * scale
    local = q @ _spans(key, window, window).transpose(2, 3) + _as_bias(mask, q.dtype)
    classes = [x.transpose(1, 2) for x in (q, k, v)]
    chunk = torch.arange(num_chunks, device=q.device)
    older = (chunk[None] < chunk[:, None])[None, None]
    strided = (classes[0] @ classes[1].transpose(2, 3) + _as_bias(older, q.dtype)).transpose(1, 2)
    weights = F.dropout(_softmax(torch.cat([local, strided], dim=3)).to(value.dtype), dropout)
    near, far = weights.split([2 * window, num_chunks], dim=3)
    out = near @ _spans(value, window, window) + (far.transpose(1, 2) @ classes[2]).transpose(1, 2)
    return _whole(out, query)
