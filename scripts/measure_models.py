"""What runs of published models cost with each method and with several, in FLOPs and in seconds.

GPT-2 small, BERT-base and DeiT-S, on a GPU also GPT-2 medium and larger batches, each trained for a few steps on random
data by the same Trainer and task as a user would take, with every method as it comes: its schedule is that of a whole
run, which is only short. A round trains all arms of a model one after the other, dense training among them, and every
other round in the opposite order, so that a machine that slows down favours nobody; a ratio is one of a round.

The first step of a run does not count, in which buffers are made; nor do changes of size, which stand by themselves,
since a short run has as many as a long one. All else does: loading, hooks, what a method measures or chooses, the
optimizer. The realised share of a run is ``log(time ratio) / log(FLOPs ratio)``. glibc is told to keep large
buffers, so that no step pays for their pages anew.

A round is a line of ``scripts/results/models.jsonl``; those that are there already are left out, so that what was
stopped goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import transformers
from rich.console import Console
from torch.utils.data import DataLoader

from lit_accel import (
    ComputeLedger,
    MixedSparsityTraining,
    MultiLevelTraining,
    ProgressiveLayerDropping,
    RandomLTD,
    SensitivityLayerDropping,
)
from lit_accel.strategies import ResizeMixin
from lit_accel.tasks import CausalLM, ImageClassification, MaskedLM
from scripts.provenance import device, provenance
from scripts.timed_gpt import KEEP_MEMORY

RESULTS = Path(__file__).parent / "results" / "models.jsonl"
DENSE = "dense"
WITHOUT_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}

ARMS: dict[str, Callable[[], list[L.Callback]]] = {
    DENSE: list,
    "V-cycle": lambda: [MultiLevelTraining()],
    "PLD": lambda: [ProgressiveLayerDropping()],
    "SBLD": lambda: [SensitivityLayerDropping()],
    "random-LTD": lambda: [RandomLTD()],
    "MST": lambda: [MixedSparsityTraining()],
    "V-cycle + PLD": lambda: [MultiLevelTraining(), ProgressiveLayerDropping()],
    "V-cycle + random-LTD": lambda: [MultiLevelTraining(), RandomLTD()],
    "PLD + random-LTD": lambda: [ProgressiveLayerDropping(), RandomLTD()],
    "V-cycle + PLD + random-LTD": lambda: [MultiLevelTraining(), ProgressiveLayerDropping(), RandomLTD()],
}


def text(num_tokens: int, vocab_size: int, is_masked: bool) -> dict[str, torch.Tensor]:
    """Return tokens that mean nothing, of which a masked model restores three in twenty."""
    ids = torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.where(torch.arange(num_tokens) % 20 < 3, -100) if is_masked else ids}


def image(size: int) -> tuple[torch.Tensor, int]:
    """Return noise, and a class."""
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(0)), 1


@dataclass(frozen=True)
class Model:
    """A published model and its batches.

    Args:
        name: What it is called.
        make: Builds the task.
        sample: Makes the sample that all of its batches repeat: to draw others would take time of its own.
        batch_sizes: On a CPU, ``None`` where it is left out, and on a GPU.
    """

    name: str
    make: Callable[[], L.LightningModule]
    sample: Callable[[], Any]
    batch_sizes: tuple[int | None, int]


MODELS = (
    Model(
        "GPT-2 small, 512 tokens",
        lambda: CausalLM("gpt2", False, WITHOUT_DROPOUT["gpt2"]),
        lambda: text(512, 50257, False),
        (1, 32),
    ),
    Model(
        "BERT-base, 128 tokens",
        lambda: MaskedLM("bert", False, WITHOUT_DROPOUT["bert"]),
        lambda: text(128, 30522, True),
        (4, 128),
    ),
    Model("DeiT-S", lambda: ImageClassification("deit_small_patch16_224"), lambda: image(224), (4, 128)),
    Model(
        "GPT-2 medium, 1,024 tokens",
        lambda: CausalLM("gpt2", False, {**WITHOUT_DROPOUT["gpt2"], "n_layer": 24, "n_embd": 1024, "n_head": 16}),
        lambda: text(1024, 50257, False),
        (None, 8),
    ),
)


class StepClock(L.Callback):
    """Adds up what steps cost after the first: seconds from the end of one to the end of the next, and FLOPs.

    Args:
        ledger: Which counts, and stands before it among the callbacks.
    """

    def __init__(self, ledger: ComputeLedger) -> None:
        self.ledger = ledger
        self.seconds = 0.0
        self.resize_seconds: list[float] = []
        self._last: float | None = None
        self._flops = 0, 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Take the time of the step, without that of the changes of size before it."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        assert isinstance(trainer.strategy, ResizeMixin)
        new = [event.seconds for event in trainer.strategy.resizes[len(self.resize_seconds) :]]
        self.resize_seconds += new
        if self._last is None:
            # The books add up from time to time; here, what the first step cost.
            self.ledger.phases.collect(trainer.strategy, trainer.world_size)
            self._flops = self._counted()
        else:
            self.seconds += now - self._last - sum(new)
        self._last = now

    def _counted(self) -> tuple[int, int]:
        total = self.ledger.phases.total
        return total.flops, total.dense_flops

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs of the same steps, and of a dense run of them."""
        first, now = self._flops, self._counted()
        return now[0] - first[0], now[1] - first[1]


def train(model: Model, arm: str, num_steps: int, batch_size: int) -> dict[str, Any]:
    """Train a model with the methods of an arm.

    Args:
        model: The model.
        arm: Its name in :data:`ARMS`.
        num_steps: Optimizer steps of the run.
        batch_size: Sequences or images of a step.

    Returns:
        What it cost, with that of a dense run by the ledger.
    """
    L.seed_everything(0, verbose=False)
    ledger = ComputeLedger(monitor=[], print_table=False)
    clock = StepClock(ledger)
    trainer = L.Trainer(
        strategy="resizable",
        devices=1,
        precision="bf16-mixed",
        max_steps=num_steps,
        callbacks=[*ARMS[arm](), ledger, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir="runs/measure_models",
    )
    trainer.fit(model.make(), DataLoader([model.sample()] * (num_steps * batch_size), batch_size=batch_size))
    flops, dense_flops = clock.flops
    return {
        "flops": flops,
        "dense_flops": dense_flops,
        "seconds": clock.seconds,
        "resize_seconds": clock.resize_seconds,
    }


def read_rows() -> list[dict[str, Any]]:
    """Return the rounds that were measured."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def device_of(row: dict[str, Any]) -> str:
    """Return what a round was measured on."""
    return device(row["provenance"]["machine"])


def measured(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return rounds by model and device, in the order of :data:`MODELS`."""
    names = [model.name for model in MODELS]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: names.index(row["model"])):
        found.setdefault((row["model"], device_of(row)), []).append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return what was measured, a table a model and device: medians over rounds, and their range.

    Args:
        rows: The rounds.
    """
    parts = []
    for (model, where), rounds in measured(rows).items():
        first = rounds[0]
        step = statistics.median(row["arms"][DENSE]["seconds"] / (row["num_steps"] - 1) for row in rounds)
        number = "one round" if len(rounds) == 1 else f"{len(rounds)} rounds"
        parts += [
            f"**{model}**: {first['num_steps']} steps of {first['batch_size']}, {number}, {where}, torch "
            f"{first['provenance']['versions']['torch']}. A dense step takes {step:.2f} s.",
            "",
            "| methods | FLOPs | seconds | realised share | changes of size, in dense steps |",
            "| --- | --- | --- | --- | --- |",
            *(_line(arm, [row["arms"] for row in rounds], step) for arm in ARMS if arm != DENSE),
            "",
        ]
    return "\n".join(parts[:-1])


def _line(arm: str, rounds: list[dict[str, Any]], step: float) -> str:
    flops = statistics.mean(arms[arm]["flops"] / arms[arm]["dense_flops"] for arms in rounds)
    ratios = sorted(arms[arm]["seconds"] / arms[DENSE]["seconds"] for arms in rounds)
    seconds = _with_range(ratios)
    share = _with_range(sorted(math.log(ratio) / math.log(flops) for ratio in ratios))
    changes = zip(*(arms[arm]["resize_seconds"] for arms in rounds), strict=True)
    resizes = ", ".join(f"{statistics.median(change) / step:.2f}" for change in changes)
    return f"| {arm} | {flops:.3f} | {seconds} | {share} | {resizes} |"


def _with_range(values: list[float]) -> str:
    """Return the median of ascending values, and from where to where they go."""
    spread = f" ({values[0]:.2f} to {values[-1]:.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{spread}"


def main() -> None:
    """Measure the rounds that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each model")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run; default: 40 on a CPU, 100 on a GPU")
    arguments = parser.parse_args()
    if not os.environ.keys() >= KEEP_MEMORY.keys():
        # The allocator reads its settings when a process starts.
        command = [sys.executable, "-m", "scripts.measure_models", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEP_MEMORY})
    transformers.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    on_gpu = torch.cuda.is_available()
    num_steps = arguments.steps or (100 if on_gpu else 40)
    console, here = Console(), {"provenance": provenance()}
    for number in range(arguments.rounds):
        for model in MODELS:
            batch_size = model.batch_sizes[on_gpu]
            done = [row for row in read_rows() if (row["model"], device_of(row)) == (model.name, device_of(here))]
            if batch_size is None or len(done) > number:
                continue
            names = list(ARMS) if number % 2 == 0 else list(ARMS)[::-1]
            results = {}
            for arm in names:
                with console.status(f"round {number + 1} of {arguments.rounds}: {model.name}, {arm}"):
                    results[arm] = train(model, arm, num_steps, batch_size)
                # A Trainer and its module refer to each other, and ten models would not fit.
                gc.collect()
            arms = {arm: results[arm] for arm in ARMS}
            row = {"model": model.name, "num_steps": num_steps, "batch_size": batch_size, "arms": arms, **here}
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            dense = arms[DENSE]["seconds"]
            ratios = ", ".join(f"{arm} {arms[arm]['seconds'] / dense:.2f}" for arm in ARMS if arm != DENSE)
            console.print(f"{model.name}: {dense:.0f} s dense; {ratios}")


if __name__ == "__main__":
    main()
