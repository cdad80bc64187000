"""A first look at what layer dropping is worth: a small GPT of 12 blocks, dense and with blocks dropped.

Methods train as many steps as the longest dense run and cost less; beside them stand the controls that cost as little:
dense training for fewer steps, with its own completed learning-rate decay, and a shallower dense model. Runs are
appended to ``scripts/results/layer_dropping_quality.jsonl`` as they finish; calling the script again goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import transformers
from rich.console import Console
from rich.table import Table

from lit_accel import ProgressiveLayerDropping, SensitivityLayerDropping
from lit_accel.compute import read_ledger
from lit_accel.compute.provenance import provenance
from scripts.small_gpt import Setup

RESULTS = Path(__file__).parent / "results" / "layer_dropping_quality.jsonl"
SETUP = Setup(num_blocks=12, embed=64, heads=4, vocab_size=1024, block_size=128, batch_size=16, num_steps=800)
DENSE, SHORTER, SHALLOWER = "dense", "dense, 80 % of the steps", "dense, 9 of the blocks"
ARMS: dict[str, Callable[[], L.Callback | None]] = {
    DENSE: lambda: None,
    SHORTER: lambda: None,
    SHALLOWER: lambda: None,
    "PLD as published": lambda: ProgressiveLayerDropping(scale="sublayer", sampler="bernoulli"),
    "PLD": lambda: ProgressiveLayerDropping(),
    "PLD, release 20 %": lambda: ProgressiveLayerDropping(release=0.2),
    "PLD, decreasing": lambda: ProgressiveLayerDropping(direction="decreasing", theta=0.3),
    "SBLD": lambda: SensitivityLayerDropping(),
    "SBLD, depth allocation": lambda: SensitivityLayerDropping(allocation="depth"),
    "SBLD, uniform allocation": lambda: SensitivityLayerDropping(allocation="uniform"),
}


def run_once(name: str, seed: int, lr: float) -> dict[str, Any]:
    """Train one arm and return what it cost and reached."""
    callback = ARMS[name]()
    setup = replace(SETUP, num_blocks=9) if name == SHALLOWER else SETUP
    num_steps = round(0.8 * setup.num_steps) if name == SHORTER else setup.num_steps
    with tempfile.TemporaryDirectory() as folder:
        setup.run(
            Path(folder), num_steps, seed=seed, lr=lr, quiet=True, callbacks=[] if callback is None else [callback]
        )
        ledger = read_ledger(folder)
    last = ledger.measured("val/loss")[-1]
    return {
        "arm": name,
        "seed": seed,
        "lr": lr,
        "num_steps": num_steps,
        "flops": ledger.flops[last],
        "seconds": ledger.seconds[last],
        "val_loss": ledger.metrics["val/loss"][last],
        "provenance": provenance(),
    }


def read_results() -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def print_results() -> None:
    """Print a row an arm and learning rate."""
    rows = read_results()
    full = max(row["flops"] for row in rows)
    table = Table(title="Held-out loss of a small GPT with and without dropped blocks")
    for column in ("arm", "lr", "seeds", "FLOPs", "loss"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name in ARMS:
        for lr in sorted({row["lr"] for row in rows}):
            chosen = [row for row in rows if (row["arm"], row["lr"]) == (name, lr)]
            if chosen:
                losses = [row["val_loss"] for row in chosen]
                spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
                flops = statistics.mean(row["flops"] for row in chosen) / full
                table.add_row(
                    name, f"{lr:g}", str(len(chosen)), f"{flops:.0%}", f"{statistics.mean(losses):.3f}{spread}"
                )
    Console(width=100).print(table)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[4e-3])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--report", action="store_true", help="only print what there is")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for seed in [] if arguments.report else arguments.seeds:
        for lr in arguments.lrs:
            for name in arguments.arms:
                if not any((row["arm"], row["seed"], row["lr"]) == (name, seed, lr) for row in read_results()):
                    row = run_once(name, seed, lr)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    Console().print(f"{name:28} seed {seed} lr {lr:g}: {row['val_loss']:.4f}, {row['seconds']:.0f} s")
    print_results()


if __name__ == "__main__":
    main()
