"""A V-cycle on two processes whose small level merges micro-batches; run by test_merged.py."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_accel import Level, MultiLevelTraining, Phase
from tests.training import TinyModule, loader, make_trainer


def main(folder: Path, strategy: str) -> None:
    """Train without merging and with it, and save the final weights of each rank."""
    for merge in (1, 4):
        # In double precision: key biases change no output, and Adam amplifies the noise of their gradients.
        module = TinyModule(dtype=torch.float64)
        method = MultiLevelTraining([Level(merge_batches=merge)], [Phase(0, 2), Phase(1, 3), Phase(0)])
        trainer = make_trainer(
            folder,
            callbacks=[method],
            strategy=strategy,
            devices=2,
            # 10 micro-batches a rank and epoch: the last window of each epoch is a short one.
            accumulate_grad_batches=4,
            max_steps=7,
        )
        trainer.fit(module, loader(batch_size=4, num_samples=80))
        state = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in module.state_dict().items()
        }
        torch.save((len(module.losses), state), folder / f"{merge}-{trainer.global_rank}.pt")
