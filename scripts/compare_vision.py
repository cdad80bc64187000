"""Train the DeiT and SwinV2 recipes on the digits, densely and by V-cycle with the same number of steps.

The runs are those of ``configs/recipe``, only their seeds differ, and for DeiT some choices of the method. They are
appended to ``scripts/results/vision.jsonl`` as they finish; calling the script again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import logging
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from lit_accel.cli import LitAccelCLI
from lit_accel.compute import read_ledger
from scripts.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "vision.jsonl"
RECIPES = Path(__file__).parents[1] / "configs" / "recipe"
MODELS = ("deit", "swinv2")
METHOD, LEDGER = "lit_accel.MultiLevelTraining", "lit_accel.ComputeLedger"

# What is set in the recipe's method; DENSE and RECIPE are what a user runs.
DENSE, RECIPE = "dense", "V-cycle (recipe)"
CHOICES: dict[str, dict[str, Any]] = {
    "alpha 0.25": {"alpha": 0.25},
    "alpha 0.5": {"alpha": 0.5},
    "fine part halved": {"fine": 0.5},
    "zero depth": {"depth_mode": "zero"},
    "moments reset": {"optimizer_state": "reset"},
    "initial phase 2 %": {"phases": [{"level": 0, "length": 0.02}, {"level": 1, "length": 0.5}, {"level": 0}]},
    "small phase 25 %": {"phases": [{"level": 0, "length": 0.05}, {"level": 1, "length": 0.25}, {"level": 0}]},
    "small phase 50 %": {"phases": [{"level": 0, "length": 0.05}, {"level": 1, "length": 0.5}, {"level": 0}]},
    "small phase 75 %": {"phases": [{"level": 0, "length": 0.05}, {"level": 1, "length": 0.75}, {"level": 0}]},
    "small lr x 2": {
        "phases": [{"level": 0, "length": 0.05}, {"level": 1, "length": 0.5, "lr_scale": 2.0}, {"level": 0}]
    },
}


def tried_on(arm: str) -> tuple[str, ...]:
    """Return the models that a choice is tried on; the SwinV2's recipe has a shorter small phase than the default."""
    return MODELS if arm == "small phase 50 %" else ("deit",)


def config_of(model: str, arm: str, seed: int) -> dict[str, Any]:
    """Return a recipe with another seed, and another choice in its method."""
    kind = "dense" if arm == DENSE else "vcycle"
    config: dict[str, Any] = yaml.safe_load((RECIPES / f"{model}_{kind}.yaml").read_text())
    config["seed_everything"] = seed
    config["data"]["init_args"]["seed"] = seed
    config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [callback for callback in config["trainer"]["callbacks"] if callback["class_path"] != LEDGER]
    config["trainer"]["callbacks"] = [*callbacks, {"class_path": LEDGER, "init_args": {"print_table": False}}]
    for callback in callbacks:
        if callback["class_path"] == METHOD:
            callback["init_args"] |= copy.deepcopy(CHOICES.get(arm, {}))
    return config


def run_once(model: str, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and return what it cost and reached."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            LitAccelCLI({"fit": config_of(model, arm, seed), "subcommand": "fit"})
            (table,) = Path("runs").glob("*/version_0/metrics.csv")
            rows = [row for row in csv.DictReader(table.open()) if row["val/top1"]]
            ledger = read_ledger(table.parent)
        finally:
            os.chdir(here)
    return {
        "model": model,
        "arm": arm,
        "seed": seed,
        "num_steps": int(ledger.step[-1]),
        "flops_share": float(ledger.flops[-1] / ledger.dense_flops[-1]),
        "seconds": float(ledger.seconds[-1]),
        "val_top1": float(rows[-1]["val/top1"]),
        "val_loss": float(rows[-1]["val/loss"]),
    }


def read_results() -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def print_results(rows: list[dict[str, Any]]) -> None:
    """Print mean and spread over the seeds."""
    table = Table(title="Held-out accuracy on the digits at equal steps (mean ± sd over seeds)")
    for column in ("model", "arm", "seeds", "FLOPs", "top-1, %", "loss"):
        table.add_column(column, justify="left" if column in ("model", "arm") else "right")
    for model in MODELS:
        for arm in (DENSE, RECIPE, *CHOICES):
            chosen = [row for row in rows if (row["model"], row["arm"]) == (model, arm)]
            if not chosen:
                continue
            top1, loss = ([row[key] for row in chosen] for key in ("val_top1", "val_loss"))
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (top1, loss)]
            table.add_row(
                model,
                arm,
                str(len(chosen)),
                f"{statistics.mean(row['flops_share'] for row in chosen):.0%}",
                f"{100 * statistics.mean(top1):.2f} ± {100 * spread[0]:.2f}",
                f"{statistics.mean(loss):.4f} ± {spread[1]:.4f}",
            )
    Console(width=110).print(table)


def main() -> None:
    """Run what is missing, then print it and say whether the V-cycle keeps up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--choices", action="store_true", help="also the choices inside the method")
    parser.add_argument("--report", action="store_true", help="only print what there is")
    arguments = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = read_results()
    done = {(row["model"], row["arm"], row["seed"]) for row in rows}
    grid = [(model, arm, seed) for seed in arguments.seeds for model in arguments.models for arm in (DENSE, RECIPE)]
    if arguments.choices:
        grid += [(model, arm, seed) for seed in arguments.seeds for arm in CHOICES for model in tried_on(arm)]
    for model, arm, seed in [] if arguments.report else grid:
        if (model, arm, seed) in done:
            continue
        row = run_once(model, arm, seed)
        print(f"{model:7} {arm:20} seed {seed}: top-1 {row['val_top1']:.4f}, loss {row['val_loss']:.4f}", flush=True)
        rows.append(row)
        with RESULTS.open("a") as file:
            file.write(json.dumps({**row, "provenance": provenance()}) + "\n")
    print_results(rows)
    for model in MODELS:
        top1 = {
            arm: [row["val_top1"] for row in rows if (row["model"], row["arm"]) == (model, arm)]
            for arm in (DENSE, RECIPE)
        }
        if all(top1.values()):
            gap = 100 * (statistics.mean(top1[RECIPE]) - statistics.mean(top1[DENSE]))
            print(f"{model}: the V-cycle ends {gap:+.2f} points from dense training with as many steps.")


if __name__ == "__main__":
    main()
