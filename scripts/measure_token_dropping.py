"""How much of the counted saving of dropped tokens arrives in seconds, and what moving tokens costs.

A GPT of 12 blocks and width 256 on sequences of 512 tokens, in bfloat16 autocast. Four arms take turns, a few optimizer
steps each, within one process: the plain model, and the model whose 10 middle blocks run on 75, 50 and 25 % of the
tokens. The realised share of a step is ``log(time ratio) / log(FLOPs ratio)``: 1 where a step that costs 60 % of the
FLOPs takes 60 % of the time. Taking tokens out and putting them back is timed by itself, forward and backward, for as
many blocks as drop. Written to ``scripts/results/token_dropping.json``.

On a GPU also GPT-2 small at 1024 tokens, with and without compiled blocks.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import transformers
from rich.console import Console
from rich.table import Table

from lit_accel import RandomLTD
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import training_flops
from lit_accel.draws import generator
from lit_accel.methods.token_dropping import TokenSchedule, put, sample_tokens, take
from scripts.provenance import provenance
from scripts.timed_gpt import KEEP_MEMORY, NO_DROPOUT, TimedGPT, run_apart, train

RESULTS = Path(__file__).parent / "results" / "token_dropping.json"
# In parts of a sequence; 1 is the plain model, with the method taken off.
ARMS = (1.0, 0.75, 0.5, 0.25)
# Each arm follows each other one, once or twice: what a turn leaves in the caches and the allocator falls on all.
_ORDER = (0, 1, 3, 2, 1, 2, 0, 3, 2, 3, 1, 0, 3, 0, 2, 1)


@dataclass(frozen=True)
class Turns(TokenSchedule):
    """Lets the arms take turns.

    Args:
        length: Steps of a turn.
    """

    length: int = 1

    def arm(self, step: int) -> float:
        """Return which part of a sequence is kept at a step."""
        return ARMS[_ORDER[step // self.length % len(_ORDER)]]

    def kept_tokens(self, step: int, num_tokens: int) -> int:
        """Return how many tokens of a sequence are kept."""
        return round(self.arm(step) * num_tokens)


class InTurns(RandomLTD):
    """Random-LTD that follows :class:`Turns`.

    Args:
        length: Steps of a turn.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        super().__init__(growth=1.0)

    def _schedule_of(self, growth_steps: int) -> Turns:
        return Turns(self.start_tokens, growth_steps, length=self.length)


class Stopwatch(L.Callback):
    """Times optimizer steps, callbacks included; the first step of each turn is not counted.

    Args:
        method: Says whose turn it is.
    """

    def __init__(self, method: InTurns) -> None:
        self.method = method
        self.seconds: dict[float, list[float]] = {arm: [] for arm in ARMS}
        self.started = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Stop, take the method off or put it on for the next step, and start."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now, step = time.perf_counter(), trainer.global_step - 1
        schedule = self.method.schedule
        assert isinstance(schedule, Turns)
        if step % schedule.length > 0:
            self.seconds[schedule.arm(step)].append(now - self.started)
        if schedule.arm(step) == 1 and schedule.arm(step + 1) < 1:
            self.method.on_train_start(trainer, pl_module)
        elif schedule.arm(step) < 1 and schedule.arm(step + 1) == 1:
            self.method.teardown(trainer, pl_module, "fit")
        self.started = time.perf_counter()


def seconds_of_moving(
    num_blocks: int, batch_size: int, num_tokens: int, num_kept: int, width: int, device: torch.device
) -> float:
    """Time taking tokens out of a batch and putting them back in as many blocks as drop, forward and backward."""
    x_btd = torch.randn(batch_size, num_tokens, width, device=device, requires_grad=True)
    kept = [
        sample_tokens(batch_size, num_tokens, num_kept, generator=generator(0, block, device=device))
        for block in range(num_blocks)
    ]
    gradient_btd = torch.randn_like(x_btd)
    times = []
    for _ in range(12):
        started = time.perf_counter()
        y_btd = x_btd
        for kept_bk in kept:
            taken_bkd, rest_btd = take(y_btd, kept_bk)
            y_btd = put(rest_btd, taken_bkd, kept_bk)
        y_btd.backward(gradient_btd)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        x_btd.grad = None
    return statistics.median(times[2:])


def measure(name: str, rounds: int, length: int) -> list[dict[str, Any]]:
    """Train in turns and return a row for each part of the tokens.

    Args:
        name: Of the setting.
        rounds: How often the whole order of turns is run.
        length: Steps of a turn.
    """
    config, num_tokens, batch_size, compiled = setting(name)
    module, method = TimedGPT(config, compiled), InTurns(length)
    watch = Stopwatch(method)
    num_steps = rounds * len(_ORDER) * length
    trainer = train(module, [method, watch], num_steps, batch_size, num_tokens, "cpu" if name == "cpu" else "auto")
    anatomy, device = anatomy_of(module.model), trainer.strategy.root_device
    dense = training_flops(anatomy, batch_size, num_tokens).total
    median = {arm: statistics.median(values) for arm, values in watch.seconds.items()}
    rows = []
    for arm in ARMS[1:]:
        num_kept = round(arm * num_tokens)
        spent = training_flops(anatomy, batch_size, num_tokens, kept=dict.fromkeys(method.blocks, num_kept)).total
        ratio, time_ratio = spent / dense, median[arm] / median[1.0]
        moving = seconds_of_moving(len(method.blocks), batch_size, num_tokens, num_kept, config.n_embd, device)
        rows.append(
            {
                "blocks": config.n_layer,
                "width": config.n_embd,
                "num_tokens": num_tokens,
                "batch_size": batch_size,
                "vocab": config.vocab_size,
                "compiled": compiled,
                "kept": arm,
                "num_timed": len(watch.seconds[arm]),
                "dense_step_seconds": median[1.0],
                "step_seconds": median[arm],
                "flops_ratio": ratio,
                "time_ratio": time_ratio,
                "realised_share": math.log(time_ratio) / math.log(ratio),
                "moving_share": moving / median[arm],
            }
        )
    return rows


def setting(name: str) -> tuple[transformers.GPT2Config, int, int, bool]:
    """Return model, tokens of a sequence, sequences of a step and whether blocks are compiled."""
    if name == "cpu":
        small = transformers.GPT2Config(
            n_layer=12, n_embd=256, n_head=4, n_positions=512, vocab_size=4096, **NO_DROPOUT
        )
        return small, 512, 8, False
    return transformers.GPT2Config(**NO_DROPOUT), 1024, 16, name == "gpu, compiled"


def print_results(rows: list[dict[str, Any]]) -> None:
    """Print a row a setting."""
    table = Table(title="An optimizer step whose middle blocks run on a part of the tokens")
    for column in ("model", "compiled", "glibc keeps memory", "kept", "FLOPs", "seconds", "realised share", "moving"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"L{row['blocks']} d{row['width']} T{row['num_tokens']}",
            "yes" if row["compiled"] else "no",
            "yes" if row["keeps_memory"] else "no",
            f"{row['kept']:.0%}",
            f"{row['flops_ratio']:.3f}",
            f"{row['time_ratio']:.3f}",
            f"{row['realised_share']:.2f}",
            f"{row['moving_share']:.1%}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--only", help="measure one setting here, and print its rows")
    arguments = parser.parse_args()
    if arguments.only:
        transformers.logging.set_verbosity_error()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        print(json.dumps(measure(arguments.only, arguments.rounds, arguments.length)))
        return
    settings = [("cpu", False), ("cpu", True)]
    if torch.cuda.is_available():
        settings += [("gpu", False), ("gpu, compiled", False)]
    rows: list[dict[str, Any]] = []
    for name, keeps_memory in settings:
        options = ["--only", name, "--rounds", str(arguments.rounds), "--length", str(arguments.length)]
        measured = run_apart("scripts.measure_token_dropping", options, keeps_memory)
        rows += [{"keeps_memory": keeps_memory, **row} for row in measured]
        print_results(rows)
    record = {"rows": rows, "keep_memory": KEEP_MEMORY, "provenance": provenance()}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
