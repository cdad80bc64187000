"""The forms that a parameter can take while some of its units are off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_accel.methods.mixed_sparsity.units import AxisUnits, Carrier, MatrixUnits


class View(Protocol):
    """A smaller form of a tensor, which holds the entries of the units that are on."""

    def gather(self, full: Tensor) -> Tensor:
        """Return the smaller form of a whole tensor."""

    def scatter(self, compact: Tensor, full: Tensor) -> None:
        """Write the smaller form into a whole tensor, in place."""


class AxisView(View):
    """Some indices of one dimension.

    Args:
        units: The units.
        carrier: One of their parameters.
        mask: Which are on, shape (1, units).
        device: Where the parameter is.
    """

    def __init__(self, units: AxisUnits, carrier: Carrier, mask: Tensor, device: torch.device) -> None:
        self._dim = carrier.dim
        self._positions = units.positions(carrier, mask[0].nonzero().flatten().cpu()).to(device)

    def gather(self, full: Tensor) -> Tensor:
        """Return the entries of the active units."""
        return full.index_select(self._dim, self._positions)

    def scatter(self, compact: Tensor, full: Tensor) -> None:
        """Write them back."""
        full.index_copy_(self._dim, self._positions, compact.to(full.dtype))


class TileView(View):
    """The active tiles of a matrix, row by row of tiles, side by side: shape (rows of tiles, tile, kept * tile).

    Args:
        units: The tiles.
        mask: Which are on, shape (rows of tiles, tiles of a row), as many in each row.
        device: Where the matrix is.
    """

    def __init__(self, units: MatrixUnits, mask: Tensor, device: torch.device) -> None:
        self._units = units
        self.columns = mask.nonzero()[:, 1].view(mask.shape[0], -1).to(device)
        """Which tiles of each row are on, shape (rows of tiles, kept)."""

    def gather(self, full: Tensor) -> Tensor:
        """Return the active tiles."""
        tiles = self._units.tiles(full)
        index = self.columns[:, :, None, None].expand(-1, -1, *tiles.shape[2:])
        return tiles.gather(1, index).transpose(1, 2).flatten(2).contiguous()

    def scatter(self, compact: Tensor, full: Tensor) -> None:
        """Write them back."""
        tiles = self._units.tiles(full).clone()
        kept = compact.unflatten(2, (self.columns.shape[1], -1)).transpose(1, 2)
        tiles.scatter_(1, self.columns[:, :, None, None].expand_as(kept), kept.to(full.dtype))
        full.copy_(self._units.from_tiles(tiles))


def grouped_linear(x: Tensor, tiles: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a matrix of which only some tiles are there, as one batched product over its rows of tiles.

    Every row of tiles has as many of them, so that each is one dense product with the inputs that it needs. Gradients
    of tiles that are not there are never made.

    Args:
        x: Inputs, shape (..., inputs).
        tiles: The tiles, shape (rows of tiles, tile, kept * tile).
        columns: Which they are, shape (rows of tiles, kept).
        bias: Shape (outputs,).

    Returns:
        Shape (..., outputs).
    """
    num_rows, tile, _ = tiles.shape
    flat = x.reshape(-1, x.shape[-1] // tile, tile)
    needed = flat.index_select(1, columns.flatten()).view(len(flat), num_rows, -1).transpose(0, 1)
    out = torch.bmm(needed, tiles.transpose(1, 2)).transpose(0, 1).reshape(*x.shape[:-1], num_rows * tile)
    return out if bias is None else out + bias.to(out.dtype)


class GroupedForward:
    """Stands in the place of a linear layer's ``forward`` while its weight is a :class:`TileView`'s smaller form.

    Args:
        module: An ``nn.Linear``, or a layer that multiplies and adds its ``bias`` as that does.
        columns: See :func:`grouped_linear`.
    """

    def __init__(self, module: Any, columns: Tensor) -> None:
        self._module, self._columns = module, columns

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply."""
        return grouped_linear(x, self._module.weight, self._columns, getattr(self._module, "bias", None))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return GroupedForward, (self._module, self._columns)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of torch, or transformers' ``Conv1D``, which is one stored inputs first."""
    return type(module) is nn.Linear or type(module).__qualname__ == "Conv1D"
