"""What a block is called with when it runs on some of its tokens: every argument restricted to the same tokens.

Shapes: b batch, t tokens, k kept tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lit_accel.anatomy import Block
from lit_accel.methods.token_dropping.packing import boundaries_of_kept, numbers_of_kept
from lit_accel.routing import BlockCall


class UnroutableArgumentError(ValueError):
    """An argument of a block that cannot be restricted to some of the tokens."""


def restrict(call: BlockCall, block: Block, hidden_states: Tensor, kept_bk: Tensor, num_tokens: int) -> BlockCall:
    """Return the call of a block with some of its tokens only.

    Args:
        call: The call with all of them.
        block: What is known of the block.
        hidden_states: The kept tokens.
        kept_bk: Their indices, in ascending order.
        num_tokens: t.

    Returns:
        The call with each argument restricted along the token axes that the anatomy names. Masks and rotary tables that
        are shared by the batch become one a sequence; what is ``None`` stays so, and causal attention without a mask
        keeps its fused kernel. Numbers of tokens are given anew, from 0 within each packed sequence, and so is where
        packed sequences begin.

    Raises:
        UnroutableArgumentError: If an argument that is not known has as many entries as there are tokens, or a known
            one has another form than expected.
    """
    names = _parameter_names(type(call.module).forward)
    # Hidden states come first, whatever a block calls them.
    named = {
        names[position] if position < len(names) else f"argument {position}": value
        for position, value in enumerate(call.args)
        if position
    }
    given = {**named, **call.kwargs}
    _require_windowed_mask(given, block, num_tokens)

    def restricted(name: str, value: Any) -> Any:
        if name == call.input_name:
            return hidden_states
        if name in block.numbering:
            return None if value is None else numbers_of_kept(value, kept_bk)
        if name in block.token_dims:
            dims = block.token_dims[name]
            if block.flat_masks_are_of_tokens and len(dims) == 2 and isinstance(value, Tensor) and value.ndim == 2:
                dims = (1,)
            return _restrict(name, value, dims, kept_bk, num_tokens)
        if name in block.packing:
            return _packed(name, block.packing, given, kept_bk)
        for tensor in _tensors(value):
            if num_tokens in tensor.shape:
                raise UnroutableArgumentError(
                    f"{type(call.module).__name__} was called with {name!r} of shape {tuple(tensor.shape)}, which has "
                    f"as many entries as there are tokens ({num_tokens}), and nothing is known about it. Known are "
                    f"{', '.join(block.token_dims)}. Leave it out, or name it in token_dims of the anatomy's blocks "
                    "(lit_accel.anatomy.register_anatomy)."
                )
        return value

    return replace(
        call,
        args=(hidden_states, *(restricted(name, value) for name, value in named.items())) if call.args else (),
        kwargs={name: restricted(name, value) for name, value in call.kwargs.items()},
    )


@cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


def _restrict(name: str, value: Any, dims: tuple[int, ...], kept_bk: Tensor, num_tokens: int) -> Any:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return type(value)(_restrict(name, entry, dims, kept_bk, num_tokens) for entry in value)
    if not isinstance(value, Tensor):
        raise UnroutableArgumentError(
            f"{name!r} is a {type(value).__name__}, of which no part can be taken. Use an attention that is given a "
            'tensor or nothing, such as attn_implementation="sdpa".'
        )
    shape = tuple(value.shape)
    if value.ndim == 2 and len(dims) == 2:
        value, dims = _with_batch(name, value, len(kept_bk), num_tokens)
    if value.ndim == 3 and len(dims) == 2:
        # Attention broadcasts such a mask over sequences: its first dimension is that of the heads.
        value = value.unsqueeze(0)
    for dim in dims:
        if value.shape[dim] not in (1, num_tokens):
            raise UnroutableArgumentError(
                f"{name!r} has the shape {shape}, whose dimension {dim} has neither one entry nor one for each of the "
                f"{num_tokens} tokens."
            )
        if value.shape[dim] == num_tokens:
            value = _select(name, value, dim % value.ndim, kept_bk)
    return value


def _with_batch(name: str, mask: Tensor, num_sequences: int, num_tokens: int) -> tuple[Tensor, tuple[int, ...]]:
    """Tell a mask of tokens (b, t) from a mask of pairs (t, t), which gets dimensions for batch and heads."""
    if mask.shape[0] == 1 and num_sequences > 1:
        return mask[None, None], (-2, -1)
    if mask.shape[0] != num_tokens:
        return mask, (1,)
    if num_sequences == num_tokens:
        raise UnroutableArgumentError(
            f"{name!r} has the shape {tuple(mask.shape)}, and there are as many sequences as tokens: whether it is a "
            "mask of tokens or of pairs cannot be seen. Give it four dimensions."
        )
    return mask[None, None], (-2, -1)


def _select(name: str, value: Tensor, dim: int, kept_bk: Tensor) -> Tensor:
    if value.shape[0] not in (1, len(kept_bk)):
        raise UnroutableArgumentError(
            f"{name!r} has {value.shape[0]} entries in its first dimension, and there are {len(kept_bk)} sequences."
        )
    batch = torch.arange(len(kept_bk), device=kept_bk.device).unsqueeze(1)
    of_each = value.expand(len(kept_bk), *value.shape[1:]).movedim(dim, 1)
    return of_each[batch, kept_bk].movedim(1, dim)


def _packed(name: str, packing: Mapping[str, str], given: dict[str, Any], kept_bk: Tensor) -> Any:
    """Return where packed sequences begin among the kept tokens, or how long the longest of them is."""
    value, of = given[name], packing[name]
    if value is None:
        return None
    if len(kept_bk) > 1:
        raise UnroutableArgumentError(
            f"{name!r} says how sequences are packed into one, and this batch has {len(kept_bk)} of them, each with "
            "kept tokens of its own. Pack all of a batch into one, as DataCollatorWithFlattening does; or leave "
            f"{', '.join(packing)} out and give position_ids."
        )
    if not isinstance(given.get(of), Tensor):
        raise UnroutableArgumentError(
            f"{name!r} is given and {of!r} is no tensor, so nobody can say how long packed sequences are among the "
            "kept tokens. Give both, or none of them."
        )
    boundaries = boundaries_of_kept(given[of], kept_bk[0])
    if name == of:
        return boundaries
    longest = boundaries.diff().max()
    # Kernels want the form that they were given.
    return longest if isinstance(value, Tensor) else int(longest)


def _require_windowed_mask(given: dict[str, Any], block: Block, num_tokens: int) -> None:
    window = block.attention.window
    if window is None or window >= num_tokens:
        return
    _, *others = block.token_dims
    if not any(isinstance(given.get(name), Tensor) and given[name].ndim > 2 for name in others):
        raise UnroutableArgumentError(
            f"Attention sees {window} of {num_tokens} tokens back, and no mask says so: its kernel counts by itself, "
            'and among the kept tokens it would count wrongly. Use attn_implementation="sdpa" or "eager", which are '
            "given a mask."
        )
