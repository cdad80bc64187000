"""Named axes: what each dimension of a parameter *is*, so that nobody has to guess it from a size.

A layout is written as one string a parameter, dimensions in storage order, separated by commas::

    "vocab, embed"                                  an embedding table
    "kv_heads*head_dim, in:embed"                   the weight of a Linear: (out_features, in_features)
    "in:embed, heads*head_dim + heads*head_dim"     a fused projection stored input first

``*`` is a product of axes (row-major), ``+`` a concatenation, an integer an unnamed axis that no method
touches, and ``in:`` marks the dimension that a matrix product sums over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Axis:
    """A named dimension of a model, such as ``embed`` with 768 entries.

    Args:
        name: The name; the same name means the same index set wherever it occurs.
        size: The number of entries.
    """

    name: str
    size: int


@dataclass(frozen=True)
class Dim:
    """One dimension of a parameter: a concatenation of products of axes.

    Args:
        chunks: The concatenated parts; each is a row-major product of axis names and plain integers.
        is_input: Whether a matrix product sums over this dimension.
    """

    chunks: tuple[tuple[str | int, ...], ...]
    is_input: bool = False

    def chunk_shape(self, chunk: int, axes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the sizes of the factors of one chunk."""
        return tuple(axes[factor] if isinstance(factor, str) else factor for factor in self.chunks[chunk])

    def chunk_sizes(self, axes: Mapping[str, int]) -> list[int]:
        """Return the length of each chunk along this dimension."""
        return [math.prod(self.chunk_shape(index, axes)) for index in range(len(self.chunks))]

    def size(self, axes: Mapping[str, int]) -> int:
        """Return the length of this dimension for the given axis sizes."""
        return sum(self.chunk_sizes(axes))

    @property
    def names(self) -> frozenset[str]:
        """The names of all axes in this dimension."""
        return frozenset(factor for chunk in self.chunks for factor in chunk if isinstance(factor, str))


def positions_along(dim: Dim, axes: Mapping[str, int], axis: str, chosen: Sequence[int]) -> list[int]:
    """Return where some indices of an axis are along a dimension, in order; parts without the axis are kept whole.

    Args:
        dim: The dimension.
        axes: Axis sizes.
        axis: The axis.
        chosen: Indices along it, in order.
    """
    positions: list[int] = []
    start = 0
    for index, chunk in enumerate(dim.chunks):
        shape = dim.chunk_shape(index, axes)
        length = math.prod(shape)
        if axis in chunk:
            place = chunk.index(axis)
            inner = math.prod(shape[place + 1 :])
            for outer in range(math.prod(shape[:place])):
                for unit in chosen:
                    first = start + (outer * shape[place] + unit) * inner
                    positions += range(first, first + inner)
        else:
            positions += range(start, start + length)
        start += length
    return positions


# Blocks repeat their layouts, and a model is described many times in a run.
@cache
def parse_layout(layout: str) -> tuple[Dim, ...]:
    """Read a layout string, such as ``"in:embed, heads*head_dim + heads*head_dim"``.

    Args:
        layout: See the head of this module.

    Returns:
        One :class:`Dim` a dimension, in storage order.
    """
    dims = []
    for text in layout.split(","):
        text = text.strip()
        is_input = text.startswith("in:")
        chunks = tuple(
            tuple(int(factor) if factor.strip().isdigit() else factor.strip() for factor in chunk.split("*"))
            for chunk in text.removeprefix("in:").split("+")
        )
        dims.append(Dim(chunks, is_input))
    return tuple(dims)
