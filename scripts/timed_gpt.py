"""The GPT whose optimizer steps are timed, under a Trainer that does nothing else."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
import transformers
from torch.utils.data import DataLoader, TensorDataset

from lit_accel.anatomy import compile_blocks

NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class TimedGPT(L.LightningModule):
    """A GPT on tokens that mean nothing: only the time matters.

    Args:
        config: The model.
        compiled: Whether blocks are compiled.
    """

    def __init__(self, config: transformers.GPT2Config, compiled: bool) -> None:
        super().__init__()
        self.model = transformers.GPT2LMHeadModel(config).train()
        if compiled:
            compile_blocks(self.model)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        return self.model(input_ids=batch[0], labels=batch[0], use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def train(module: TimedGPT, callbacks: list[L.Callback], num_steps: int, batch_size: int, num_tokens: int) -> L.Trainer:
    """Train on random tokens in bfloat16 autocast; the callbacks look at the clock.

    Args:
        module: The GPT.
        callbacks: What is timed, and last what times it: so that hooks are timed too.
        num_steps: Optimizer steps.
        batch_size: Sequences of a step.
        num_tokens: Tokens of a sequence.
    """
    ids = torch.randint(module.model.config.vocab_size, (num_steps * batch_size, num_tokens))
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        max_steps=num_steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(ids), batch_size=batch_size))
    return trainer
