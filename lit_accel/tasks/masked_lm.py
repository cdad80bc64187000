"""Masked-token prediction.

Shapes: b batch, t tokens, v vocab.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoModelForMaskedLM

from lit_accel.tasks.base import LanguageModeling


class MaskedLM(LanguageModeling):
    """Train a Hugging Face model to restore masked tokens.

    The data does the masking: ``labels`` hold the original token at each masked position and -100 everywhere
    else.

    Example::

        >>> task = MaskedLM("bert", overrides={"num_hidden_layers": 4, "hidden_size": 256}, vocab_size=4096)
        >>> trainer.fit(task, TextDataModule(vocab_size=4096, objective="masked"))  # doctest: +SKIP
    """

    auto_class: ClassVar[Any] = AutoModelForMaskedLM
    objective: ClassVar[str] = "masked"

    def targets(self, labels_bt: Tensor) -> Tensor:
        """Return the token each position is to predict, -100 where there is none, shape (b, t)."""
        return labels_bt

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Score every token of the vocabulary at every position, masked or not: logits of shape (b, t, v)."""
        return self(batch["input_ids"], batch.get("attention_mask"))
