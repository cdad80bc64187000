"""One process of a run that is soaked: the public interface of lit-accel, a journal, and perhaps a death."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import timm.models.deit  # noqa: F401  # imported here, so that a forked process need not
import torch
import transformers.models.bert.modeling_bert
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lit_accel import ComputeLedger
from lit_accel.batch_seed import BatchSeed
from lit_accel.data import ImageDataModule, TextDataModule
from lit_accel.tasks import CausalLM, ImageClassification, MaskedLM, WarmupDecay
from scripts.soaking.cases import STEPS, Case, methods_of, strategy_of
from scripts.soaking.deaths import Death, Reaper
from scripts.soaking.journal import Journal

CHECKPOINTS, LOGS, FINAL, WEIGHTS = "checkpoints", "logs", "final.ckpt", "weights.pt"
LIMIT = 400.0
"""Seconds after which a process says where it is, and ends."""

_BLOCKS, _EMBED, _HEADS, _NUM_TOKENS = 6, 32, 4, 32
TEXT: dict[str, Any] = {"max_bytes": 6_000, "vocab_size": 300, "block_size": _NUM_TOKENS, "val_fraction": 0.2}
"""Little text: few optimizer steps an epoch, so that a run sees the ends of some."""


def data_of(case: Case, cache: Path) -> L.LightningDataModule:
    """Make the data of a case: real text or images.

    Args:
        case: The case.
        cache: The folder of token files.
    """
    shared: dict[str, Any] = {"batch_size": case.batch_size, "val_batches": 2 * case.ranks, "seed": 1}
    if case.family == "deit":
        return ImageDataModule(image_size=16, in_chans=1, val_fraction=0.95, **shared)
    objective: Any = "masked" if case.family == "bert" else "causal"
    return TextDataModule(objective=objective, cache_dir=cache, **TEXT, **shared)


def module_of(case: Case, data: Any) -> L.LightningModule:
    """Make the LightningModule of a case: six blocks and four heads, with everything that tends to be in a recipe."""
    shared: dict[str, Any] = {
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=3e-3),
        "lr_scheduler": lambda optimizer: WarmupDecay(optimizer, num_warmup_steps=0.1, decay="cosine"),
        "weight_decay": 0.05,
    }
    if case.family == "deit":
        shape = {"patch_size": 4, "embed_dim": _EMBED, "depth": _BLOCKS, "num_heads": _HEADS}
        return ImageClassification(
            "deit_tiny_patch16_224",
            model_kwargs={
                **shape,
                "drop_rate": case.dropout,
                "proj_drop_rate": case.dropout,
                "drop_path_rate": case.dropout,
            },
            num_classes=data.num_classes,
            in_chans=1,
            image_size=16,
            label_smoothing=0.1,
            mixup=0.2,
            **shared,
        )
    if case.family == "bert":
        shape = {"hidden_size": _EMBED, "num_hidden_layers": _BLOCKS, "num_attention_heads": _HEADS}
        dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), case.dropout)
        sizes = {"intermediate_size": 4 * _EMBED, "max_position_embeddings": _NUM_TOKENS, "pad_token_id": None}
        return MaskedLM("bert", overrides={**shape, **sizes, **dropout}, vocab_size=data.vocab_size, **shared)
    shape = {"n_embd": _EMBED, "n_layer": _BLOCKS, "n_head": _HEADS, "n_positions": _NUM_TOKENS}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), case.dropout)
    return CausalLM("gpt2", overrides={**shape, **dropout}, vocab_size=data.vocab_size, **shared)


def loops_of(case: Case) -> dict[str, Any]:
    """Return the arguments of the Trainer that differ between families: accumulation, and when it evaluates."""
    if case.family == "deit":
        return {"check_val_every_n_epoch": 1}
    if case.family == "bert":
        return {"accumulate_grad_batches": 2, "val_check_interval": 9, "check_val_every_n_epoch": None}
    return {"val_check_interval": 7, "check_val_every_n_epoch": None}


class Watch(L.Callback):
    """Keeps the journal, and writes down how a run has ended. Stands right of all methods.

    Args:
        journal: The journal.
        folder: The folder of the run.
        start: Which process of the run this is.
    """

    def __init__(self, journal: Journal, folder: Path, start: int) -> None:
        self.journal = journal
        self.folder = folder
        self.start = start

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have every checkpoint noted once it is written."""
        save_checkpoint = trainer.save_checkpoint

        def noted(path: Any, *args: Any, **kwargs: Any) -> None:
            save_checkpoint(path, *args, **kwargs)
            if trainer.is_global_zero:
                self.journal.note("saved", sync=True, step=trainer.global_step, path=Path(path).name)

        trainer.save_checkpoint = noted  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where this process goes on."""
        if trainer.is_global_zero:
            self.journal.note("starts", start=self.start, step=trainer.global_step, time=time.time())

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step: whoever is killed from outside cannot say it himself."""
        if trainer.is_global_zero:
            self.journal.note("step", start=self.start, step=trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write down the whole state, whenever the last checkpoint was; also where there was nothing left to train."""
        weights = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in pl_module.state_dict().items()
        }
        if isinstance(trainer.strategy, ModelParallelStrategy):
            # One file, whatever the checkpoints are.
            trainer.strategy._save_distributed_checkpoint = False
        # Not the noted one: this is no checkpoint to resume from.
        type(trainer).save_checkpoint(trainer, self.folder / FINAL)
        if trainer.is_global_zero:
            torch.save(weights, self.folder / WEIGHTS)
            self.journal.note("ends", step=trainer.global_step, time=time.time())


def train(case: Case, folder: Path, cache: Path, start: int, save_every: int, death: Death | None) -> None:
    """Train a case, or its rest, as a process that a user has started once more.

    Args:
        case: The case.
        folder: The folder of the run, with whatever earlier processes have left.
        cache: The folder of token files.
        start: Which process of the run this is, from 0.
        save_every: Optimizer steps between checkpoints.
        death: When this process is to die; ``None`` lets it live.
    """
    rank = int(os.environ.get("RANK", 0))
    speak_to(folder / f"output-{start}-{rank}.txt")
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    # What a killed writer leaves behind is to be found.
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    tempfile.tempdir = str(temporary)
    warnings.filterwarnings("ignore", ".*(does not have many workers|last.ckpt|tensorboardX).*")
    L.seed_everything(3, verbose=False)
    journal = Journal(folder)
    data = data_of(case, cache)
    callbacks: list[L.Callback] = [
        *methods_of(case),
        *([BatchSeed()] if case.dropout else []),
        ComputeLedger(print_table=False),
        LearningRateMonitor("step"),
        Watch(journal, folder, start),
        ModelCheckpoint(folder / CHECKPOINTS, save_last=True, save_top_k=0, every_n_train_steps=save_every),
    ]
    if death is not None and death.kind != "time" and death.rank == rank:
        callbacks.insert(-1, Reaper(death, journal))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=case.ranks,
        strategy=strategy_of(case),
        max_steps=STEPS,
        max_epochs=-1,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        # A folder a process: the logger deletes what it finds.
        logger=CSVLogger(folder / LOGS, name="", version=f"start_{start}", flush_logs_every_n_steps=1),
        enable_progress_bar=False,
        enable_model_summary=False,
        **loops_of(case),
    )
    trainer.fit(module_of(case, data), datamodule=data, ckpt_path="last")
    faulthandler.cancel_dump_traceback_later()


def speak_to(path: Path) -> None:
    """Send everything that this process says to a file, down to what C++ prints.

    Args:
        path: The file.
    """
    with path.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
