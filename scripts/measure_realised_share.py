"""How much of the small level's counted saving arrives in seconds, with its own batch size and without.

A GPT of 12 blocks and width 256 on sequences of 256 tokens goes up and down between its full size and half of it, so
that the two are measured in turns within one run. The realised share of an optimizer step is
``log(time ratio) / log(FLOPs ratio)``: 1 where a step that costs a seventh of the FLOPs takes a seventh of the time.
Added to ``scripts/results/realised_share.json``: machines differ from day to day, so what was measured before stays.

Each setting is measured in a process of its own, once with glibc as it is, which returns large buffers to the system
after every use, so that each step pays for their pages anew; and once told to keep them. With the configuration as
transformers has it, and with the two of its options that make dense training faster on a CPU: attention as plain matrix
products (``eager``) and GELU as one operation.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from lit_accel import Level, MultiLevelTraining, Phase
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import training_flops
from lit_accel.methods.multilevel.phases import phase_at
from lit_accel.tasks.base import IGNORED_LABEL, token_cross_entropy
from scripts.provenance import provenance
from scripts.timed_gpt import KEEP_MEMORY, run_apart

RESULTS = Path(__file__).parent / "results" / "realised_share.json"
NUM_TOKENS, VOCAB, MICRO_BATCH, ACCUMULATE = 256, 4096, 4, 8
SETTINGS = [(merge, keeps, False) for keeps in (False, True) for merge in (1, 4, 8)] + [
    (1, True, True),
    (8, True, True),
]
QUICK = {"attn_implementation": "eager", "activation_function": "gelu_pytorch_tanh"}
# Steps of a phase; the first of each is not counted, in which allocator and caches get used to the other size.
LARGE_STEPS, SMALL_STEPS = 3, 6


class Module(L.LightningModule):
    """The GPT, on tokens that mean nothing: only the time matters.

    Args:
        is_quick: Whether it has the options that are fastest on a CPU.
    """

    def __init__(self, is_quick: bool) -> None:
        super().__init__()
        config = transformers.GPT2Config(
            n_layer=12,
            n_embd=256,
            n_head=4,
            n_positions=NUM_TOKENS,
            vocab_size=VOCAB,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **(QUICK if is_quick else {}),
        )
        self.model = transformers.GPT2LMHeadModel(config).train()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss, as ``lit_accel.tasks.CausalLM`` does."""
        logits_btv = self.model(input_ids=batch[0], use_cache=False).logits
        targets_bt = torch.nn.functional.pad(batch[0][:, 1:], (0, 1), value=IGNORED_LABEL)
        return token_cross_entropy(logits_btv, targets_bt)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Stopwatch(L.Callback):
    """Times every optimizer step, without what lies between them: loading data and changing the level.

    Args:
        method: Which says at what level a step is.
    """

    def __init__(self, method: MultiLevelTraining) -> None:
        self.method = method
        self.seconds: dict[int, list[float]] = {0: [], 1: []}

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Start at the first micro-batch of a step."""
        if trainer.fit_loop.epoch_loop.batch_idx % ACCUMULATE == 0:
            self.step = trainer.global_step
            self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Stop when the step is complete."""
        if trainer.global_step == self.step:
            return
        phase = self.method.schedule[phase_at(self.method.schedule, self.step)]
        if self.step > phase.start:
            self.seconds[phase.level].append(time.perf_counter() - self.started)


def measure(merge: int, rounds: int, is_quick: bool) -> dict[str, Any]:
    """Train in turns at both levels and return the medians.

    Args:
        merge: Micro-batches that the small level computes as one.
        rounds: How often each level gets its turn.
        is_quick: Whether the model has the options that are fastest on a CPU.
    """
    phases = [Phase(level, steps) for _ in range(rounds) for level, steps in ((0, LARGE_STEPS), (1, SMALL_STEPS))]
    method = MultiLevelTraining([Level(merge_batches=merge)], phases)
    watch, module = Stopwatch(method), Module(is_quick)
    anatomy = anatomy_of(module.model)
    (level_map,) = method.plan_levels(anatomy)
    flops = [training_flops(size, MICRO_BATCH * ACCUMULATE, NUM_TOKENS).total for size in (anatomy, level_map.small)]
    num_steps = rounds * (LARGE_STEPS + SMALL_STEPS)
    ids = torch.randint(VOCAB, (num_steps * ACCUMULATE * MICRO_BATCH, NUM_TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            accelerator="cpu",
            devices=1,
            strategy="resizable",
            precision="bf16-mixed",
            max_steps=num_steps,
            accumulate_grad_batches=ACCUMULATE,
            # After the method: the level has been changed when the watch starts.
            callbacks=[method, watch],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, DataLoader(TensorDataset(ids), batch_size=MICRO_BATCH))
    seconds = [statistics.median(watch.seconds[level]) for level in (0, 1)]
    return {
        "merge_batches": merge,
        "num_timed": [len(watch.seconds[level]) for level in (0, 1)],
        "step_seconds": seconds,
        "step_flops": flops,
        "flops_ratio": flops[1] / flops[0],
        "time_ratio": seconds[1] / seconds[0],
        "realised_share": math.log(seconds[1] / seconds[0]) / math.log(flops[1] / flops[0]),
    }


def measure_apart(merge: int, keeps_memory: bool, is_quick: bool, rounds: int) -> dict[str, Any]:
    """Measure in a new process: the allocator reads its settings when a process starts."""
    arguments = ["--only", str(merge), "--rounds", str(rounds), *(["--quick"] if is_quick else [])]
    return {
        "keeps_memory": keeps_memory,
        "is_quick": is_quick,
        **run_apart("scripts.measure_realised_share", arguments, keeps_memory),
    }


def print_results(rows: list[dict[str, Any]]) -> None:
    """Print a row a setting."""
    table = Table(title="The small level's step, in parts of the full model's")
    for column in ("micro-batches merged", "glibc keeps memory", "quick options", "FLOPs", "seconds", "realised share"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["merge_batches"]),
            "yes" if row["keeps_memory"] else "no",
            "yes" if row["is_quick"] else "no",
            f"{row['flops_ratio']:.3f}",
            f"{row['time_ratio']:.3f}",
            f"{row['realised_share']:.2f}",
        )
    Console(width=100).print(table)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=int, help="measure one number of merged micro-batches here, and print its row")
    parser.add_argument("--quick", action="store_true", help="with the options that are fastest on a CPU")
    arguments = parser.parse_args()
    if arguments.only:
        transformers.logging.set_verbosity_error()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        print(json.dumps(measure(arguments.only, arguments.rounds, arguments.quick)))
        return
    rows = []
    for merge, keeps_memory, is_quick in SETTINGS:
        rows.append(measure_apart(merge, keeps_memory, is_quick, arguments.rounds))
        print_results(rows)
    record = {"num_tokens": NUM_TOKENS, "micro_batch": MICRO_BATCH, "accumulate": ACCUMULATE, "rows": rows}
    record |= {"keep_memory": KEEP_MEMORY, "provenance": provenance()}
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*earlier, record], indent=1) + "\n")


if __name__ == "__main__":
    main()
