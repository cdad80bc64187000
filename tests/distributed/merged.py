"""V-cycles on two processes whose small level merges micro-batches; run by test_merged.py."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

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


def resume_in_mid_window(folder: Path) -> None:
    """Go on from the middle of a window, without merging and with it, and save the final weights of each rank."""
    for merge in (1, 4):
        for checkpoint in (None, folder / f"{merge}" / "step=3.ckpt"):
            module = TinyModule(dtype=torch.float64)
            method = MultiLevelTraining([Level(merge_batches=merge)], [Phase(0, 2), Phase(1, 3), Phase(0)])
            save = ModelCheckpoint(folder / f"{merge}", filename="{step}", monitor="val/loss", save_top_k=-1)
            trainer = make_trainer(
                folder,
                callbacks=[method, *([save] if checkpoint is None else [])],
                strategy="resizable_ddp",
                devices=2,
                accumulate_grad_batches=4,
                max_steps=7,
                val_check_interval=14,
                enable_checkpointing=checkpoint is None,
            )
            trainer.fit(module, loader(batch_size=4, num_samples=256), loader(num_samples=16), ckpt_path=checkpoint)
        torch.save((len(module.losses), module.state_dict()), folder / f"{merge}-{trainer.global_rank}.pt")
