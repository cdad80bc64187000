"""The windows of timm's Swin blocks: which tokens they hold, and how a block is called with some of them.

Attention never crosses a window, and a block treats each by itself. So a window that is computed is computed as in the
whole image, whichever others are there, and one that is not leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class ShiftedWindows:
    """Implements :class:`~lit_accel.anatomy.base.Windows` for plain and shifted blocks of timm's Swin."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[Any, ...], Tensor] = {}

    def tokens(self, module: Any, height: int, width: int) -> Tensor:
        """Return which tokens each window holds."""
        device = module.norm1.weight.device
        key = (*module.window_size, *module.shift_size, height, width, device)
        if key not in self._tokens:
            self._tokens[key] = _tokens(module.window_size, module.shift_size, height, width).to(device)
        return self._tokens[key]

    def stacked(self, module: Any, tokens: Tensor) -> Tensor:
        """Return windows as an image, one below the other."""
        return tokens.unflatten(1, (-1, module.window_size[1]))

    @contextmanager
    def apart(self, module: Any, height: int, width: int, chosen: Tensor) -> Iterator[None]:
        """Take the shift away from the block, which its input has had already, and give it the masks of its windows."""
        kept = {name: getattr(module, name) for name in ("shift_size", "attn_mask", "dynamic_mask")}
        mask = _mask(module, height, width)
        try:
            module.shift_size, module.dynamic_mask = (0, 0), False
            module.attn_mask = None if mask is None else mask[chosen.flatten()]
            yield
        finally:
            for name, value in kept.items():
                setattr(module, name, value)


def _tokens(window: tuple[int, int], shift: tuple[int, int], height: int, width: int) -> Tensor:
    grid = torch.arange(height * width).view(height, width).roll((-shift[0], -shift[1]), (0, 1))
    padding = (0, -width % window[1], 0, -height % window[0])
    grid = torch.nn.functional.pad(grid, padding, value=height * width)
    tiles = grid.unflatten(0, (-1, window[0])).unflatten(2, (-1, window[1]))
    return tiles.transpose(1, 2).flatten(0, 1).flatten(1)


def _mask(module: Any, height: int, width: int) -> Tensor | None:
    if not module.dynamic_mask:
        return module.attn_mask
    window = module.window_size
    padded = (height + -height % window[0], width + -width % window[1])
    return module.get_attn_mask(module.norm1.weight.new_empty(1).expand(1, *padded, 1))
