"""The two orders in which samples are read: shuffled for training, fixed for evaluation.

A sampler here yields *keys*, not indices: `key = epoch * num_samples + index`. The data set can then tell which
pass over the data it serves without being told, in any worker process and after any resume, and a plain index
(as from a sampler that somebody else put in) is simply a key of epoch 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_accel.draws import generator

_ORDER = 1  # sets the draws of the order apart from other draws with the same seed


class KeyedDataset(Dataset[Any], ABC):
    """A data set that is read by keys. Its samples are pure functions of them."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples of one epoch."""

    def __getitem__(self, key: int) -> Any:
        """Returns one sample.

        Args:
            key: `epoch * len(self) + index`.
        """
        epoch, index = divmod(int(key), len(self))
        return self.sample(epoch, index)

    @abstractmethod
    def sample(self, epoch: int, index: int) -> Any:
        """Makes one sample."""


class ShuffledSampler(DistributedSampler[Any]):
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
        ValueError: If there are too few samples for one batch on each rank.
    """

    def __init__(
        self,
        dataset: KeyedDataset,
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
        self.num_keys, self.samples_per_step = len(dataset), batch_size * num_replicas
        if self.num_keys < self.samples_per_step:
            raise ValueError(self.too_few(batch_size))
        self.total_size = self.num_keys // self.samples_per_step * self.samples_per_step
        self.num_samples = self.total_size // num_replicas
        self.epoch = start_epoch
        self.start_sample = start_sample
        self.begin = begin

    def too_few(self, batch_size: int) -> str:
        """Says what is wrong where there are fewer samples than one step needs, and what to do."""
        return (
            f"the training part has {self.num_keys} samples, fewer than the {batch_size} x {self.num_replicas}"
            " (batch_size x processes) that one step needs; lower batch_size"
        )

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
        start = min(self.start_sample, self.num_keys)
        # After a resume with steps of another size, what is left over is counted from where it goes on.
        stop = self.num_keys - (self.num_keys - start) % self.samples_per_step
        order = torch.randperm(self.num_keys, generator=generator(self.seed, _ORDER, self.epoch))
        mine = order[start + self.rank : stop : self.num_replicas]
        return iter((mine + self.epoch * self.num_keys).tolist())


class SpreadSampler(DistributedSampler[Any]):
    """Indices in a fixed order, evenly spread, disjoint over the ranks, equally many on each.

    Args:
        dataset: What the indices are for.
        num_replicas: Number of ranks. Up to `num_replicas - 1` samples are left out, so that every rank runs the
            same number of batches (unequal ones dead-lock a collective) without repeating a sample.
        rank: This rank.
        max_samples: Use this many samples, evenly spread over all; None is all of them.

    Raises:
        ValueError: If there is not one sample for each rank.
    """

    def __init__(
        self, dataset: KeyedDataset, *, num_replicas: int = 1, rank: int = 0, max_samples: int | None = None
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False, drop_last=True)
        wanted = len(dataset) if max_samples is None else min(max_samples, len(dataset))
        if wanted < num_replicas:
            raise ValueError(self.too_few(wanted))
        self.indices = [i * len(dataset) // wanted for i in range(wanted)]
        self.total_size = wanted // num_replicas * num_replicas
        self.num_samples = self.total_size // num_replicas

    def too_few(self, wanted: int) -> str:
        """Says what is wrong where some rank would have no sample, and what to do."""
        return (
            f"evaluation needs a sample for each of {self.num_replicas} processes and has {wanted};"
            " hold out more of the data, or raise val_batches if it is set"
        )

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
