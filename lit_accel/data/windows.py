"""Windows over a token file, and the samplers of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_accel.data.sampling import KeyedDataset, ShuffledSampler, SpreadSampler

WindowTransform = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
"""`(ids_t, epoch, index) -> (input_ids, labels)`, all int64 of shape (t,)."""


class TokenWindows(KeyedDataset):
    """Non-overlapping windows of `block_size` tokens; what is left over at the end of the file is not used.

    Args:
        path: A file of token ids, one after the other.
        dtype: Their type, "uint16" or "uint32".
        num_tokens: How many there are.
        block_size: Tokens in a window.
        transform: Makes inputs and labels of a window. It must be a pure function.
    """

    def __init__(self, path: Path, dtype: str, num_tokens: int, block_size: int, transform: WindowTransform) -> None:
        self.path = path
        self.dtype = dtype
        self.block_size = block_size
        self.transform = transform
        self._num_windows = num_tokens // block_size
        self._tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return self._num_windows

    def sample(self, epoch: int, index: int) -> dict[str, Tensor]:
        """Returns one window: `input_ids` and `labels`, int64 of shape (block_size,)."""
        if self._tokens is None:
            self._tokens = np.memmap(self.path, dtype=self.dtype, mode="r")
        window = self._tokens[index * self.block_size : (index + 1) * self.block_size]
        input_ids, labels = self.transform(torch.from_numpy(window.astype(np.int64)), epoch, index)
        return {"input_ids": input_ids, "labels": labels}

    def __getstate__(self) -> dict[str, Any]:
        # A memory map is pickled as its whole content; a worker process that is spawned opens its own instead.
        return {**self.__dict__, "_tokens": None}


class TrainingSampler(ShuffledSampler):
    """The shuffled order of windows."""

    dataset: TokenWindows

    def too_few(self, batch_size: int) -> str:
        """Says what is wrong where there are fewer windows than one step needs, and what to do."""
        return (
            f"the training part has {self.num_keys} windows of {self.dataset.block_size} tokens, fewer than the"
            f" {batch_size} x {self.num_replicas} (batch_size x processes) that one step needs;"
            " lower block_size or batch_size, or raise max_bytes if it is set"
        )


class EvaluationSampler(SpreadSampler):
    """The fixed order of windows.

    Args:
        dataset: What the indices are for.
        num_replicas: Number of ranks.
        rank: This rank.
        max_windows: Use this many windows, evenly spread over the file; None is all of them.

    Raises:
        ValueError: If there is not one window for each rank.
    """

    dataset: TokenWindows

    def __init__(
        self, dataset: TokenWindows, *, num_replicas: int = 1, rank: int = 0, max_windows: int | None = None
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, max_samples=max_windows)

    def too_few(self, wanted: int) -> str:
        """Says what is wrong where some rank would have no window, and what to do."""
        return (
            f"evaluation needs a window of {self.dataset.block_size} tokens for each of {self.num_replicas} processes"
            f" and has {wanted}; lower block_size, or raise val_fraction, or max_bytes if it is set"
        )
