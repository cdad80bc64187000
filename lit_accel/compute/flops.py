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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lit_accel.anatomy import Anatomy, Attention
from lit_accel.compute.active import Active

CountedPairs = Literal["exact", "full"]
"""Which pairs of tokens attention is charged for: those that the mask allows, or the full square."""


@dataclass(frozen=True)
class Flops:
    """The FLOPs of one pass, by where they are spent.

    Args:
        blocks: FLOPs of each residual block, in order.
        outside_blocks: FLOPs of the projections of embeddings, poolers and heads.
        head: Those among them of the model's head, its projection to the vocabulary or the classes.
    """

    blocks: tuple[int, ...]
    outside_blocks: int
    head: int = 0

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
    active: Active | None = None,
) -> Flops:
    """Count the FLOPs of a forward pass.

    Args:
        anatomy: The model.
        num_sequences: Sequences in the batch.
        num_tokens: Tokens of each sequence, padding included: the model computes on it like on any other token.
        attention: See :func:`attention_pairs`.
        kept: How many tokens of a sequence a block runs on, by its index; blocks that are not named run on all.
        active: What of the model takes part; default: all of it.

    Returns:
        The FLOPs of each block and of what is outside of the blocks.
    """
    return _count(anatomy, num_sequences, num_tokens, attention, kept or {}, active or Active())[0]


def head_matrices(anatomy: Anatomy) -> list[str]:
    """Return the matrices of a model's head, which make logits: tables that are tied to it, and those that are not.

    Args:
        anatomy: The model.
    """
    heads = [
        name
        for name, layout in anatomy.parameters.items()
        if layout.block is None and layout.is_matrix and {"vocab", "classes"} & layout.dims[0].names
    ]
    return [*anatomy.tied_heads, *heads]


def _count(
    anatomy: Anatomy,
    num_sequences: int,
    num_tokens: int,
    counted: CountedPairs,
    kept: Mapping[int, int],
    active: Active,
) -> tuple[Flops, Flops, Flops]:
    """Return the forward FLOPs; among them those of matrices whose input needs no gradient; what entries that are off
    would cost.
    """
    axes = anatomy.size.axes
    rows = {place: count(num_sequences, num_tokens) for place, count in anatomy.places.items()}
    spent, of_data, absent = (_Counter(len(anatomy.blocks)) for _ in range(3))
    heads = set(head_matrices(anatomy))
    for name, layout in anatomy.parameters.items():
        if not (layout.is_matrix or name in anatomy.tied_heads):
            continue
        num_rows = rows[layout.place]
        if (
            layout.block is not None
            and layout.block in kept
            and layout.place in anatomy.blocks[layout.block].token_places
        ):
            num_rows = num_sequences * kept[layout.block]
        numel = layout.numel(axes)
        num_active = active.entries.get(name, numel)
        spent.add(layout.block, 2 * num_rows * num_active, name in heads)
        absent.add(layout.block, 2 * num_rows * (numel - num_active), name in heads)
        if layout.reads_data:
            of_data.add(layout.block, 2 * num_rows * num_active)
    for index, block in enumerate(anatomy.blocks):
        width = active.widths.get(index, block.attention.width(axes))
        num_attending = anatomy.places[block.attention.place](1, num_tokens)
        num_kept = kept.get(index, num_attending)
        pairs = (
            kept_pairs(block.attention, num_attending, num_kept, counted)
            if active.pairs is None
            # What is kept of a sequence is a sequence, on which the pattern is laid anew.
            else active.pairs(num_kept)
        )
        # Scores and values: two products of the same size.
        spent.add(index, 2 * 2 * num_sequences * width * pairs)
    return spent.flops, of_data.flops, absent.flops


class _Counter:
    """Adds FLOPs up where they are spent.

    Args:
        num_blocks: Number of blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        self._blocks, self._outside, self._head = [0] * num_blocks, 0, 0

    def add(self, block: int | None, flops: int, is_head: bool = False) -> None:
        """Add what a block, or something outside of the blocks, spends."""
        if block is None:
            self._outside += flops
            self._head += flops if is_head else 0
        else:
            self._blocks[block] += flops

    @property
    def flops(self) -> Flops:
        """The sums."""
        return Flops(tuple(self._blocks), self._outside, self._head)


def training_flops(
    anatomy: Anatomy,
    num_sequences: int,
    num_tokens: int,
    *,
    attention: CountedPairs = "exact",
    activation_checkpointing: bool = False,
    kept: Mapping[int, int] | None = None,
    active: Active | None = None,
) -> Flops:
    """Count the FLOPs of a forward and a backward pass, every parameter being trained.

    Args:
        anatomy: The model.
        num_sequences: Sequences in the batch.
        num_tokens: Tokens of each sequence, padding included.
        attention: See :func:`attention_pairs`.
        activation_checkpointing: Whether the blocks compute their forward pass once more in the backward pass.
        kept: See :func:`forward_flops`.
        active: See there.

    Returns:
        The FLOPs of each block and of what is outside of the blocks.
    """
    active = active or Active()
    forward, of_data, absent = _count(anatomy, num_sequences, num_tokens, attention, kept or {}, active)
    block_passes = 4 if activation_checkpointing else 3
    gradients = 1 if active.has_dense_gradients else 0
    return Flops(
        tuple(
            block_passes * all_ - data + gradients * off
            for all_, data, off in zip(forward.blocks, of_data.blocks, absent.blocks, strict=True)
        ),
        3 * forward.outside_blocks - of_data.outside_blocks + gradients * absent.outside_blocks,
        3 * forward.head + gradients * absent.head,
    )


@dataclass(frozen=True)
class HeadAccountings:
    """What a step costs by three ways to count the model's head, whose masking a saving may depend on.

    Args:
        masked: The head is as sparse as the blocks are, as in the published code of mixed sparsity training.
        dense: It is whole.
        excluded: It is not counted at all.
    """

    masked: int
    dense: int
    excluded: int


def head_accountings(anatomy: Anatomy, flops: Flops, whole: Flops, active: Active | None) -> HeadAccountings:
    """Count a step in three ways.

    Args:
        anatomy: The model.
        flops: What the step cost.
        whole: What it would have cost with the whole model.
        active: What of the model took part; default: all of it.
    """
    body = flops.total - flops.head
    entries = {} if active is None else active.entries
    if any(name in entries for name in head_matrices(anatomy)):
        masked_head = flops.head
    else:
        axes = anatomy.size.axes
        sizes = {n: p.numel(axes) for n, p in anatomy.parameters.items() if p.block is not None and p.is_matrix}
        num_active = sum(entries.get(name, size) for name, size in sizes.items())
        masked_head = whole.head * num_active // sum(sizes.values())
    return HeadAccountings(masked=body + masked_head, dense=body + whole.head, excluded=body)
