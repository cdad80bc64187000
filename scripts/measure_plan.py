"""How well `lit-accel plan` predicts a run: its FLOPs, and its seconds after a calibration on this machine.

Each small recipe is planned with ``--calibrate true`` and then trained, in processes of their own; the ledger says what
was spent. Written to ``scripts/results/plan.json``; recipes that are there already are left out, so that a run that was
stopped goes on. The machine must be otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lit_accel.compute import ComputeLedger
from scripts.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "plan.json"
CONFIGS = Path(__file__).parents[1] / "configs" / "recipe"
RECIPES = (
    "gpt2_dense",
    "gpt2_vcycle",
    "gpt2_pld",
    "gpt2_random_ltd",
    "gpt2_mixed_sparsity",
    "gpt2_vcycle_random_ltd",
    "gpt2_all",
    "deit_all",
)


def arguments(recipe: str, steps: int) -> list[str]:
    """Return the command line that both share: the recipe, shortened, without validation."""
    options = {"max_steps": steps, "limit_val_batches": 0, "logger": "false", "val_check_interval": steps}
    # Monitors and checkpoints need a logger or write for long; what is measured is training.
    return [
        *("--config", str(CONFIGS / f"{recipe}.yaml")),
        *(part for name, value in options.items() for part in (f"--trainer.{name}", str(value))),
    ]


def one(recipe: str, steps: int, what: str) -> dict[str, Any]:
    """Plan a recipe, or train it, in this process."""
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

    from lit_accel.cli import LitAccelCLI
    from lit_accel.tasks import SavePretrained

    class Bare(LitAccelCLI):
        """Leaves out what only writes."""

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            trainer = self._get(self.config_init, "trainer")
            writers = (LearningRateMonitor, ModelCheckpoint, SavePretrained)
            trainer["callbacks"] = [each for each in trainer["callbacks"] if not isinstance(each, writers)]
            return super().instantiate_trainer(enable_checkpointing=False, **kwargs)

    if what == "plan":
        cli = Bare(["plan", *arguments(recipe, steps), "--calibrate", "true", "--picture", "null"])
        assert cli.forecast is not None
        assert cli.forecast.seconds is not None
        plan = cli.forecast.plan
        return {"flops": plan.flops, "dense_flops": plan.dense_flops, "seconds": list(cli.forecast.seconds)}
    cli = Bare(["fit", *arguments(recipe, steps)])
    (ledger,) = (each for each in cli.trainer.callbacks if isinstance(each, ComputeLedger))
    phases = ledger.phases
    return {
        "flops": phases.total.flops,
        "dense_flops": phases.total.dense_flops,
        "seconds": [phase.seconds for phase in phases.list],
    }


def apart(recipe: str, steps: int, what: str) -> dict[str, Any]:
    """Do the same in a process of its own, in a folder of its own."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "scripts.measure_plan", "--one", recipe, what, "--steps", str(steps)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each run")
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "WHAT"), help="plan or fit one recipe and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one[0], options.steps, options.one[1])))
        return
    console = Console()
    done = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": {}}
    for recipe in RECIPES:
        if recipe in done["runs"]:
            continue
        with console.status(f"{recipe}: planning and training"):
            # Settings of a paper's kind are shortened here: a stage or phase is a share of the run.
            planned, trained = (apart(recipe, options.steps, what) for what in ("plan", "fit"))
        done["runs"][recipe] = {"steps": options.steps, "planned": planned, "trained": trained}
        done["provenance"] = provenance()
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(done, indent=1) + "\n")
    console.print(table(done["runs"]))


def table(runs: dict[str, Any]) -> Table:
    """Lay out what was predicted and what came."""
    result = Table(title="Planned and trained", title_justify="left")
    for heading in ("recipe", "FLOPs of dense", "planned FLOPs", "planned time", "time", "off by"):
        result.add_column(heading, justify="left" if heading == "recipe" else "right")
    for recipe, run in runs.items():
        planned, trained = sum(run["planned"]["seconds"]), sum(run["trained"]["seconds"])
        result.add_row(
            recipe,
            f"{trained_share(run):.1%}",
            "exact" if run["planned"]["flops"] == run["trained"]["flops"] else f"{flops_off(run):+.2%}",
            f"{planned:.1f} s",
            f"{trained:.1f} s",
            f"{planned / trained - 1:+.1%}",
        )
    return result


def trained_share(run: dict[str, Any]) -> float:
    """Return FLOPs in parts of those of a dense run."""
    return run["trained"]["flops"] / run["trained"]["dense_flops"]


def flops_off(run: dict[str, Any]) -> float:
    """Return by how much planned FLOPs differ from those that were counted."""
    return run["planned"]["flops"] / run["trained"]["flops"] - 1


if __name__ == "__main__":
    main()
