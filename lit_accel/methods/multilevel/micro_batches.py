"""Computing several micro-batches as one at a small level.

A small model that works on the micro-batches of the large one leaves the machine idle: the same launches, the same
calls and the same optimizer, for matrices of a quarter of the size. Its activations are smaller too, so that what did
not fit for the large model fits for it. Merging micro-batches of one accumulation window changes nothing else: the
optimizer steps, the data and their order, and the gradient are what they were.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    # A Trainer is worked on, but none is needed: the core imports no Lightning.
    import lightning.pytorch as L


class MicroBatchMerger:
    """Takes the place of a strategy's ``training_step`` and merges micro-batches before it.

    Args:
        trainer: The Trainer; its strategy is changed until :meth:`close`.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.num_merged = 1
        """How many micro-batches are merged; to be changed between optimizer steps only."""
        self._trainer = trainer
        self._waiting: list[Any] = []
        self._training_step = trainer.strategy.training_step
        trainer.strategy.training_step = self._run  # type: ignore[method-assign]

    def close(self) -> None:
        """Give the strategy its own ``training_step`` back."""
        vars(self._trainer.strategy).pop("training_step", None)

    def _run(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        # A callback may have changed the accumulation: a window must hold whole groups.
        num_merged = math.gcd(self.num_merged, self._trainer.accumulate_grad_batches)
        # The place in the epoch decides, by which Lightning steps too. A count of what waits would begin at 0 after a
        # resume in the middle of a window, and stay shifted against the windows.
        position = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if (position - 1) % num_merged == 0:
            # An epoch that was broken off in the middle of a window leaves what Lightning does not step with either.
            self._waiting.clear()
        if num_merged == 1:
            return self._training_step(batch, *args, **kwargs)
        self._waiting.append(batch)
        if position % num_merged and not self._is_last_of_epoch(position):
            # Lightning forbids to skip a batch on several processes; a constant has a gradient that nobody holds.
            return torch.zeros((), device=self._trainer.strategy.root_device, requires_grad=True)
        waiting, self._waiting = self._waiting, []
        output = self._training_step(merge_batches(waiting), *args, **kwargs)
        # Lightning divides by the number of micro-batches of the window; this output stands for several of them.
        if isinstance(output, Mapping):
            return {**output, "loss": output["loss"] * len(waiting)}
        return None if output is None else output * len(waiting)

    def _is_last_of_epoch(self, position: int) -> bool:
        """Whether Lightning steps after this batch, however short the window is."""
        return self._trainer.is_last_batch or position == self._trainer.num_training_batches


def merge_batches(batches: list[Any]) -> Any:
    """Concatenate batches along the first dimension of each of their tensors.

    Args:
        batches: Batches of one structure: tensors in mappings (``BatchEncoding`` is one), tuples, lists and
            dataclasses. Anything else must be the same in all of them.

    Raises:
        ValueError: If they cannot be concatenated.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        shapes = [tuple(batch.shape) for batch in batches]
        if first.ndim == 0 or len({shape[1:] for shape in shapes}) > 1:
            raise ValueError(
                f"Micro-batches with tensors of the shapes {', '.join(map(str, shapes))} cannot be merged into one: "
                "they must agree in all but the first dimension. Pad them to one length, or set merge_batches=1."
            )
        return torch.cat(batches)
    if isinstance(first, Mapping):
        items = {key: merge_batches([batch[key] for batch in batches]) for key in first}
        if not isinstance(first, MutableMapping):
            return items
        # What a training step may ask of the kind that it is used to, it has.
        mapping = copy.copy(first)
        mapping.update(items)
        return mapping
    if is_dataclass(first) and not isinstance(first, type):
        result = copy.copy(first)
        for field in fields(first):
            # The setter of a frozen one refuses.
            merged = merge_batches([getattr(batch, field.name) for batch in batches])
            object.__setattr__(result, field.name, merged)
        return result
    if isinstance(first, (tuple, list)):
        parts = [merge_batches(list(part)) for part in zip(*batches, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if any(batch != first for batch in batches):
        raise ValueError(
            f"Micro-batches that hold {first!r} and other values in the same place cannot be merged into one. Put such "
            "values into tensors with one entry a sample, or set merge_batches=1."
        )
    return first
