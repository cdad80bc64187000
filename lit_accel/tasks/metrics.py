"""Means over the tokens of a whole held-out set, however they fall into batches and ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMean(Metric):
    """The mean over tokens of a quantity that comes as one mean a batch.

    Not torchmetrics' ``MeanMetric``: that one either searches every batch for NaN, waiting for the device, or
    (``nan_strategy="disable"``, torchmetrics 1.9) ignores the weights. Here a NaN shows in the result.
    """

    full_state_update = False
    total: Tensor
    num_tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        # Whole numbers, because single precision counts only to 16 million.
        self.add_state("num_tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, mean: Tensor, num_tokens: Tensor) -> None:
        """Add a batch.

        Args:
            mean: Mean over the batch's tokens, a scalar.
            num_tokens: How many there were, a scalar; 0 adds nothing.
        """
        self.total += mean * num_tokens
        self.num_tokens += num_tokens

    def compute(self) -> Tensor:
        """Return the mean over every token since the last reset, NaN if there was none."""
        return self.total / self.num_tokens


class TokenPerplexity(TokenMean):
    """The exponential of the mean loss; torchmetrics' own takes a second softmax over the vocabulary."""

    def compute(self) -> Tensor:
        """Return the exponential of the mean loss over every token since the last reset."""
        return super().compute().exp()
