"""Whether memory grows: 2,000 steps in which the model changes every 50, once by levels and once by units.

Writes ``scripts/results/soak_memory.json``.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from rich.console import Console
from rich.table import Table

from lit_accel import ComputeLedger, Level, MixedSparsityTraining, MultiLevelTraining, Phase
from lit_accel.data import TextDataModule
from lit_accel.tasks import CausalLM
from scripts.soaking.recording import origin

RESULT = Path(__file__).parents[1] / "results" / "soak_memory.json"
STEPS, EVERY = 2_000, 50
CYCLE = 2 * EVERY
"""Steps after which the model is what it was."""
WARM_UP = 3
"""Cycles before the first sample that counts: there libraries load what they need, and the allocator meets each size of
tensor for the first time. All samples are in the file, these among them."""
LIMIT = 0.02
_KEPT = 3


def resident_bytes() -> int:
    """Return the memory that this process really occupies."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Samples(L.Callback):
    """Notes the resident memory after each cycle, at the same place of it."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Take a sample."""
        if trainer.global_step % CYCLE == 0:
            self.bytes.append(resident_bytes())


def by_levels() -> L.Callback:
    """Return a V-cycle over and over again."""
    num_phases = STEPS // EVERY
    phases = [Phase(index % 2, EVERY) for index in range(num_phases)]
    # A run ends with the full model.
    return MultiLevelTraining([Level()], [*phases[:-1], Phase(1, EVERY - 1), Phase(0)], optimizer_state="project")


def by_units() -> L.Callback:
    """Return updates of the topology, and every second time another sparsity, to which the model is rebuilt."""
    stages = [(step, 0.5 if step % CYCLE == 0 else 0.25) for step in range(0, STEPS - EVERY, EVERY)]
    return MixedSparsityTraining(stages=[*stages, (STEPS - EVERY, 0.0)], update_every=EVERY, drop_fraction=0.5)


ARMS = {"levels": by_levels, "units": by_units}


def run(arm: str, sent: Any) -> None:
    """Train, and send the samples."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    data = TextDataModule(tokenizer="bytes", max_bytes=200_000, block_size=32, batch_size=4)
    # Large enough that a model of which something stays behind would show within a few cycles.
    shape = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 32}
    samples = Samples()
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="resizable",
        max_steps=STEPS,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[ARMS[arm](), ComputeLedger(print_table=False), samples],
        logger=False,
        default_root_dir=tempfile.mkdtemp(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CausalLM("gpt2", overrides=shape, vocab_size=data.vocab_size), data)
    sent.send(samples.bytes)


def measure(console: Console) -> int:
    """Measure all arms, each in a fresh process; write and print what was found.

    Args:
        console: Where to print.

    Returns:
        0 if memory is flat, 1 if it grows.
    """
    source, context = origin(), multiprocessing.get_context("spawn")
    arms = {}
    table = Table("what changes", "cycles", "first counted", "last", "largest", "growth", title="Resident memory, MiB")
    for arm in ARMS:
        received, sent = context.Pipe(duplex=False)
        process = context.Process(target=run, args=(arm, sent))
        process.start()
        sent.close()
        samples = received.recv()
        process.join()
        counted = samples[WARM_UP:]
        growth = max(counted) / counted[0] - 1
        arms[arm] = {"resident_bytes": samples, "growth": growth, "is_flat": growth <= LIMIT}
        mib = [f"{value / 2**20:.1f}" for value in (counted[0], counted[-1], max(counted))]
        table.add_row(arm, str(len(samples)), *mib, f"{growth:+.2%}")
    console.print(table)
    settings = {"steps": STEPS, "switch_every": EVERY, "warm_up_cycles": WARM_UP, "limit": LIMIT}
    earlier = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    RESULT.write_text(json.dumps([*earlier, {**source, **settings, "arms": arms}][-_KEPT:], indent=1) + "\n")
    return int(not all(arm["is_flat"] for arm in arms.values()))
