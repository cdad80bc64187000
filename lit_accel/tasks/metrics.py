"""Means over the tokens or images of a whole held-out set, however they fall into batches and ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric


class SampleMean(Metric):
    """The mean over samples (tokens or images) of a quantity that comes as one mean a batch.

    Not torchmetrics' ``MeanMetric``: that one either searches every batch for NaN, waiting for the device, or
    (``nan_strategy="disable"``, torchmetrics 1.9) ignores the weights. Here a NaN shows in the result.
    """

    full_state_update = False
    total: Tensor
    num_samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        # Whole numbers, because single precision counts only to 16 million.
        self.add_state("num_samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, mean: Tensor, num_samples: Tensor) -> None:
        """Add a batch.

        Args:
            mean: Mean over the batch's samples, a scalar.
            num_samples: How many there were, a scalar; 0 adds nothing.
        """
        self.total += mean.to(self.total.dtype) * num_samples
        self.num_samples += num_samples

    def compute(self) -> Tensor:
        """Return the mean over every sample since the last reset, NaN if there was none."""
        return self.total / self.num_samples

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        # With `precision="bf16-true"` Lightning turns all of a module into 16 bits. There a sum of a few hundred no
        # longer grows, and it overflows those of float16.
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)


class TokenPerplexity(SampleMean):
    """The exponential of the mean loss; torchmetrics' own takes a second softmax over the vocabulary."""

    def compute(self) -> Tensor:
        """Return the exponential of the mean loss over every token since the last reset."""
        return super().compute().exp()
