"""What a model's forward and backward pass cost, in closed form from its anatomy.

The convention, everywhere in lit-accel:

- One multiply-add is 2 FLOPs.
- Counted: every matrix product with a parameter, tied heads included, and attention scores and values.
- Not counted: embedding look-ups, norms, softmax, activations, positional encodings and the optimizer.
- Backward costs twice the forward: one product for the gradient of the input, one for that of the weight. Only the
  latter where the input is data, such as the patches of an image.
  Activation checkpointing repeats the forward pass of the blocks once. (PyTorch leaves the repetition early, once it
  has all that it needs: where a block ends in a projection and an addition, it spares that projection.)

Counts are Python integers: exact, and without an upper limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lit_accel.anatomy import Anatomy, Attention

CountedPairs = Literal["exact", "full"]
"""Which pairs of tokens attention is charged for: those that the mask allows, or the full square."""


@dataclass(frozen=True)
class Flops:
    """The FLOPs of one pass, by where they are spent.

    Args:
        blocks: FLOPs of each residual block, in order.
        outside_blocks: FLOPs of the projections of embeddings, poolers and heads.
    """

    blocks: tuple[int, ...]
    outside_blocks: int

    @property
    def total(self) -> int:
        """FLOPs of the whole model."""
        return sum(self.blocks) + self.outside_blocks


def attention_pairs(attention: Attention, num_tokens: int, counted: CountedPairs = "exact") -> int:
    """Count the pairs of a query and a key in one head over one sequence.

    Args:
        attention: The attention, with its mask's form.
        num_tokens: Tokens of the sequence.
        counted: ``"exact"`` counts the pairs that the mask allows: T(T+1)/2 for a causal one, fewer with a sliding
            window. ``"full"`` counts all T² of them, which is what a kernel that masks after the product spends
            and what most published FLOPs contain. Where tokens attend within tiles, both are all pairs of each tile.
    """
    if attention.tile is not None:
        return num_tokens * attention.tile
    if counted == "full":
        return num_tokens**2
    window = num_tokens if attention.window is None else min(attention.window, num_tokens)
    # The first `window` tokens see 1, 2, ..., window tokens; each later one sees `window`.
    backward_pairs = window * (window + 1) // 2 + (num_tokens - window) * window
    if attention.causal:
        return backward_pairs
    # The same forwards; a token and itself is one pair, not two.
    return 2 * backward_pairs - num_tokens


def kept_pairs(attention: Attention, num_tokens: int, num_kept: int, counted: CountedPairs = "exact") -> int:
    """Count the pairs of a query and a key in one head among some tokens of a sequence.

    Each token attends to itself; of the other pairs a random subset holds k(k-1) / T(T-1). That is a whole number but
    for sliding windows, whose expectation is rounded. Where tokens attend within tiles, whole tiles are kept.

    Args:
        attention: The attention, with its mask's form.
        num_tokens: Tokens of the sequence.
        num_kept: How many of them are there.
        counted: See :func:`attention_pairs`.
    """
    if attention.tile is not None or num_kept == num_tokens:
        return attention_pairs(attention, num_kept, counted)
    others = attention_pairs(attention, num_tokens, counted) - num_tokens
    all_pairs = num_tokens * (num_tokens - 1)
    return num_kept + (2 * others * num_kept * (num_kept - 1) + all_pairs) // (2 * all_pairs)


def forward_flops(
    anatomy: Anatomy,
    num_sequences: int,
    num_tokens: int,
    *,
    attention: CountedPairs = "exact",
    kept: Mapping[int, int] | None = None,
) -> Flops:
    """Count the FLOPs of a forward pass.

    Args:
        anatomy: The model.
        num_sequences: Sequences in the batch.
        num_tokens: Tokens of each sequence, padding included: the model computes on it like on any other token.
        attention: See :func:`attention_pairs`.
        kept: How many tokens of a sequence a block runs on, by its index; blocks that are not named run on all.

    Returns:
        The FLOPs of each block and of what is outside of the blocks.
    """
    return _count(anatomy, num_sequences, num_tokens, attention, kept or {})[0]


def _count(
    anatomy: Anatomy, num_sequences: int, num_tokens: int, counted: CountedPairs, kept: Mapping[int, int]
) -> tuple[Flops, Flops]:
    """Return the forward FLOPs, and those among them of matrices whose input needs no gradient."""
    axes = anatomy.size.axes
    rows = {place: count(num_sequences, num_tokens) for place, count in anatomy.places.items()}
    token_places = [{block.place, block.attention.place} for block in anatomy.blocks]
    blocks, data_blocks = [0] * len(anatomy.blocks), [0] * len(anatomy.blocks)
    outside, data_outside = 0, 0
    for name in anatomy.tied_heads:
        outside += 2 * rows["token"] * anatomy.parameters[name].numel(axes)
    for layout in anatomy.parameters.values():
        if not layout.is_matrix:
            continue
        num_rows = rows[layout.place]
        if layout.block is not None and layout.block in kept and layout.place in token_places[layout.block]:
            num_rows = num_sequences * kept[layout.block]
        flops = 2 * num_rows * layout.numel(axes)
        of_data = flops if layout.reads_data else 0
        if layout.block is None:
            outside += flops
            data_outside += of_data
        else:
            blocks[layout.block] += flops
            data_blocks[layout.block] += of_data
    for index, block in enumerate(anatomy.blocks):
        width = math.prod(axes[axis] for axis in block.attention.heads) * axes[block.attention.head_dim]
        num_attending = anatomy.places[block.attention.place](1, num_tokens)
        pairs = kept_pairs(block.attention, num_attending, kept.get(index, num_attending), counted)
        # Scores and values: two products of the same size.
        blocks[index] += 2 * 2 * num_sequences * width * pairs
    return Flops(tuple(blocks), outside), Flops(tuple(data_blocks), data_outside)


def training_flops(
    anatomy: Anatomy,
    num_sequences: int,
    num_tokens: int,
    *,
    attention: CountedPairs = "exact",
    activation_checkpointing: bool = False,
    kept: Mapping[int, int] | None = None,
) -> Flops:
    """Count the FLOPs of a forward and a backward pass, every parameter being trained.

    Args:
        anatomy: The model.
        num_sequences: Sequences in the batch.
        num_tokens: Tokens of each sequence, padding included.
        attention: See :func:`attention_pairs`.
        activation_checkpointing: Whether the blocks compute their forward pass once more in the backward pass.
        kept: See :func:`forward_flops`.

    Returns:
        The FLOPs of each block and of what is outside of the blocks.
    """
    forward, of_data = _count(anatomy, num_sequences, num_tokens, attention, kept or {})
    block_passes = 4 if activation_checkpointing else 3
    return Flops(
        tuple(block_passes * all_ - data for all_, data in zip(forward.blocks, of_data.blocks, strict=True)),
        3 * forward.outside_blocks - of_data.outside_blocks,
    )
