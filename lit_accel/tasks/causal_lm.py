"""Next-token prediction.

Shapes: b batch, t tokens, v vocab.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from lit_accel.tasks.base import IGNORED_LABEL, LanguageModeling


class CausalLM(LanguageModeling):
    """Train a Hugging Face model to predict the next token.

    By the convention of Hugging Face, ``labels`` are the ``input_ids`` themselves and are shifted here, so
    the target of a position is the label one to its right; -100 is no target.

    Example::

        >>> task = CausalLM("gpt2", overrides={"n_layer": 4, "n_embd": 256, "n_head": 4}, vocab_size=4096)
        >>> trainer.fit(task, TextDataModule(vocab_size=4096))  # doctest: +SKIP
    """

    auto_class: ClassVar[Any] = AutoModelForCausalLM
    objective: ClassVar[str] = "causal"

    def targets(self, labels_bt: Tensor) -> Tensor:
        """Return the token each position is to predict, -100 where there is none, shape (b, t)."""
        # Shifting the labels, not the logits, spares a copy of the largest tensor of the step.
        return pad(labels_bt[:, 1:], (0, 1), value=IGNORED_LABEL)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Score every token of the vocabulary as the successor of every position.

        Args:
            input_ids: Tokens, shape (b, t).
            attention_mask: 1 at tokens and 0 at padding, shape (b, t). Default: no padding.

        Returns:
            Logits, shape (b, t, v).
        """
        # A key-value cache serves generation only; left to its configuration, the model would fill one at
        # each step.
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Score what follows each text: the logits at its last token that is not padding, shape (b, v)."""
        input_ids, attention_mask = batch["input_ids"], batch.get("attention_mask")
        logits_btv = self(input_ids, attention_mask)
        if attention_mask is None:
            return logits_btv[:, -1]
        positions_t = torch.arange(input_ids.shape[1], device=input_ids.device)
        last_b = (positions_t * attention_mask).argmax(dim=1)
        return logits_btv[torch.arange(len(input_ids), device=input_ids.device), last_b]
