"""A V-cycle with a sharded model, and the same on one device: what one process of the tests does."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lit_accel import Level, MultiLevelTraining, Phase
from lit_accel.anatomy import compile_blocks
from lit_accel.strategies import ResizableModelParallelStrategy
from tests.distributed.kill import Kill
from tests.models import make_model
from tests.training import SIZE, Tokens

PHASES = [(0, 2), (1, 4), (0, None)]
SWITCHES = [2, 6]
INSIDE_SMALL = 4
STEPS = 9
GLOBAL_BATCH = 4
ACCUMULATED: dict[str, Any] = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}


class Host(L.LightningModule):
    """A user's module with more in it than a transformer: a layer that trains, one that does not, and buffers."""

    def __init__(self, name: str = "gpt2-tied") -> None:
        super().__init__()
        self.net = make_model(name, dtype=torch.float32, **SIZE).train()
        self.head = nn.ModuleList([nn.LayerNorm(SIZE["vocab"])])
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.long))
        self.losses: list[float] = []
        self.tokens = Tokens(num_samples=512).ids

    def setup(self, stage):
        # Ranks that initialise differently: those of rank 0 must win.
        if self.global_rank:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.add_(torch.randn_like(parameter))

    def loss(self, ids):
        logits = self.head[0](self.net(input_ids=ids).logits)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    def share(self, batch_idx):
        """This rank's part of a global batch, which is the same for any number of ranks."""
        return self.tokens[batch_idx * GLOBAL_BATCH :][:GLOBAL_BATCH][self.global_rank :: self.trainer.world_size]

    def training_step(self, batch, batch_idx):
        self.num_seen += 1
        loss = self.loss(self.share(batch_idx))
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(self.share(100 + batch_idx)), sync_dist=True)

    def configure_optimizers(self):
        # A large epsilon: where a gradient is zero but for rounding, Adam would make a whole step of the rounding.
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Freed(L.Callback):
    """After a transition nothing of the old model is left. Stands left of the method."""

    def __init__(self) -> None:
        self.old: list[weakref.ref] = []
        self.num_checked = 0
        self.step = -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        is_first, self.step = trainer.global_step != self.step, trainer.global_step
        if is_first and self.step in SWITCHES:
            (optimizer,) = trainer.optimizers
            inside = list(pl_module.net.parameters())
            moments = [value for p in inside for value in optimizer.state[p].values()]
            self.old = [weakref.ref(held) for held in [*inside, *moments, optimizer, *pl_module.net.modules()]]

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        alive = [held() for held in self.old if held() is not None]
        assert not alive, f"still alive: {[type(held).__name__ for held in alive]}"
        self.num_checked += len(self.old)
        self.old = []


def full_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights, on every rank."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in module.state_dict().items()
    }


def make_trainer(callbacks: list[L.Callback], *, sharded: bool = True, single_file: bool = False, **options: Any):
    return L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=ResizableModelParallelStrategy(save_distributed_checkpoint=not single_file)
        if sharded
        else "resizable",
        callbacks=callbacks,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def train(
    folder: Path,
    name: str,
    *,
    resume: str | None = None,
    kill_at: int | None = None,
    optimizer_state: str = "project",
    prepare: str | None = None,
    save: bool = False,
    **options: Any,
) -> Host:
    """Run the cycle, or its rest, and write the final weights to ``<name>.pt``."""
    L.seed_everything(3, verbose=False)
    module = Host()
    if prepare == "checkpointing":
        module.net.gradient_checkpointing_enable()
    if prepare == "compile":
        compile_blocks(module.net, backend="eager")
    method = MultiLevelTraining(
        [Level()],
        [Phase(level, length) for level, length in PHASES],
        alpha=0.5,
        optimizer_state=optimizer_state,
        learning_rate="rewarm",
        num_rewarm_steps=2,
    )
    freed = Freed()
    callbacks: list[L.Callback] = [freed, method]
    if kill_at is not None:
        callbacks.append(Kill(kill_at))
    if save:
        callbacks.append(ModelCheckpoint(folder / name, "{step}", every_n_train_steps=1, save_top_k=-1))
    options = {"limit_val_batches": 0, **options}
    trainer = make_trainer(callbacks, max_steps=STEPS, max_epochs=-1, enable_checkpointing=save, **options)
    data = DataLoader(range(100), batch_size=1)
    trainer.fit(module, data, data, ckpt_path=resume and folder / resume)
    assert resume or freed.num_checked
    weights = full_state(module)
    if trainer.is_global_zero:
        torch.save(weights, folder / f"{name}.pt")
    return module


def validate(folder: Path, name: str, checkpoint: str, **options: Any) -> None:
    """Evaluate a checkpoint, of whatever size, and write the loss to ``<name>.pt``."""
    trainer = make_trainer([MultiLevelTraining([Level()])], limit_val_batches=2, **options)
    (metrics,) = trainer.validate(
        Host(), DataLoader(range(100), batch_size=1), ckpt_path=folder / checkpoint, verbose=False
    )
    if trainer.is_global_zero:
        torch.save({"loss": torch.tensor(metrics["val/loss"])}, folder / f"{name}.pt")


def on_one_process(folder: Path) -> None:
    train(folder, "single", sharded=False)
    train(folder, "single-reset", sharded=False, optimizer_state="reset", **ACCUMULATED)
    train(folder, "one", save=True)


def on_two_processes(folder: Path) -> None:
    train(folder, "two", save=True)
    # Evaluations leave gathered weights behind, just before both transitions.
    train(folder, "file", save=True, single_file=True, limit_val_batches=2, val_check_interval=2)
    for step in (INSIDE_SMALL, SWITCHES[1]):
        train(folder, f"one-to-two-{step}", resume=f"one/step={step}.ckpt")
    train(folder, "file-to-file", resume=f"file/step={INSIDE_SMALL}.ckpt", single_file=True)
    train(folder, "two-reset", optimizer_state="reset", **ACCUMULATED)
    train(folder, "checkpointing", prepare="checkpointing")
    train(folder, "compile", prepare="compile")
    train(folder, "bf16", precision="bf16-mixed")
    validate(folder, "validate-two", f"two/step={INSIDE_SMALL}.ckpt")
    validate(folder, "validate-file", f"file/step={INSIDE_SMALL}.ckpt")


def on_one_process_again(folder: Path) -> None:
    for step in (INSIDE_SMALL, SWITCHES[1]):
        train(folder, f"two-to-one-{step}", resume=f"two/step={step}.ckpt")
    train(folder, "file-to-single", resume=f"file/step={INSIDE_SMALL}.ckpt", sharded=False)
    validate(folder, "validate-single", f"file/step={INSIDE_SMALL}.ckpt", sharded=False)


def killed(folder: Path, kill_at: int | None, resume: str | None) -> None:
    train(folder, "killed", resume=resume, kill_at=kill_at, save=True)
