"""Runs that are planned and then trained: what the tests of planning share."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from lit_accel import ComputeLedger
from tests.training import TinyModule, Tokens

STEPS = 40


class Data(L.LightningDataModule):
    """What a user brings: loaders, and nothing that says how long sequences are."""

    def __init__(self, batch_size=8, length=12):
        super().__init__()
        self.given = batch_size, length

    def train_dataloader(self):
        batch_size, length = self.given
        return DataLoader(Tokens(length=length), batch_size=batch_size, drop_last=True)


def trainer(tmp_path, callbacks, **options):
    settings = {
        "strategy": "resizable",
        "max_steps": STEPS,
        "max_epochs": -1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 10,
        **options,
    }
    return L.Trainer(default_root_dir=tmp_path, callbacks=callbacks, **settings)


def on_meta(make=TinyModule, *args, **kwargs):
    with torch.device("meta"):
        return make(*args, **kwargs)


def trained(tmp_path, callbacks, module=None, data=None, **options):
    """Train, and return the ledger's phases."""
    ledger = ComputeLedger(print_table=False)
    trainer(tmp_path, [*callbacks, ledger], **options).fit(module or TinyModule(), data or Data())
    return ledger.phases


def facts(phases):
    return [(p.steps, p.tokens, p.flops, p.dense_flops, p.num_parameters, p.size) for p in phases]
