"""What is switched on and off: neurons and heads along named axes; entries, N:M groups and tiles of matrices.

A *space* holds the units of one place, such as the neurons of one block, in groups of equal size: its masks have the
shape (groups, units of a group). Spaces are made from a model's anatomy and hold no tensor.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lit_accel.anatomy import Anatomy, Dim, ParameterLayout, positions_along
from lit_accel.compute.flops import head_matrices

Part = Literal["ffn", "attention", "head"]
"""The matrices of feed-forward networks, those of attention, and the model's head (its last projection)."""


class UnitsError(ValueError):
    """Units that a model does not have."""


@dataclass(frozen=True)
class UnitSpace(ABC):
    """Units of one place of a model.

    Args:
        name: The block's path and what its units are, or the matrix's name.
        part: What of the model it belongs to.
        num_groups: Groups.
        num_units: Units of a group.
        weights_per_unit: Entries of matrices that one unit switches.
        quantum: Numbers of active units are multiples of it, unless all are.
        minimum: So many are active at least.
    """

    name: str
    part: Part
    num_groups: int
    num_units: int
    weights_per_unit: int
    quantum: int = 1
    minimum: int = 1

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The parameters that its units are in."""

    @property
    @abstractmethod
    def is_separable(self) -> bool:
        """Whether units that are off can be taken out of the model, so that its products are smaller."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix that a distribution over layers goes by, outputs first."""

    @abstractmethod
    def magnitude(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return how large the weights of each unit are, shape (groups, units)."""

    @abstractmethod
    def gradient(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return how large the gradients of each unit's weights are, shape (groups, units)."""

    @abstractmethod
    def active_entries(self, num_active: int) -> dict[str, int]:
        """Return how many entries of each parameter are on.

        Args:
            num_active: Units of a group that are on.
        """

    def num_active(self, density: float) -> int:
        """Return how many units of a group are on.

        Args:
            density: The share that should be, in (0, 1].

        Returns:
            The nearest number, halves rounded up, and of it the nearest multiple of the quantum; at least the minimum.
        """
        if density >= 1:
            return self.num_units
        number = self.num_units - math.floor((1 - density) * self.num_units + 0.5 - 1e-9)
        number = math.floor(number / self.quantum + 0.5) * self.quantum
        return min(max(number, self.minimum), self.num_units)


@dataclass(frozen=True)
class Carrier:
    """A parameter that carries the axis of a unit.

    Args:
        name: The parameter.
        dim: Which of its dimensions does.
        layout: Its layout.
        is_output: Whether the matrix sums over that dimension: it then is what a unit gives to the rest of the model.
    """

    name: str
    dim: int
    layout: ParameterLayout
    is_output: bool


@dataclass(frozen=True)
class AxisUnits(UnitSpace):
    """Units that are indices along a named axis: neurons, or heads (with grouped queries, those of a key-value head).

    Args:
        axis: The axis.
        axes: Axis sizes.
        carriers: All parameters of the block that carry the axis.
        block: Index of the block.
    """

    axis: str = ""
    axes: Mapping[str, int] = None  # type: ignore[assignment]
    carriers: tuple[Carrier, ...] = ()
    block: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that carry the axis."""
        return tuple(carrier.name for carrier in self.carriers)

    @property
    def is_separable(self) -> bool:
        """Always."""
        return True

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix on the units' output side."""
        carrier = next(carrier for carrier in self.carriers if carrier.is_output)
        rows, columns = (dim.size(self.axes) for dim in carrier.layout.dims)
        return (columns, rows) if carrier.dim == 0 else (rows, columns)

    def active_entries(self, num_active: int) -> dict[str, int]:
        """Return how many entries of each parameter are on."""
        axes = {**self.axes, self.axis: num_active}
        return {carrier.name: carrier.layout.numel(axes) for carrier in self.carriers}

    def positions(self, carrier: Carrier, active: Tensor) -> Tensor:
        """Return where units are along the dimension of a carrier.

        Args:
            carrier: One of :attr:`carriers`.
            active: Their indices, in order.
        """
        dim = carrier.layout.dims[carrier.dim]
        return torch.tensor(positions_along(dim, self.axes, self.axis, active.tolist()), dtype=torch.int64)

    def magnitude(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the product of the norms of what goes into a unit and of what comes out of it.

        What a unit contributes goes through both; neither norm by itself says how much.
        """
        sides = [
            torch.stack([self._squares(carrier, tensors[carrier.name]) for carrier in side]).sum(0).sqrt()
            for side in self._sides
        ]
        return (sides[0] * sides[1]).unsqueeze(0)

    def gradient(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the norm of the gradient on the output side, the only one that units which are off have."""
        outputs = self._sides[1]
        return torch.stack([self._squares(c, gradients[c.name]) for c in outputs]).sum(0).sqrt().unsqueeze(0)

    @cached_property
    def _sides(self) -> tuple[list[Carrier], list[Carrier]]:
        return [c for c in self.carriers if not c.is_output], [c for c in self.carriers if c.is_output]

    def _squares(self, carrier: Carrier, tensor: Tensor) -> Tensor:
        """Return the sum of squares of each unit's entries."""
        others = [dim for dim in range(tensor.dim()) if dim != carrier.dim]
        squares = tensor.float().square()
        along = squares.sum(others) if others else squares
        total, start = along.new_zeros(self.num_units), 0
        dim: Dim = carrier.layout.dims[carrier.dim]
        for index, chunk in enumerate(dim.chunks):
            shape = dim.chunk_shape(index, self.axes)
            piece = along[start : start + math.prod(shape)].view(shape)
            start += math.prod(shape)
            if self.axis in chunk:
                total = total + piece.movedim(chunk.index(self.axis), 0).reshape(self.num_units, -1).sum(1)
        return total


@dataclass(frozen=True)
class MatrixUnits(UnitSpace):
    """Units within one matrix: entries, N:M groups of them, or tiles.

    Args:
        parameter: The matrix.
        size: Its numbers of outputs and inputs.
        is_input_first: Whether it is stored inputs first.
        tile: Side of a tile; 1 for entries.
        quota: So many units of a group are on whenever any is off, whatever the density; ``None`` to go by that.
    """

    parameter: str = ""
    size: tuple[int, int] = (0, 0)
    is_input_first: bool = False
    tile: int = 1
    quota: int | None = None

    def num_active(self, density: float) -> int:
        """Return how many units of a group are on."""
        return self.quota if self.quota is not None and density < 1 else super().num_active(density)

    @property
    def names(self) -> tuple[str, ...]:
        """The matrix."""
        return (self.parameter,)

    @property
    def is_separable(self) -> bool:
        """Whether they are tiles."""
        return self.tile > 1

    @property
    def shape(self) -> tuple[int, int]:
        """Its numbers of outputs and inputs."""
        return self.size

    def active_entries(self, num_active: int) -> dict[str, int]:
        """Return how many entries of the matrix are on."""
        return {self.parameter: self.num_groups * num_active * self.tile**2}

    def tiles(self, matrix: Tensor) -> Tensor:
        """Return a matrix, as it is stored, by groups and units: shape (groups, units, tile, tile)."""
        rows, columns = self.size
        matrix = matrix.t() if self.is_input_first else matrix
        if self.tile == 1:
            return matrix.reshape(self.num_groups, self.num_units, 1, 1)
        return matrix.reshape(rows // self.tile, self.tile, columns // self.tile, self.tile).transpose(1, 2)

    def from_tiles(self, tiles: Tensor) -> Tensor:
        """Undo :meth:`tiles`."""
        matrix = tiles.transpose(1, 2).reshape(self.size) if self.tile > 1 else tiles.reshape(self.size)
        return matrix.t() if self.is_input_first else matrix

    def magnitude(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the root mean square of each unit's entries."""
        return self._rms(tensors[self.parameter])

    def gradient(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the root mean square of each unit's gradients."""
        return self._rms(gradients[self.parameter])

    def _rms(self, matrix: Tensor) -> Tensor:
        tiles = self.tiles(matrix.float())
        return tiles[..., 0, 0].abs() if self.tile == 1 else tiles.square().mean((2, 3)).sqrt()

    def entries(self, mask: Tensor) -> Tensor:
        """Return a mask of units as one of the matrix's entries, as it is stored."""
        return self.from_tiles(mask[:, :, None, None].expand(-1, -1, self.tile, self.tile)).contiguous()


def spaces_of(
    anatomy: Anatomy, ffn: str, attention: str, head: str, *, tile: int = 64, quantum: int = 16
) -> dict[str, UnitSpace]:
    """Return the spaces of a model, by name.

    Args:
        anatomy: The model.
        ffn: Units of the feed-forward networks: ``"neuron"``, ``"element"``, ``"block"``, ``"N:M"`` such as
            ``"2:4"``, or ``"dense"`` for none.
        attention: Units of the matrices of attention: ``"head"``, or as before.
        head: Units of the model's head: ``"element"`` or ``"dense"``.
        tile: Side of a tile of ``"block"``.
        quantum: Numbers of active neurons are multiples of it.

    Raises:
        UnitsError: If the model does not have such units.
    """
    spaces = [
        space
        for part, units in (("ffn", ffn), ("attention", attention), ("head", head))
        for space in _spaces_of_part(anatomy, part, units, tile, quantum)  # type: ignore[arg-type]
    ]
    return {space.name: space for space in spaces}


def _spaces_of_part(anatomy: Anatomy, part: Part, units: str, tile: int, quantum: int) -> Iterator[UnitSpace]:
    if units == "dense":
        return
    if part == "head":
        matrices = head_matrices(anatomy)
        if not matrices:
            raise UnitsError(
                f'This {anatomy.family} model has no head whose entries could be off. Use head_units="dense".'
            )
        for name in matrices:
            yield _matrix_units(anatomy, name, part, units, tile)
        return
    for index in range(len(anatomy.blocks)):
        if units in ("neuron", "head"):
            yield _axis_units(anatomy, index, part, quantum)
            continue
        for name in part_matrices(anatomy, index, part):
            yield _matrix_units(anatomy, name, part, units, tile)


def part_axis(anatomy: Anatomy, index: int, part: Part) -> str:
    """Return the axis that the neurons or the heads of a block are along."""
    block = anatomy.blocks[index]
    return block.ffn if part == "ffn" else block.attention.heads[0]


def part_matrices(anatomy: Anatomy, index: int, part: Part) -> list[str]:
    """Return the matrices of a block's feed-forward network or attention that its tokens pass through."""
    block, axis = anatomy.blocks[index], part_axis(anatomy, index, part)
    return [
        name
        for name, layout in anatomy.parameters.items()
        if layout.block == index
        and layout.is_matrix
        and layout.place in block.token_places
        and any(axis in dim.names for dim in layout.dims)
    ]


def _axis_units(anatomy: Anatomy, index: int, part: Part, quantum: int) -> AxisUnits:
    block, axes = anatomy.blocks[index], anatomy.size.axes
    axis, what = part_axis(anatomy, index, part), "neurons" if part == "ffn" else "heads"
    if axis in block.indivisible:
        raise UnitsError(
            f"{what.capitalize()} of this {anatomy.family} model cannot be switched off: {block.indivisible[axis]}. "
            f'Use {part}_units="dense", or units of its matrices such as "element".'
        )
    if axes[axis] == 1:
        raise UnitsError(
            f"{block.path} of this {anatomy.family} model has a single key-value head, and with it all of its heads "
            f'would be switched off. Use {part}_units="dense", or units of its matrices such as "element".'
        )
    carriers = []
    for name, layout in anatomy.parameters.items():
        if layout.block != index:
            continue
        dims = [place for place, dim in enumerate(layout.dims) if axis in dim.names]
        if dims:
            carriers.append(Carrier(name, dims[0], layout, layout.dims[dims[0]].is_input))
    entries = sum(c.layout.numel(axes) for c in carriers if c.layout.is_matrix)
    num_units = axes[axis]
    return AxisUnits(
        name=f"{block.path}: {what}",
        part=part,
        num_groups=1,
        num_units=num_units,
        weights_per_unit=entries // num_units,
        quantum=min(quantum, num_units) if part == "ffn" else 1,
        minimum=min(quantum, num_units) if part == "ffn" else 1,
        axis=axis,
        axes=axes,
        carriers=tuple(carriers),
        block=index,
    )


def _matrix_units(anatomy: Anatomy, name: str, part: Part, units: str, tile: int) -> MatrixUnits:
    layout, axes = anatomy.parameters[name], anatomy.size.axes
    rows, columns = layout.shape(axes)
    is_input_first = layout.dims[0].is_input
    if is_input_first:
        rows, columns = columns, rows
    common: dict[str, Any] = {
        "name": name,
        "part": part,
        "parameter": name,
        "size": (rows, columns),
        "is_input_first": is_input_first,
        "minimum": 0,
    }
    if units == "element":
        return MatrixUnits(num_groups=1, num_units=rows * columns, weights_per_unit=1, **common)
    if (pattern := n_of_m(units)) is not None:
        num_kept, of = pattern
        if columns % of:
            raise UnitsError(
                f"{name} of this {anatomy.family} model has {columns} inputs, which are no multiple of the {of} of "
                f'{units!r}. Use another number, or "element".'
            )
        return MatrixUnits(num_groups=rows * columns // of, num_units=of, weights_per_unit=1, quota=num_kept, **common)
    block, local = anatomy.split_name(name)
    if block is not None and local in block.inlined:
        raise UnitsError(
            f"{name} of this {anatomy.family} model is multiplied by something else than its own layer, which could "
            f'not be told to do so in tiles. Use {part}_units="element", or another.'
        )
    if rows % tile or columns % tile:
        raise UnitsError(
            f"{name} of this {anatomy.family} model is {rows} x {columns}, which cannot be cut into tiles of {tile} x "
            f'{tile}. Set block_size to a divisor of both, such as {math.gcd(rows, columns)}, or use "element".'
        )
    return MatrixUnits(
        num_groups=rows // tile, num_units=columns // tile, weights_per_unit=tile**2, tile=tile, **common
    )


def n_of_m(units: str) -> tuple[int, int] | None:
    """Read units that are written ``"N:M"``, N of each M neighbours along the inputs; ``None`` for others."""
    match = re.fullmatch(r"(\d+):(\d+)", units)
    return (int(match[1]), int(match[2])) if match else None
