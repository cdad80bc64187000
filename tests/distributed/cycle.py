"""A three-level V-cycle on real text, to be killed and resumed: what one process of the test does."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_accel import Level, MultiLevelTraining, Phase
from lit_accel.data import TextDataModule
from lit_accel.tasks import CausalLM, WarmupDecay
from tests.distributed.kill import Kill
from tests.distributed.schedule import PHASES, STEPS


class Replicas(L.Callback):
    """After every step, all ranks must hold the same weights, bit for bit."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        flat = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
        if trainer.world_size > 1:
            assert torch.equal(*trainer.strategy.all_gather(flat)), f"replicas differ after step {trainer.global_step}"
            batches = trainer.strategy.all_gather(batch["input_ids"])
            assert not torch.equal(*batches), "both ranks saw the same data"


class DifferentStart(CausalLM):
    """Ranks that initialise differently, which the wrapper's broadcast must make equal, at each size."""

    def setup(self, stage):
        torch.manual_seed(100 + self.global_rank)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)


def main(folder: Path, devices: int, kill_at: int | None) -> None:
    L.seed_everything(3, verbose=False)
    data = TextDataModule(
        max_bytes=60_000,
        tokenizer="bytes",
        block_size=16,
        batch_size=2,
        seed=1,
        cache_dir=folder.parent / "cache",
    )
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    module = DifferentStart(
        "gpt2",
        overrides={"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 16, **dropout},
        vocab_size=data.vocab_size,
        lr_scheduler=lambda optimizer: WarmupDecay(optimizer, num_warmup_steps=3),
    )
    method = MultiLevelTraining(
        [Level(), Level()],
        [Phase(level, length) for level, length in PHASES],
        alpha=0.5,
        optimizer_state="project",
        learning_rate="rewarm",
        num_rewarm_steps=2,
    )
    callbacks = [method, Replicas()]
    if kill_at is not None:
        callbacks.append(Kill(kill_at))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="resizable_ddp" if devices > 1 else "resizable",
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[*callbacks, ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "final.pt")
