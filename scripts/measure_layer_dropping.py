"""How much of the counted saving of dropped blocks arrives in seconds, and what the callback costs when it drops
nothing.

A GPT of 12 blocks and width 256 on sequences of 256 tokens, in bfloat16 autocast. Three arms take turns, a few
optimizer steps each, within one process: the plain model, the model with the callback attached and every block kept,
and the model with 9 of its 12 blocks kept. The realised share of a step is ``log(time ratio) / log(FLOPs ratio)``: 1
where a step that costs 80 % of the FLOPs takes 80 % of the time. Written to ``scripts/results/layer_dropping.json``.

On a GPU also GPT-2 small and medium at 1024 tokens, with compiled blocks.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import transformers
from rich.console import Console
from rich.table import Table

from lit_accel import ProgressiveLayerDropping
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import training_flops
from scripts.provenance import provenance
from scripts.timed_gpt import NO_DROPOUT, TimedGPT, train

RESULTS = Path(__file__).parent / "results" / "layer_dropping.json"
PLAIN, ATTACHED, DROPPED = "plain", "attached, all kept", "9 of 12 kept"
KEPT = 0.75


class Turns(ProgressiveLayerDropping):
    """Lets the arms take turns: keep probabilities of all blocks are 1, or sum up to three quarters of them.

    Args:
        length: Steps of a turn.
    """

    def __init__(self, length: int) -> None:
        super().__init__(gamma=1.0)
        self.length = length

    def arm(self, step: int) -> str:
        """Return whose turn it is."""
        # Each follows each of the others as often: what a turn leaves in the caches and the allocator cancels.
        return (PLAIN, ATTACHED, DROPPED, ATTACHED, PLAIN, DROPPED)[step // self.length % 6]

    def probabilities(self, step: int) -> list[float]:
        """Keep every block, or each with the same probability."""
        assert self.anatomy is not None
        p = KEPT if self.arm(step) == DROPPED else 1.0
        return [p] * len(self.anatomy.blocks)


class Stopwatch(L.Callback):
    """Times optimizer steps, callbacks included; the first step of each turn is not counted.

    Args:
        turns: Says whose turn it is.
    """

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.seconds: dict[str, list[float]] = {arm: [] for arm in (PLAIN, ATTACHED, DROPPED)}
        self.started = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Stop, detach or attach the method for the next step, and start."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now, step = time.perf_counter(), trainer.global_step - 1
        arm = self.turns.arm(step)
        if step % self.turns.length > 0:
            self.seconds[arm].append(now - self.started)
        follows = self.turns.arm(step + 1)
        if (arm == PLAIN) != (follows == PLAIN):
            if follows == PLAIN:
                self.turns.teardown(trainer, pl_module, "fit")
            else:
                self.turns.on_train_start(trainer, pl_module)
        self.started = time.perf_counter()


def measure(
    config: transformers.GPT2Config, num_tokens: int, batch_size: int, compiled: bool, rounds: int, length: int
) -> dict[str, Any]:
    """Train in turns and return the medians.

    Args:
        config: The model.
        num_tokens: Tokens of a sequence.
        batch_size: Sequences of a step.
        compiled: Whether blocks are compiled.
        rounds: How often each arm gets its turn.
        length: Steps of a turn.
    """
    module, turns = TimedGPT(config, compiled), Turns(length)
    watch = Stopwatch(turns)
    flops = training_flops(anatomy_of(module.model), batch_size, num_tokens)
    kept = KEPT * sum(flops.blocks) + flops.outside_blocks
    num_steps = 3 * rounds * length
    train(module, [turns, watch], num_steps, batch_size, num_tokens)
    seconds = {arm: statistics.median(values) for arm, values in watch.seconds.items()}
    # Neighbouring turns only, so that a machine that slows down does not count.
    overheads = [
        a / b - 1 for a, b in zip(*(_by_turn(watch.seconds[arm], length) for arm in (ATTACHED, PLAIN)), strict=True)
    ]
    ratio = kept / flops.total
    return {
        "blocks": config.n_layer,
        "width": config.n_embd,
        "num_tokens": num_tokens,
        "batch_size": batch_size,
        "vocab": config.vocab_size,
        "compiled": compiled,
        "num_timed": len(watch.seconds[PLAIN]),
        "step_seconds": seconds,
        "flops_ratio": ratio,
        "time_ratio": seconds[DROPPED] / seconds[ATTACHED],
        "realised_share": math.log(seconds[DROPPED] / seconds[ATTACHED]) / math.log(ratio),
        "overhead_when_all_kept": statistics.median(overheads),
    }


def _by_turn(values: list[float], length: int) -> list[float]:
    per_turn = length - 1
    return [statistics.median(values[i : i + per_turn]) for i in range(0, len(values), per_turn)]


def print_results(rows: list[dict[str, Any]]) -> None:
    """Print a row a setting."""
    table = Table(title="An optimizer step with 9 of 12 blocks kept")
    for column in ("model", "compiled", "FLOPs", "seconds", "realised share", "attached, all kept"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"L{row['blocks']} d{row['width']} T{row['num_tokens']}",
            "yes" if row["compiled"] else "no",
            f"{row['flops_ratio']:.3f}",
            f"{row['time_ratio']:.3f}",
            f"{row['realised_share']:.2f}",
            f"{row['overhead_when_all_kept']:+.1%}",
        )
    Console(width=110).print(table)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--length", type=int, default=6)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    small = transformers.GPT2Config(n_layer=12, n_embd=256, n_head=4, n_positions=256, vocab_size=4096, **NO_DROPOUT)
    settings: list[Callable[[], dict[str, Any]]] = [
        lambda: measure(small, 256, 16, False, arguments.rounds, arguments.length)
    ]
    if torch.cuda.is_available():
        for shape in ({}, {"n_layer": 24, "n_embd": 1024, "n_head": 16}):
            gpu = transformers.GPT2Config(**shape, **NO_DROPOUT)
            settings += [
                lambda gpu=gpu, compiled=compiled: measure(gpu, 1024, 16, compiled, arguments.rounds, arguments.length)
                for compiled in (False, True)
            ]
    rows = []
    for setting in settings:
        rows.append(setting())
        print_results(rows)
    RESULTS.write_text(json.dumps({"rows": rows, "provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
