"""Compare the choices inside multi-level training at equal compute, against dense runs tuned on the same grid.

Every run has its own completed learning-rate decay. The dense model is trained at 80 and at 100 % of the budget,
every variant of the method at 80 %. Runs are appended to ``scripts/results/presets.jsonl`` as they finish; calling
the script again goes on where it stopped.
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

from lit_accel import Level, MultiLevelTraining, Phase
from lit_accel.anatomy import Anatomy, anatomy_of
from lit_accel.methods.multilevel.phases import phase_at, resolve_phases, v_cycle
from scripts.provenance import provenance
from scripts.small_gpt import Setup, end_of

RESULTS = Path(__file__).parent / "results" / "presets.jsonl"
SETUP = Setup(num_blocks=4, embed=128, heads=4, vocab_size=1024, block_size=128, batch_size=16, num_steps=600)
BUDGET = 0.8
# The first model is too large for its budget: half of it, trained alone with the same FLOPs, ends lower. The second has
# four times the steps of a quarter of the cost.
SETUPS = {"width 128": SETUP, "width 64": replace(SETUP, embed=64, num_steps=2400)}


SMALL_ALONE = "the small model alone"
DEFAULT = "correction, moments projected (default)"
Variant = Callable[[], MultiLevelTraining | None]
VARIANTS: dict[str, Variant] = {
    "dense 100 %": lambda: None,
    "dense 80 %": lambda: None,
    # The control: where it is better, the full model is too large for the budget, and every method that trains a
    # small one looks good for that reason alone.
    SMALL_ALONE: lambda: None,
    DEFAULT: lambda: MultiLevelTraining(),
    "correction, moments reset": lambda: MultiLevelTraining(optimizer_state="reset"),
    "correction, second moment kept": lambda: MultiLevelTraining(optimizer_state="second_moment"),
    "paper, alpha 0.25": lambda: MultiLevelTraining(preset="paper"),
    "paper, alpha 0.5": lambda: MultiLevelTraining(preset="paper", alpha=0.5),
    "alpha 0.25, one schedule": lambda: MultiLevelTraining(preset="paper", learning_rate="continue"),
    "exact": lambda: MultiLevelTraining(preset="exact"),
    "correction, reset, schedule a phase": lambda: MultiLevelTraining(optimizer_state="reset", learning_rate="paper"),
    "correction, reset, rewarm": lambda: MultiLevelTraining(
        optimizer_state="reset", learning_rate="rewarm", num_rewarm_steps=30
    ),
    "correction, reset, zero depth": lambda: MultiLevelTraining(optimizer_state="reset", depth_mode="zero"),
}
# One choice at a time, all else as in the default.
CHOICES: dict[str, Variant] = {
    "alpha 0.5": lambda: MultiLevelTraining(alpha=0.5),
    "alpha 0.75": lambda: MultiLevelTraining(alpha=0.75),
    "fine part halved": lambda: MultiLevelTraining(fine=0.5),
    "zero depth": lambda: MultiLevelTraining(depth_mode="zero"),
    "ode depth": lambda: MultiLevelTraining(depth_mode="ode"),
    "adjacent neurons and heads": lambda: MultiLevelTraining(width_grouping="adjacent"),
    "stacked blocks": lambda: MultiLevelTraining(depth_grouping="stack"),
    "initial phase 2 %": lambda: MultiLevelTraining(phases=v_cycle(1, initial=0.02)),
    "initial phase 10 %": lambda: MultiLevelTraining(phases=v_cycle(1, initial=0.1)),
    "small phase 25 %": lambda: MultiLevelTraining(phases=v_cycle(1, small=0.25)),
    "small phase 65 %": lambda: MultiLevelTraining(phases=v_cycle(1, small=0.65)),
    "small phase 75 %": lambda: MultiLevelTraining(phases=v_cycle(1, small=0.75)),
    "initial 2 %, small 65 %": lambda: MultiLevelTraining(phases=v_cycle(1, initial=0.02, small=0.65)),
    "initial 2 %, small 75 %": lambda: MultiLevelTraining(phases=v_cycle(1, initial=0.02, small=0.75)),
    "small lr x 0.5": lambda: MultiLevelTraining(phases=phases_with_lr(small=0.5)),
    "small lr x 2": lambda: MultiLevelTraining(phases=phases_with_lr(small=2.0)),
    "lr x 0.5 after growth": lambda: MultiLevelTraining(phases=phases_with_lr(grown=0.5)),
    "rewarm": lambda: MultiLevelTraining(learning_rate="rewarm", num_rewarm_steps=30),
    "half the width only": lambda: MultiLevelTraining(levels=[Level(width=2, depth=1)]),
    "half the depth only": lambda: MultiLevelTraining(levels=[Level(width=1, depth=2)]),
    "half the tokens at the small level": lambda: MultiLevelTraining(),
    "twice the tokens at the small level": lambda: MultiLevelTraining(),
}
VARIANTS |= CHOICES
CHOICES_LR = 4e-3
# Tokens of a step at the small level, relative to one of the full model.
SMALL_TOKENS = {"half the tokens at the small level": 0.5, "twice the tokens at the small level": 2.0}


def phases_with_lr(small: float = 1.0, grown: float = 1.0) -> list[Phase]:
    """Return the default V-cycle with other learning rates in its second and third phase."""
    return [Phase(0, 0.05), Phase(1, 0.5, lr_scale=small), Phase(0, lr_scale=grown)]


class SmallTokens(L.Callback):
    """Accumulates over more or fewer micro-batches while the model is small.

    Args:
        method: Which says when that is.
        factor: Tokens of a small step, relative to one of the full model.
    """

    def __init__(self, method: MultiLevelTraining, factor: float) -> None:
        self.method, self.factor = method, factor

    def micro_batches(self, level: int) -> int:
        """Return how many there are in a step at a level; those of the full model are two."""
        return round(2 * self.factor) if level else 2

    def micro_batches_of_run(self, num_steps: int) -> int:
        """Return how many there are in a run: Lightning ends a step where their number is a multiple of a step's."""
        number = 0
        for phase in resolve_phases(self.method.phases, 2, num_steps):
            for _ in range(phase.start, phase.end):
                number += self.micro_batches(phase.level) - number % self.micro_batches(phase.level)
        return number

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Choose for the coming optimizer step."""
        phase = self.method.schedule[phase_at(self.method.schedule, trainer.global_step)]
        trainer.accumulate_grad_batches = self.micro_batches(phase.level)


def run_once(name: str, seed: int, lr: float, setup_name: str) -> dict[str, Any]:
    """Train one variant and return what it cost and reached."""
    method = VARIANTS[name]()
    full = setup = SETUPS[setup_name]
    if name == SMALL_ALONE:
        setup = replace(full, num_blocks=full.num_blocks // 2, embed=full.embed // 2, heads=full.heads // 2)
        budget_flops = BUDGET * full.num_steps * full.step_flops(anatomy_on_meta(full))
        num_steps = int(budget_flops / setup.step_flops(anatomy_on_meta(setup)))
        num_steps -= num_steps % setup.num_evaluations
    elif method is None:
        num_steps = round(full.num_steps * (1.0 if "100" in name else BUDGET))
    else:
        num_steps = full.steps_for_budget(method, BUDGET, SMALL_TOKENS.get(name, 1.0))
    extra: dict[str, Any] = {}
    if method is not None and name in SMALL_TOKENS:
        watch = SmallTokens(method, SMALL_TOKENS[name])
        # Steps differ in micro-batches, and so evaluations at equal distances would miss the end.
        extra = {"accumulate": 2, "evaluate_every": watch.micro_batches_of_run(num_steps), "callbacks": [watch]}
    with tempfile.TemporaryDirectory() as folder:
        setup.run(Path(folder), num_steps, method, seed=seed, lr=lr, quiet=True, **extra)
        end = end_of(folder, num_steps)
    return {"setup": setup_name, "variant": name, "seed": seed, "lr": lr, "num_steps": num_steps, **end}


def anatomy_on_meta(setup: Setup) -> Anatomy:
    """Return the anatomy of a set-up's model without allocating it."""
    with torch.device("meta"):
        return anatomy_of(setup.module().model)


def read_results() -> list[dict[str, Any]]:
    """Return the finished runs."""
    if not RESULTS.exists():
        return []
    # The first runs were made before there was a second set-up.
    return [{"setup": "width 128", **json.loads(line)} for line in RESULTS.read_text().splitlines()]


def print_results(rows: list[dict[str, Any]], setup: str) -> None:
    """Print mean and spread by variant and learning rate."""
    rows = [row for row in rows if row["setup"] == setup]
    rates = sorted({row["lr"] for row in rows})
    table = Table(title=f"Held-out loss, {setup} (mean ± sd over seeds)")
    table.add_column("variant")
    for rate in rates:
        table.add_column(f"lr {rate:g}", justify="right")
    for name in VARIANTS:
        cells = []
        for rate in rates:
            losses = [row["val_loss"] for row in rows if row["variant"] == name and row["lr"] == rate]
            spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.mean(losses):.3f}{spread} ({len(losses)})" if losses else "")
        table.add_row(name, *cells)
    Console(width=120).print(table)


def main() -> None:
    """Run what is missing of the grid, then print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[4e-3, 2e-3, 8e-3])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--setup", default="width 128", choices=list(SETUPS))
    parser.add_argument("--report", action="store_true", help="only print what there is")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = read_results()
    done = {(row["variant"], row["seed"], row["lr"]) for row in rows if row["setup"] == arguments.setup}
    grid = [(n, s, r) for r in arguments.lrs for s in arguments.seeds for n in arguments.variants]
    for name, seed, lr in [] if arguments.report else grid:
        if (name, seed, lr) in done:
            continue
        row = run_once(name, seed, lr, arguments.setup)
        print(f"{name:32} seed {seed} lr {lr:g}: {row['val_loss']:.4f}", flush=True)
        rows.append(row)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps({**row, "provenance": provenance()}) + "\n")
    print_results(rows, arguments.setup)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
