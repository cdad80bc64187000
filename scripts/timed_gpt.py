"""The GPT whose optimizer steps are timed, under a Trainer that does nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import lightning.pytorch as L
import torch
import transformers
from torch.utils.data import DataLoader, TensorDataset

from lit_accel.anatomy import compile_blocks

# Tells glibc not to return large buffers to the system after every use, so that no step pays for their pages anew.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
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


def train(
    module: TimedGPT,
    callbacks: list[L.Callback],
    num_steps: int,
    batch_size: int,
    num_tokens: int,
    accelerator: str = "auto",
) -> L.Trainer:
    """Train on random tokens in bfloat16 autocast; the callbacks look at the clock.

    Args:
        module: The GPT.
        callbacks: What is timed, and last what times it: so that hooks are timed too.
        num_steps: Optimizer steps.
        batch_size: Sequences of a step.
        num_tokens: Tokens of a sequence.
        accelerator: Where.
    """
    ids = torch.randint(module.model.config.vocab_size, (num_steps * batch_size, num_tokens))
    trainer = L.Trainer(
        accelerator=accelerator,
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


def run_apart(module: str, arguments: list[str], keeps_memory: bool) -> Any:
    """Run a script in a process of its own, since the allocator reads its settings when one starts.

    Args:
        module: The script.
        arguments: Its arguments.
        keeps_memory: Whether glibc is told to keep large buffers.

    Returns:
        What the last line of its output says, as JSON.
    """
    environment = {**os.environ, **(KEEP_MEMORY if keeps_memory else {})}
    command = [sys.executable, "-m", module, *arguments]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])
