"""The anatomy of a model: its blocks, the named axes of its parameters, and how to build it at another size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from lit_accel.anatomy.axes import Axis, Dim

Residual = Literal["pre_norm", "post_norm", "res_post_norm"]
Rows = Callable[[int, int], int]
"""How many rows pass through a place of a model in one call, from the number of sequences and of tokens of each."""


# Functions with names: an anatomy can be pickled, and what holds one.
def _all_tokens(num_sequences: int, num_tokens: int) -> int:
    return num_sequences * num_tokens


def _all_sequences(num_sequences: int, num_tokens: int) -> int:
    return num_sequences


def _sequence_places() -> Mapping[str, Rows]:
    return SEQUENCE_PLACES


SEQUENCE_PLACES: Mapping[str, Rows] = {"token": _all_tokens, "sequence": _all_sequences}
"""The places of a model whose blocks all work on the tokens that it is called with."""


class AnatomyError(ValueError):
    """A model, parameter or size that the anatomy cannot describe."""


@dataclass(frozen=True)
class Attention:
    """What the cost of a block's attention depends on, besides its matrices.

    Args:
        heads: The axes whose product is the number of query heads.
        head_dim: The axis of one head's features.
        causal: Whether a token attends only to itself and to earlier ones.
        window: How many tokens back a token sees, itself included; ``None`` for all.
        tile: Where tokens attend to each other within disjoint groups, the tokens of a group; ``None`` for one group.
        place: Where the tokens are that attend: with their padding to whole tiles, which is computed like the rest.
    """

    heads: tuple[str, ...]
    head_dim: str
    causal: bool
    window: int | None = None
    tile: int | None = None
    place: str = "token"

    def width(self, axes: Mapping[str, int]) -> int:
        """Return the features of all its query heads, for the given axis sizes."""
        return math.prod(axes[axis] for axis in self.heads) * axes[self.head_dim]


class AttentionKernel(Protocol):
    """Another way to attend than that of a model."""

    @property
    def name(self) -> str:
        """A name that no other kernel has."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float | None,
        dropout: float,
        training: bool,
    ) -> Tensor:
        """Attend.

        Args:
            query: Shape (batch, heads, queries, head_dim).
            key: Shape (batch, kv_heads, keys, head_dim), ``kv_heads`` a divisor of ``heads``; the last keys are those
                of the queries.
            value: Like ``key``.
            mask: What the model allows, true or 0 where it does, to be broadcast to (batch, heads, queries, keys);
                ``None`` for causal attention.
            scale: What scores are multiplied by; default is ``head_dim ** -0.5``.
            dropout: Probability with which a weight is dropped.
            training: Whether the module is in training mode.

        Returns:
            Shape (batch, heads, queries, head_dim).
        """


class Windows(Protocol):
    """How a block that works on windows of an image can be called with some of them."""

    def tokens(self, module: nn.Module, height: int, width: int) -> Tensor:
        """Return which tokens each window holds.

        Args:
            module: The block.
            height: Height of its input, in tokens.
            width: Width of its input, in tokens.

        Returns:
            For each window and position within it the index of a token, row by row of the input; ``height * width``
            where a window is padded. Shape (windows, tokens of a window).
        """

    def stacked(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """Return windows as the image that the block is to be called with, one below the other.

        Args:
            module: The block.
            tokens: Their tokens, shape (batch, windows * tokens of a window, features).
        """

    def apart(self, module: nn.Module, height: int, width: int, chosen: Tensor) -> AbstractContextManager[None]:
        """Let the block treat its input as a stack of windows, for as long as the context lasts.

        Args:
            module: The block.
            height: Height of the whole input, in tokens.
            width: Width of the whole input, in tokens.
            chosen: Which windows are in the stack, shape (batch, windows in the stack).
        """


@dataclass(frozen=True)
class Block:
    """One residual block.

    Args:
        path: The block's name in the model, such as ``"transformer.h.3"``.
        stage: Blocks of one stage have the same shapes; depth changes stay within a stage.
        residual: Where the block's normalisation stands: before the branch (``pre_norm``), after the addition
            (``post_norm``) or on the branch's output before the addition (``res_post_norm``).
        attention: What its attention costs.
        token_dims: For each argument of the block's forward that has token axes, which dimensions these are.
        branch_outputs: The parameters, named within the block, that are last in a residual branch: scaling
            them scales what the branch adds.
        flat_masks_are_of_tokens: Whether a mask of two dimensions is one of tokens, (batch, tokens), and never one of
            pairs.
        place: Where the block's tokens are, one of :attr:`Anatomy.places`.
        numbering: Those of ``token_dims`` that number the tokens of each sequence, for attention kernels to see where
            one ends: among some of the tokens they are numbers anew, and not a part of the old ones.
        packing: Arguments that say how sequences are packed into one, each with the argument that holds the boundaries
            that it goes with: a tensor of where each sequence begins and the last one ends, which goes with itself, or
            how long the longest sequence is.
        windows: Where the block works on disjoint windows of tokens, how to have it work on some of them.
        ffn: The axis of the neurons of its feed-forward network.
        attributes: Attributes of its modules that follow from axis sizes, such as numbers of heads, as sums and
            products of axes: ``{"attn.split_size": "heads*head_dim"}``. Those of linear layers are not named.
        inlined: Matrices, named within the block, that something else than their module multiplies by.
        indivisible: Axes of which no index can be left out, with the reason, which completes "cannot be switched off:".
    """

    path: str
    stage: int
    residual: Residual
    attention: Attention
    token_dims: Mapping[str, tuple[int, ...]]
    branch_outputs: frozenset[str]
    flat_masks_are_of_tokens: bool = False
    place: str = "token"
    numbering: frozenset[str] = frozenset()
    packing: Mapping[str, str] = field(default_factory=dict)
    windows: Windows | None = None
    ffn: str = "ffn"
    attributes: Mapping[str, str] = field(default_factory=dict)
    inlined: frozenset[str] = frozenset()
    indivisible: Mapping[str, str] = field(default_factory=dict)

    @property
    def token_places(self) -> frozenset[str]:
        """The places that its tokens pass through."""
        return frozenset({self.place, self.attention.place})


@dataclass(frozen=True)
class ParameterLayout:
    """What is known about one parameter.

    Args:
        dims: Its dimensions, in storage order.
        fold: An axis whose reduction factor this parameter carries. Where an embedding is tied to the head, the
            sum over ``embed`` in the logits grows with the width; the last norm before the head takes that
            factor, so that the tied table itself needs none.
        place: Where a matrix is applied, one of :attr:`Anatomy.places`: to every ``token``, once a ``sequence``.
        reads_data: Whether a matrix is applied to something that no gradient is computed for, such as an image: its
            backward pass is then one product instead of two.
        block: The index of the block it belongs to, or ``None``.
    """

    dims: tuple[Dim, ...]
    fold: str | None = None
    place: str = "token"
    reads_data: bool = False
    block: int | None = None

    def shape(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the parameter's shape for the given axis sizes."""
        return tuple(dim.size(axes) for dim in self.dims)

    def numel(self, axes: Mapping[str, int]) -> int:
        """Return the number of entries for the given axis sizes."""
        return math.prod(self.shape(axes))

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter takes part in a matrix product."""
        return any(dim.is_input for dim in self.dims)


@dataclass(frozen=True)
class Size:
    """The size of a model: axis sizes, and the number of blocks of each stage.

    Args:
        axes: Sizes by axis name.
        depths: Number of blocks a stage.
    """

    axes: Mapping[str, int]
    depths: tuple[int, ...]

    def to_state(self) -> dict[str, Any]:
        """Return the size as plain dictionaries, lists and integers, for a checkpoint."""
        return {"axes": dict(self.axes), "depths": list(self.depths)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Size:
        """Read what :meth:`to_state` wrote."""
        return cls(dict(state["axes"]), tuple(state["depths"]))


@dataclass(frozen=True)
class Anatomy:
    """Everything that the methods and the accounting need to know about a model; holds no tensor of it.

    Args:
        family: The name of the family, such as ``"gpt2"``.
        size: Axis sizes and depths.
        blocks: The residual blocks, in order.
        parameters: The layout of every parameter, by the name that ``named_parameters`` gives it.
        tied: Groups of names that are one tensor.
        tied_heads: Parameters that are looked up as embeddings and, besides, applied to every token as a matrix.
        width_axes: What shrinks with the width. Each entry is divided by the factor; where it lists several
            axes, the first takes as much of the factor as divides it and the next takes the rest.
        depth_unit: How many neighbouring blocks of a stage differ in kind and recur together, such as the plain and
            the shifted one of Swin. Depth changes merge or copy whole units: blocks of one kind with each other.
        places: The rows that a call brings to each place of the model.
        attend: Has a model's causal attention computed by another kernel; returns what undoes it. ``None`` where that
            is not known.
        num_tokens: Tokens of a sequence, where the model takes no other number.
        num_reserved_positions: Learnt positions that no token ever has.
        num_prefix_tokens: Tokens before those of the input: for a class, distillation or registers.
        pools_tokens: Whether what follows the last block works on any part of the tokens, the prefix included.
        build: Builds a model of the same class at another size: ``build(model, size)``. Its parameters are
            not initialised.
        input_shape: ``(num_sequences, num_tokens)`` of a forward call, from its ``args`` and ``kwargs``.
    """

    family: str
    size: Size
    blocks: tuple[Block, ...]
    parameters: Mapping[str, ParameterLayout]
    tied: tuple[tuple[str, ...], ...]
    tied_heads: tuple[str, ...]
    width_axes: tuple[tuple[str, ...], ...]
    build: Callable[[nn.Module, Size], nn.Module] = field(compare=False, repr=False)
    input_shape: Callable[[tuple[Any, ...], Mapping[str, Any]], tuple[int, int]] = field(compare=False, repr=False)
    depth_unit: int = 1
    num_tokens: int | None = None
    num_reserved_positions: int = 0
    num_prefix_tokens: int = 0
    pools_tokens: bool = False
    attend: Callable[[nn.Module, AttentionKernel], Callable[[], None]] | None = field(
        default=None, compare=False, repr=False
    )
    places: Mapping[str, Rows] = field(default_factory=_sequence_places, compare=False, repr=False)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The named axes with their sizes."""
        return tuple(Axis(name, size) for name, size in self.size.axes.items())

    @property
    def max_tokens(self) -> int | None:
        """For how many tokens there are learnt positions; ``None`` where positions are computed."""
        positions = self.size.axes.get("positions")
        return None if positions is None else positions - self.num_reserved_positions

    @property
    def num_parameters(self) -> int:
        """The number of parameters, tied ones once."""
        return sum(layout.numel(self.size.axes) for layout in self.parameters.values())

    def split_name(self, name: str) -> tuple[Block | None, str]:
        """Split a parameter's name into its block, if any, and the name within it."""
        index = self.parameters[name].block
        if index is None:
            return None, name
        block = self.blocks[index]
        return block, name.removeprefix(f"{block.path}.")

    def is_branch_output(self, name: str) -> bool:
        """Whether scaling this parameter scales what a residual branch adds."""
        block, local = self.split_name(name)
        return block is not None and local in block.branch_outputs

    def width_factors(self, factor: int) -> dict[str, int]:
        """Choose the axes that a width reduction by ``factor`` divides.

        Args:
            factor: At least 1.

        Returns:
            ``{axis: divisor}`` for every axis that is reduced; empty for factor 1.

        Raises:
            AnatomyError: If an axis cannot be divided by the factor.
        """
        chosen: dict[str, int] = {}
        for alternatives in self.width_axes:
            remaining = factor
            for axis in alternatives:
                divisor = math.gcd(remaining, self.size.axes[axis])
                if divisor > 1:
                    chosen[axis] = divisor
                    remaining //= divisor
            if remaining > 1:
                sizes = ", ".join(f"{axis} is {self.size.axes[axis]}" for axis in alternatives)
                raise AnatomyError(
                    f"The width of this {self.family} model cannot be divided by {factor}: {sizes}. Choose a width "
                    "factor that divides it, or a model whose width has this divisor."
                )
        return chosen

    def reduced(self, width: int = 1, depth: int | Sequence[int] = 1) -> Size:
        """Return the size after dividing width and depth.

        Args:
            width: What to divide the width by; heads keep their ``head_dim`` where their number can be divided.
            depth: What to divide the number of blocks by. A sequence has one factor a stage. One number is for every
                stage that it divides; where there are several stages, the others keep their depth.

        Raises:
            AnatomyError: If a size is no multiple of its divisor.
        """
        axes = dict(self.size.axes)
        for axis, factor in self.width_factors(width).items():
            axes[axis] //= factor
        return Size(axes, self._reduced_depths(depth))

    def _reduced_depths(self, depth: int | Sequence[int]) -> tuple[int, ...]:
        depths, unit = self.size.depths, self.depth_unit

        def divides(factor: int, num_blocks: int) -> bool:
            return factor == 1 or num_blocks % (factor * unit) == 0

        if isinstance(depth, int):
            factors = [depth if divides(depth, num_blocks) else 1 for num_blocks in depths]
            fits = depth == 1 or any(factor > 1 for factor in factors)
        else:
            factors = list(depth)
            if len(factors) != len(depths):
                raise AnatomyError(
                    f"The depth factors are {factors}, but this {self.family} model has {len(depths)} stages, of "
                    f"{', '.join(map(str, depths))} blocks. Give one factor a stage, or one number."
                )
            fits = all(map(divides, factors, depths))
        if not fits:
            blocks = f"{', '.join(map(str, depths))} blocks" + (" a stage" if len(depths) > 1 else "")
            units = f", which are merged in units of {unit}" if unit > 1 else ""
            raise AnatomyError(
                f"The depth of this {self.family} model, {blocks}{units}, cannot be divided by {depth}. Choose a depth "
                "factor that divides it, or 1."
            )
        return tuple(num // factor for num, factor in zip(depths, factors, strict=True))

    def at(self, size: Size) -> Anatomy:
        """Return the anatomy of the same model at another size, without building it.

        Blocks of a stage are alike, so each new block takes its description from the block of the same stage
        that stands at the same place in proportion.
        """
        sources = [self.blocks[index] for index in self.block_sources(size.depths)]
        paths = _block_paths(self.blocks, size.depths)
        position = {block.path: index for index, block in enumerate(self.blocks)}
        parameters = {name: p for name, p in self.parameters.items() if p.block is None}
        by_block: dict[int, dict[str, ParameterLayout]] = {}
        for name, layout in self.parameters.items():
            if layout.block is not None:
                by_block.setdefault(layout.block, {})[self.split_name(name)[1]] = layout
        for index, (path, source) in enumerate(zip(paths, sources, strict=True)):
            for local, layout in by_block[position[source.path]].items():
                parameters[f"{path}.{local}"] = replace(layout, block=index)
        blocks = tuple(replace(source, path=path) for path, source in zip(paths, sources, strict=True))
        return replace(self, size=size, blocks=blocks, parameters=parameters)

    def block_sources(self, depths: Sequence[int]) -> list[int]:
        """Return, for each block of a model of other depths, the index of the present block that it is like.

        It belongs to the same stage, is of the same kind, and stands at the same place in proportion.

        Args:
            depths: Number of blocks a stage.
        """
        sources, start = [], 0
        for old, new in zip(self.size.depths, depths, strict=True):
            unit = self.depth_unit if old != new else 1
            num_old, num_new = old // unit, new // unit
            sources += [start + i * num_old // num_new * unit + kind for i in range(num_new) for kind in range(unit)]
            start += old
        return sources


def _block_paths(blocks: Sequence[Block], depths: Sequence[int]) -> list[str]:
    """Return the paths of the blocks of a model of other depths: containers stay, only the counts change."""
    paths = []
    for stage, depth in enumerate(depths):
        container = next(block.path for block in blocks if block.stage == stage).rpartition(".")[0]
        paths += [f"{container}.{index}" for index in range(depth)]
    return paths
