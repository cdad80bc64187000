"""Comparing ways to train a small GPT: arms that are run one after the other, each with its own completed decay.

Runs are appended to a result file as they finish; a comparison that is started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import transformers
from rich.console import Console
from rich.table import Table

from scripts.provenance import provenance
from scripts.small_gpt import Scheduler, Setup, end_of, warmup_and_linear_decay


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        callback: Makes the method, if there is one.
        steps: Optimizer steps in parts of the longest run's.
        changes: Fields of the set-up that are different.
        scheduler: Makes the learning-rate schedule from the optimizer.
    """

    callback: Callable[[], L.Callback] | None = None
    steps: float = 1.0
    changes: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Scheduler = warmup_and_linear_decay


@dataclass(frozen=True)
class Comparison:
    """Arms on one set-up.

    Args:
        title: What the printed table is called.
        results: The result file.
        setup: Model, data and length of the longest run.
        arms: What is compared, by name.
    """

    title: str
    results: Path
    setup: Setup
    arms: Mapping[str, Arm]

    def run_once(self, name: str, seed: int, lr: float) -> dict[str, Any]:
        """Train one arm and return what it cost and reached."""
        arm = self.arms[name]
        setup = replace(self.setup, **arm.changes)
        evaluations = setup.num_evaluations
        # Rounded up: a control must not get less than what it is held against.
        num_steps = math.ceil(arm.steps * setup.num_steps / evaluations - 1e-9) * evaluations
        with tempfile.TemporaryDirectory() as folder:
            callbacks = [] if arm.callback is None else [arm.callback()]
            setup.run(
                Path(folder), num_steps, seed=seed, lr=lr, quiet=True, callbacks=callbacks, scheduler=arm.scheduler
            )
            end = end_of(folder, num_steps)
        return {"arm": name, "seed": seed, "lr": lr, "num_steps": num_steps, **end, "provenance": provenance()}

    def read(self) -> list[dict[str, Any]]:
        """Return the finished runs."""
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def print(self) -> None:
        """Print a row an arm and learning rate."""
        rows = self.read()
        full = max(row["flops"] for row in rows)
        table = Table(title=self.title)
        for column in ("arm", "lr", "seeds", "FLOPs", "loss"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for name in self.arms:
            for lr in sorted({row["lr"] for row in rows}):
                if chosen := [row for row in rows if (row["arm"], row["lr"]) == (name, lr)]:
                    losses = [row["val_loss"] for row in chosen]
                    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
                    flops = statistics.mean(row["flops"] for row in chosen) / full
                    table.add_row(
                        name, f"{lr:g}", str(len(chosen)), f"{flops:.0%}", f"{statistics.mean(losses):.3f}{spread}"
                    )
        Console(width=100).print(table)

    def main(self, description: str | None) -> None:
        """Run what is missing."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--lrs", type=float, nargs="+", default=[4e-3])
        parser.add_argument("--arms", nargs="+", choices=list(self.arms), default=list(self.arms), metavar="ARM")
        parser.add_argument("--report", action="store_true", help="only print what there is")
        arguments = parser.parse_args()
        transformers.logging.set_verbosity_error()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        for seed in [] if arguments.report else arguments.seeds:
            for lr in arguments.lrs:
                for name in arguments.arms:
                    if not any((row["arm"], row["seed"], row["lr"]) == (name, seed, lr) for row in self.read()):
                        row = self.run_once(name, seed, lr)
                        with self.results.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        Console().print(
                            f"{name:28} seed {seed} lr {lr:g}: {row['val_loss']:.4f}, {row['seconds']:.0f} s"
                        )
        self.print()
