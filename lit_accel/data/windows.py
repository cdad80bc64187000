"""Windows over a token file, and the two orders in which they are read: shuffled for training, fixed for evaluation.

A sampler here yields *keys*, not indices: `key = epoch * num_windows + index`. The data set can then tell which
pass over the data it serves without being told, in any worker process and after any resume, and a plain index
(as from a sampler that somebody else put in) is simply a key of epoch 0.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_accel.draws import generator

WindowTransform = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
"""`(ids_t, epoch, index) -> (input_ids, labels)`, all int64 of shape (t,)."""

_ORDER = 1  # sets the draws of the order apart from other draws with the same seed


class TokenWindows(Dataset[dict[str, Tensor]]):
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

    def __getitem__(self, key: int) -> dict[str, Tensor]:
        """Returns one window.

        Args:
            key: `epoch * len(self) + index`.

        Returns:
            `input_ids` and `labels`, int64 of shape (block_size,).
        """
        epoch, index = divmod(int(key), len(self))
        if self._tokens is None:
            self._tokens = np.memmap(self.path, dtype=self.dtype, mode="r")
        window = self._tokens[index * self.block_size : (index + 1) * self.block_size]
        input_ids, labels = self.transform(torch.from_numpy(window.astype(np.int64)), epoch, index)
        return {"input_ids": input_ids, "labels": labels}

    def __getstate__(self) -> dict[str, Any]:
        # A memory map is pickled as its whole content; a worker process that is spawned opens its own instead.
        return {**self.__dict__, "_tokens": None}


class TrainingSampler(DistributedSampler[Any]):
    """Shuffled keys, disjoint over the ranks, that can start in the middle of an epoch.

    The order of an epoch is a pure function of `(seed, epoch)`, the ranks take turns in it, and every rank gets
    the same number of full batches. So "where was I" is one number, the samples that all ranks have consumed.

    It is a `DistributedSampler` because Lightning leaves those in place, and calls their `set_epoch`.

    Args:
        dataset: What the keys are for.
        batch_size: Samples in a batch of one rank.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: Seed of the order.
        start_epoch: Epoch in which to start.
        start_sample: Samples of that epoch which all ranks together have consumed already.
        begin: Turns the number given to `set_epoch` into an epoch and a start in it, for a caller whose own count of
            epochs is not reliable; None takes the number as it is.

    Raises:
        ValueError: If there are too few windows for one batch on each rank.
    """

    def __init__(
        self,
        dataset: TokenWindows,
        batch_size: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        start_epoch: int = 0,
        start_sample: int = 0,
        begin: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        num_windows, samples_per_step = len(dataset), batch_size * num_replicas
        if num_windows < samples_per_step:
            raise ValueError(
                f"the training part has {num_windows} windows of {dataset.block_size} tokens, fewer than the"
                f" {batch_size} x {num_replicas} (batch_size x processes) that one step needs;"
                " lower block_size or batch_size, or raise max_bytes if it is set"
            )
        self.num_windows = num_windows
        self.total_size = num_windows // samples_per_step * samples_per_step
        self.num_samples = self.total_size // num_replicas
        self.epoch = start_epoch
        self.start_sample = start_sample
        self.begin = begin

    def __len__(self) -> int:
        """Samples of this rank in a *whole* epoch, also when the first one is a partial one.

        Lightning adds the batches trained before the interruption to those it fetches after it, and compares the
        sum with this.
        """
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the iterators made from now on. One that has just been chosen keeps its start."""
        if self.begin is not None:
            self.epoch, self.start_sample = self.begin(epoch)
        elif epoch != self.epoch:
            self.epoch, self.start_sample = epoch, 0

    def __iter__(self) -> Iterator[int]:
        # Does not depend on how often an iterator was made: Lightning makes some that it never reads.
        start = min(self.start_sample, self.total_size)
        order = torch.randperm(self.num_windows, generator=generator(self.seed, _ORDER, self.epoch))
        mine = order[start + self.rank : self.total_size : self.num_replicas]
        return iter((mine + self.epoch * self.num_windows).tolist())


class EvaluationSampler(DistributedSampler[Any]):
    """Indices in a fixed order, disjoint over the ranks, equally many on each.

    Args:
        dataset: What the indices are for.
        num_replicas: Number of ranks. Up to `num_replicas - 1` windows are left out, so that every rank runs the
            same number of batches (unequal ones dead-lock a collective) without repeating a window.
        rank: This rank.
        max_windows: Use this many windows, evenly spread over the file; None is all of them.

    Raises:
        ValueError: If there is not one window for each rank.
    """

    def __init__(
        self, dataset: TokenWindows, *, num_replicas: int = 1, rank: int = 0, max_windows: int | None = None
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False, drop_last=True)
        wanted = len(dataset) if max_windows is None else min(max_windows, len(dataset))
        if wanted < num_replicas:
            raise ValueError(
                f"evaluation needs a window of {dataset.block_size} tokens for each of {num_replicas} processes and"
                f" has {wanted}; lower block_size, or raise val_fraction, or max_bytes if it is set"
            )
        self.indices = [i * len(dataset) // wanted for i in range(wanted)]
        self.total_size = wanted // num_replicas * num_replicas
        self.num_samples = self.total_size // num_replicas

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices[self.rank : self.total_size : self.num_replicas])


class ResumableDataLoader(DataLoader[Any]):
    """A `DataLoader` whose position is kept elsewhere, in the state of the data module.

    Lightning warns at a resume in mid-epoch unless the loader has these two methods. The loader itself must not
    carry the position: it has prefetched batches that were never trained on.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save here."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore here."""
