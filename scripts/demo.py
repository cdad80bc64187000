"""The demo: a small GPT on the standard library's sources, trained densely and by V-cycle; ``make demo`` runs it.

The V-cycle gets 80 % of the dense run's FLOPs, and both end with their learning rate at zero, so what is compared
are two finished trainings. Everything lands in ``runs/demo``.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from transformers import AutoTokenizer, GPT2LMHeadModel

from lit_accel import MultiLevelTraining
from lit_accel.compute import plot_report, read_ledger
from lit_accel.compute.table import Ledger
from lit_accel.tasks import CausalLM
from scripts.small_gpt import Setup

# The learning rate is for the dense run: a worse one would flatter the method.
SETUP = Setup(
    num_blocks=6, embed=192, heads=6, vocab_size=2048, block_size=128, batch_size=16, num_steps=400, lr=2.2e-3
)
BUDGET = 0.8
FOLDER = Path("runs/demo")
METRIC = "val/loss"


def comparison_table(runs: dict[str, Ledger]) -> Table:
    """Lay out each run's phases with what they cost and where they ended."""
    table = Table(title="What it cost, and where it ended", title_justify="left", title_style="bold")
    for heading in ("run", "phase", "parameters", "steps", "TFLOPs", "seconds", "held-out loss"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for label, run in runs.items():
        previous = dict.fromkeys(("step", "flops", "seconds"), 0.0)
        for phase in sorted(set(run.phase)):
            rows = [row for row in range(len(run.phase)) if run.phase[row] == phase]
            last = {key: float(getattr(run, key)[rows[-1]]) for key in previous}
            measured = [row for row in run.measured(METRIC) if row in rows]
            table.add_row(
                label if phase == 0 else "",
                str(phase),
                f"{run.num_parameters[rows[-1]]:,}",
                f"{last['step'] - previous['step']:,.0f}",
                f"{(last['flops'] - previous['flops']) / 1e12:.1f}",
                f"{last['seconds'] - previous['seconds']:.1f}",
                f"{run.metrics[METRIC][measured[-1]]:.3f}" if measured else "",
            )
            previous = last
        table.add_row(
            "",
            "total",
            "",
            f"{run.step[-1]:,}",
            f"{run.flops[-1] / 1e12:.1f}",
            f"{run.seconds[-1]:.1f}",
            f"{final_loss(run):.3f}",
            style="bold",
            end_section=True,
        )
    return table


def final_loss(run: Ledger) -> float:
    """Return the held-out loss at the end of a run."""
    return float(run.metrics[METRIC][run.measured(METRIC)[-1]])


def verdict(dense: Ledger, cycle: Ledger) -> str:
    """Say what the comparison shows, whichever way it goes."""
    difference = final_loss(cycle) - final_loss(dense)
    flops = 1 - cycle.flops[-1] / dense.flops[-1]
    seconds = 1 - cycle.seconds[-1] / dense.seconds[-1]
    took = "less" if seconds > 0 else "more"
    cost = f"The V-cycle used {flops:.0%} fewer FLOPs and {abs(seconds):.0%} {took} time than the dense run"
    if difference <= 0:
        result = f"{cost}, and ended {-difference:.3f} nats lower: at this size and length it saved that much or more."
    else:
        result = f"{cost}, and ended {difference:.3f} nats higher: at this size and length the saving was not free."
    return (
        f"{result}\nOne seed, a small model and a few minutes: this shows that the machinery works and what it counts, "
        "not what the method is worth on yours. The runs came one after the other, so their seconds carry whatever "
        "else the machine was doing."
    )


def sample(folder: Path, prompt: str = "def ") -> str:
    """Continue a prompt with the saved model, loaded as anybody would load it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder)
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    room = min(60, model.config.n_positions - inputs["input_ids"].shape[1])
    tokens = model.generate(**inputs, max_new_tokens=room, do_sample=True, top_k=20, pad_token_id=0)
    return tokenizer.decode(tokens[0])


def save(module: CausalLM, setup: Setup, folder: Path) -> None:
    """Save the final model and its tokenizer as an ordinary Hugging Face folder."""
    module.model.save_pretrained(folder)
    setup.data().save_tokenizer(folder)


def main() -> None:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=SETUP.num_steps, help="optimizer steps of the dense run")
    parser.add_argument("--lr", type=float, default=SETUP.lr, help="peak learning rate of both runs")
    arguments = parser.parse_args()
    run_demo(replace(SETUP, num_steps=arguments.steps, lr=arguments.lr))


def run_demo(setup: Setup) -> None:
    """Train both arms, then compare them."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Of what Lightning tells rank zero, only the transitions are news here.
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(lambda record: record.getMessage().startswith("MultiLevelTraining"))
    warnings.filterwarnings("ignore")
    shutil.rmtree(FOLDER, ignore_errors=True)
    console = Console()

    console.rule("[bold]1. the dense run")
    dense_module, _ = setup.run(FOLDER / "dense", setup.num_steps)
    del dense_module
    console.rule("[bold]2. the V-cycle: shrink, train small, grow back")
    method = MultiLevelTraining()
    module, _ = setup.run(FOLDER / "v_cycle", setup.steps_for_budget(method, BUDGET), method)
    save(module, setup, FOLDER / "model")

    console.rule("[bold]3. the comparison")
    runs = {"dense": read_ledger(FOLDER / "dense"), "V-cycle": read_ledger(FOLDER / "v_cycle")}
    console.print(comparison_table(runs))
    plot_report(
        {label: FOLDER / name for label, name in (("dense", "dense"), ("V-cycle", "v_cycle"))},
        FOLDER / "report.png",
        title="A small GPT on the Python standard library",
    )
    console.print(Panel(verdict(runs["dense"], runs["V-cycle"]), title="Verdict", title_align="left"))
    console.print(
        f"picture: {FOLDER / 'report.png'}    final model: {FOLDER / 'model'} "
        "(GPT2LMHeadModel.from_pretrained loads it), which writes:"
    )
    console.print(Panel(sample(FOLDER / "model"), highlight=False, style="dim"), markup=False)


if __name__ == "__main__":
    main()
