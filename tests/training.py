"""A small LightningModule over a model of the zoo, and runs of it: what the tests of training share."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, Dataset

from tests.models import make_model

SIZE = {"heads": 4, "head_dim": 4, "ffn": 32, "blocks": 4, "vocab": 64}


class Tokens(Dataset):
    """Sequences that count up, with noise: learnable, and the same everywhere."""

    def __init__(self, num_samples: int = 256, length: int = 12) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(3, 60, (num_samples, 1), generator=generator)
        noise = torch.randint(0, 2, (num_samples, length), generator=generator)
        self.ids = (start + torch.arange(length) + noise) % 61 + 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.ids[index]


class TinyModule(L.LightningModule):
    """Any LightningModule of a user: nothing in it knows of lit-accel."""

    def __init__(
        self,
        name: str = "gpt2-tied",
        dtype: torch.dtype = torch.float32,
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        scheduler: str | None = None,
        lr: float = 1e-2,
        seed: int = 0,
        net: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.net = (make_model(name, dtype=dtype, seed=seed, **SIZE) if net is None else net).train()
        self.optimizer, self.scheduler, self.lr = optimizer, scheduler, lr
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.sizes: list[int] = []

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.net(input_ids=ids).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.sizes.append(sum(parameter.numel() for parameter in self.net.parameters()))
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self.net(input_ids=batch).logits

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        # Inside of the closure the hooks have run and the step has not: the rate that is used.
        self.rates.append(optimizer.param_groups[0]["lr"])
        return super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=self.lr)
        if self.scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        made = {
            "linear": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps),
            "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps)),
            "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=int(steps) + 1),
        }[self.scheduler]()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}


def loader(batch_size: int = 8, num_samples: int = 256) -> DataLoader:
    return DataLoader(Tokens(num_samples), batch_size=batch_size)


def make_trainer(tmp_path, *, callbacks=(), strategy="resizable", **kwargs) -> L.Trainer:
    """A quiet Trainer on one CPU process."""
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "strategy": strategy,
            "default_root_dir": tmp_path,
            "callbacks": list(callbacks),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **kwargs,
        }
    )
