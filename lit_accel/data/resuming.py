"""`ResumableDataModule`: what the data modules share, foremost that training goes on with exactly the next batch."""

import sys
from abc import abstractmethod
from typing import Any, Literal

import lightning.pytorch as L
import torch
import torch.distributed
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lit_accel.arguments import is_whole
from lit_accel.data.sampling import KeyedDataset, ResumableDataLoader, ShuffledSampler, SpreadSampler

Part = Literal["train", "val"]


class ResumableDataModule(L.LightningDataModule):
    """A data module over a training part and a held-out part, with its position in its checkpoints.

    In training each epoch visits each sample once, shuffled by `(seed, epoch)`, in full batches of the same number
    on every process; what is left over differs from epoch to epoch. Processes get disjoint samples, also with
    `Trainer(use_distributed_sampler=False)`.

    Args:
        batch_size: Samples in a batch of one process.
        val_batches: Evaluate on the samples of so many batches only, in all processes together, evenly spread over
            the held-out part; None is all of them.
        seed: Seed of the order.
        num_workers: Processes that load data, for each training process; 0 loads in the training process.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, batch_size: int, val_batches: int | None, seed: int, num_workers: int) -> None:
        super().__init__()
        require("batch_size", batch_size, is_whole(batch_size, 1), "a whole number, at least 1")
        require("val_batches", val_batches, val_batches is None or is_whole(val_batches, 1), "None or at least 1")
        require("seed", seed, is_whole(seed), "a whole number")
        at_least_0 = "at least 0, which loads in the training process"
        require("num_workers", num_workers, is_whole(num_workers, 0), at_least_0)
        self.batch_size = batch_size
        self.val_batches = val_batches
        self.seed = seed
        self.num_workers = num_workers
        self.set_position(epoch=0)

    @abstractmethod
    def dataset(self, part: Part) -> KeyedDataset:
        """The samples of the training part or of the held-out part."""

    @staticmethod
    def collate(samples: list[Any]) -> Any:
        """Makes a batch of samples. Static, so that worker processes are not sent the data module."""
        return torch.utils.data.default_collate(samples)

    def setup(self, stage: str) -> None:
        """Starts at the beginning of the data.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        if stage == "fit":
            # A fit that resumes loads its position after this. Another one goes on where its Trainer is, and does
            # not inherit the position of a Trainer before it.
            goes_on = self.trainer is not None and self._batches().total.processed > 0
            self.set_position(*(self._position() if goes_on else (0, 0)))

    def set_position(self, epoch: int, samples: int = 0) -> None:
        """Chooses where the next `train_dataloader` starts.

        Args:
            epoch: Epoch, from 0.
            samples: Samples of that epoch which all processes together have consumed already.
        """
        self._epoch, self._samples = epoch, samples
        self._begun: tuple[int, int] | None = None

    def train_dataloader(self) -> ResumableDataLoader:
        """The training samples. The first epoch read from it starts at the position; `len` is of a whole epoch."""
        dataset = self.dataset("train")
        epoch, samples = self._start()
        sampler = self._training_sampler(
            dataset,
            **self._replicas(),
            seed=self.seed,
            start_epoch=epoch,
            start_sample=samples,
            begin=None if self.trainer is None else self._begin_epoch,
        )
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> ResumableDataLoader:
        """The held-out samples, in a fixed order, always the same. The last batch may be smaller."""
        dataset = self.dataset("val")
        limit = None if self.val_batches is None else self.val_batches * self.batch_size
        return self._loader(dataset, self._evaluation_sampler(dataset, limit))

    def test_dataloader(self) -> ResumableDataLoader:
        """The same as `val_dataloader`: there is one held-out part."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ResumableDataLoader:
        """The same as `val_dataloader`: there is one held-out part."""
        return self.val_dataloader()

    # Resuming. torchdata's StatefulDataLoader was tried first, with a checkpoint at every batch, validation and end of
    # epoch (torchdata 0.11, Lightning 2.6). It goes on with other batches in three cases: one written after the last
    # batch of an epoch restores an exhausted iterator, which costs a whole epoch; one written at the end of an epoch
    # under `max_steps`; and with workers, one at or just after the end of an epoch, because Lightning makes the
    # iterator, which prefetches, before it calls `set_epoch`. So the position is worked out from the number of
    # batches that Lightning has trained on, and the sampler is there before any iterator is made.

    def state_dict(self) -> dict[str, Any]:
        """The position in the data. Subclasses add what it is a position in."""
        epoch, samples = self._position()
        return {"version": 1, "epoch": epoch, "samples": samples, "seed": self.seed}

    def _take_up(self, state_dict: dict[str, Any], changed: str | None) -> None:
        """Takes up the position of a checkpoint.

        Args:
            state_dict: What :meth:`state_dict` has returned.
            changed: How the samples differ from those that it counted, in words; None if they do not.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # who evaluates a checkpoint does not go back to its place in the training data
        epoch, samples = state_dict["epoch"], state_dict["samples"]
        if changed is None and state_dict.get("seed", self.seed) != self.seed:
            changed = f"the checkpoint was trained with the data in another order (seed {state_dict['seed']})"
        if changed is not None:
            self.set_position(epoch)
            rank_zero_warn(f"{changed}; the data of the current epoch ({epoch}) starts at the beginning")
        elif len(self.dataset("train")) - samples < self.batch_size * self._replicas()["num_replicas"]:
            # With larger steps than before none of them may be left. An epoch without any would be begun again for
            # ever: one that trained on nothing does not count.
            self.set_position(epoch + 1)
        else:
            self.set_position(epoch, samples)

    def _training_sampler(self, dataset: Any, **position: Any) -> ShuffledSampler:
        return ShuffledSampler(dataset, self.batch_size, **position)

    def _evaluation_sampler(self, dataset: Any, max_samples: int | None) -> SpreadSampler:
        return SpreadSampler(dataset, **self._replicas(), max_samples=max_samples)

    def _start(self) -> tuple[int, int]:
        """Epoch in which the next loader starts, and samples of it that have been consumed."""
        if self._begun is None and self.trainer is not None:
            batches, fit_loop = self._batches(), self.trainer.fit_loop
            whole = batches.is_last_batch and batches.current.completed == batches.current.ready > 0
            if fit_loop.restarting and whole:
                # The checkpoint is one of a finished epoch. With `max_steps` Lightning enters that epoch once more,
                # and would train on one batch too many in it; there must be none left.
                return self._epoch - 1, sys.maxsize
        return self._position()

    def _begin_epoch(self, lightning_epoch: int) -> tuple[int, int]:
        """Counts epochs when Lightning begins one, and returns where to start.

        Lightning's own number is not used: after a resume it can begin an epoch, find that it has no batches left,
        and begin another. An epoch that trained on nothing is not one here.
        """
        if self._begun is None:
            start = self._start()
        else:
            if self._num_trained() > 0:
                self._epoch, self._samples = self._epoch + 1, 0
            start = self._epoch, self._samples
        self._begun = lightning_epoch, self._batches().total.processed
        return start

    def _position(self) -> tuple[int, int]:
        """Epoch, and samples of it that all processes together have trained on."""
        num_trained = self._num_trained()
        if num_trained == 0:
            return self._epoch, self._samples
        assert self.trainer is not None
        assert self._begun is not None
        fit_loop: Any = self.trainer.fit_loop
        batches = fit_loop.epoch_loop.batch_progress
        ended = fit_loop.epoch_progress.current.processed > self._begun[0]
        # Lightning goes on in an epoch that was stopped early only if `max_steps` is set; else it begins another.
        if batches.current.processed >= fit_loop.max_batches or (
            ended and (batches.is_last_batch or self.trainer.max_steps == -1)
        ):
            return self._epoch + 1, 0
        return self._epoch, self._samples + num_trained * self.batch_size * self._replicas()["num_replicas"]

    def _num_trained(self) -> int:
        """Batches that this process has trained on since the epoch began; 0 before the first."""
        if self._begun is None or self.trainer is None:
            return 0
        # `processed` counts a batch before the hooks that save checkpoints run, and `completed` only after them.
        return self._batches().total.processed - self._begun[1]

    def _batches(self) -> Any:
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress

    def _loader(self, dataset: KeyedDataset, sampler: ShuffledSampler | SpreadSampler) -> ResumableDataLoader:
        return ResumableDataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate,
        )

    def _replicas(self) -> dict[str, int]:
        """Number of processes that split the data, and this one's place among them."""
        if self.trainer is not None:
            # Where processes share one batch (tensor parallelism) the strategy counts fewer than there are.
            default = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
            return getattr(self.trainer.strategy, "distributed_sampler_kwargs", default)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return {
                "num_replicas": torch.distributed.get_world_size(),
                "rank": torch.distributed.get_rank(),
            }
        return {"num_replicas": 1, "rank": 0}


def require(name: str, value: object, is_valid: bool, allowed: str) -> None:
    """Refuses an argument that is out of its range.

    Args:
        name: Its name.
        value: What was given.
        is_valid: Whether that is allowed.
        allowed: What is, in words.

    Raises:
        ValueError: If it is not valid.
    """
    if not is_valid:
        raise ValueError(f"{name} must be {allowed}, and is {value!r}")
