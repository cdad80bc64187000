"""A study of seconds, whose runs are made as those of the real one are."""

import time
from dataclasses import replace
from pathlib import Path

from scripts.bench import __main__ as runner
from scripts.bench import log, study

_SIZES = {**study.GPT.model["overrides"], "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16}
SMALL = replace(
    study.GPT,
    name="small",
    model={**study.GPT.model, "overrides": _SIZES},
    data=(
        "TextDataModule",
        {"source": "stdlib", "tokenizer": "bytes", "block_size": 16, "batch_size": 4, "val_batches": 4},
    ),
    unit_steps=60,
    samples_per_step=4,
    tokens_per_sample=16,
    body=6_000,
)


def install(folder: Path) -> None:
    """Put the small study in the place of the real one, in this process."""
    study.RUNGS.clear()
    study.ARMS.clear()
    study.RUNGS["small"], study.ARMS["small"] = SMALL, (study.DENSE,)
    log.LOG = folder / "log.jsonl"
    runner._CLAIMS = folder / "claims"
    runner.current_commit = lambda: "of a test"


def work(folder: Path, seconds: float) -> None:
    """Make runs for a while; what a process of the runner does."""
    install(folder)
    runner.work("0", time.time() + seconds)
