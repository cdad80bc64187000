"""One run: an arm at a budget, a learning rate and a seed, with what it cost and where it ended."""

from __future__ import annotations

import inspect
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lit_accel
import lit_accel.tasks
from lit_accel import ComputeLedger, LayerTokenLR, RandomLTD
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import read_ledger
from lit_accel.methods.token_dropping import TokenPlan, TokenSchedule
from lit_accel.tasks import WarmupDecay
from scripts.bench.clock import CpuClock, reference_step
from scripts.bench.data import data_hash, data_of
from scripts.bench.study import Arm, Rung
from scripts.provenance import provenance

ROOT = Path(__file__).parents[2]
_WARMUP, _LEAST_WARMUP = 0.1, 50
_CURVE_POINTS = 8


@dataclass(frozen=True)
class Job:
    """A run that is to be made.

    Args:
        rung: Model and data.
        arm: The way to train.
        stage: ``tune`` or ``report``.
        budget: In units of the rung's budget 1.
        num_steps: Optimizer steps.
        lr: Peak learning rate.
        seed: Of the initialisation and of the order of the data.
        curve: Whether the held-out loss is measured on the way, too.

    Raises:
        ValueError: If the held-out loss is measured on the way, and the evaluations do not divide the steps.
    """

    rung: Rung
    arm: Arm
    stage: str
    budget: float
    num_steps: int
    lr: float
    seed: int
    curve: bool = False

    def __post_init__(self) -> None:
        # Here, so that a registry is refused and not a run in the middle of a study.
        if self.curve and self.num_steps % _CURVE_POINTS:
            raise ValueError(f"{self.key} has {self.num_steps} steps, which {_CURVE_POINTS} evaluations do not divide.")

    @property
    def config(self) -> dict[str, Any]:
        """The model, the data, the method, the steps and the learning rate; what all arms share is in the commit."""
        return {
            "task": self.rung.task,
            "model": _model(self.rung, self.arm),
            "data": self.rung.data,
            "callbacks": [(name, _whole(getattr(lit_accel, name), given)) for name, given in self.arm.callbacks],
            "schedule": self.arm.schedule,
            "num_steps": self.num_steps,
            "lr": self.lr,
        }

    @property
    def config_hash(self) -> str:
        """A hash of :attr:`config`."""
        return sha256(dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def key(self) -> str:
        """What tells the job from all others."""
        return f"{self.rung.name}.{self.arm.name}.{self.stage}.{self.budget:g}.{self.config_hash}.{self.seed}"


def run_job(job: Job, commit: str) -> dict[str, Any]:
    """Train, and return a row of the log.

    Args:
        job: The run.
        commit: What this process has imported.
    """
    torch.set_num_threads(1)
    before = reference_step(job.rung)
    L.seed_everything(job.seed, verbose=False)
    clock = CpuClock()
    module, data = module_of(job.rung, job.arm, job.lr, job.num_steps), data_of(job.rung, job.seed)
    interval = job.num_steps // _CURVE_POINTS if job.curve else job.num_steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            strategy="resizable" if _resizes(job.arm) else "auto",
            precision="bf16-mixed",
            max_steps=job.num_steps,
            max_epochs=-1,
            val_check_interval=interval,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            callbacks=[ComputeLedger(folder=folder, print_table=False), *_callbacks(job), clock],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        started = time.perf_counter()
        trainer.fit(module, data)
        wall = time.perf_counter() - started
        ledger = read_ledger(folder)
    rows = ledger.measured("val/loss")
    if int(ledger.step[rows[-1]]) != job.num_steps:
        raise RuntimeError(f"{job.key} was measured last at step {ledger.step[rows[-1]]} of {job.num_steps}.")
    return {
        "rung": job.rung.name,
        "arm": job.arm.name,
        "stage": job.stage,
        "budget": job.budget,
        "num_steps": job.num_steps,
        "lr": job.lr,
        "seed": job.seed,
        "flops": float(ledger.flops[rows[-1]]),
        "dense_flops": float(ledger.dense_flops[rows[-1]]),
        "tokens": int(ledger.tokens[rows[-1]]),
        "cpu_seconds": clock.seconds,
        "wall_seconds": wall,
        "reference_step": [before, reference_step(job.rung)],
        "val_loss": float(ledger.metrics["val/loss"][rows[-1]]),
        "val_metrics": {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        },
        "curve": [[float(ledger.flops[row]), float(ledger.metrics["val/loss"][row])] for row in rows[:-1]],
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "config": job.config_hash,
        "data": data_hash(data),
        "commit": commit,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": provenance(),
    }


def module_of(rung: Rung, arm: Arm, lr: float, num_steps: int) -> Any:
    """Return the task of an arm, with AdamW (0.9, 0.95), decay 0.1 and the arm's schedule."""
    return getattr(lit_accel.tasks, rung.task)(
        **_model(rung, arm),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95)),
        weight_decay=0.1,
        lr_scheduler=_scheduler(rung, arm, num_steps),
    )


def current_commit() -> str:
    """Return the commit that runs.

    Raises:
        RuntimeError: If what runs is not what was committed.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "lit_accel", "strategies", "scripts/bench/*.py")
    if changed:
        raise RuntimeError(f"A run must be that of a commit, and these files have changed:\n{changed}\nCommit them.")
    return git("rev-parse", "--short=12", "HEAD")


def _model(rung: Rung, arm: Arm) -> dict[str, Any]:
    return {**rung.model, rung.sizes: {**rung.model[rung.sizes], **arm.changes}}


def _callbacks(job: Job) -> list[L.Callback]:
    """Make the methods; what they draw is drawn anew with each seed of the run."""
    kinds = [(getattr(lit_accel, name), options) for name, options in job.arm.callbacks]
    return [kind(**options, **({"seed": job.seed} if "seed" in _defaults(kind) else {})) for kind, options in kinds]


def _resizes(arm: Arm) -> bool:
    return any(name == "MultiLevelTraining" for name, _ in arm.callbacks)


def _scheduler(rung: Rung, arm: Arm, num_steps: int) -> Callable[[Optimizer], LRScheduler] | None:
    warmup = max(_LEAST_WARMUP, round(_WARMUP * num_steps))
    if arm.schedule == "none":
        return None
    if arm.schedule == "linear":
        return lambda optimizer: WarmupDecay(optimizer, num_warmup_steps=warmup)
    if arm.schedule == "layer_token":
        return lambda optimizer: LayerTokenLR(optimizer, num_warmup_steps=warmup)

    def held(optimizer: Optimizer) -> LayerTokenLR:
        scheduler = LayerTokenLR(optimizer, num_warmup_steps=warmup)
        scheduler.follow(_token_plan(rung, num_steps).progress())
        return scheduler

    return held


def _token_plan(rung: Rung, num_steps: int) -> TokenPlan:
    """Return what random-LTD with its defaults does over a run."""
    with torch.device("meta"):
        anatomy = anatomy_of(getattr(lit_accel.tasks, rung.task)(**rung.model).model)
    defaults = _whole(RandomLTD, {})
    schedule = TokenSchedule(defaults["start_tokens"], round(defaults["growth"] * num_steps))
    blocks = tuple(range(1, rung.model[rung.sizes][rung.depth] - 1))
    return TokenPlan(anatomy, blocks, schedule, num_steps, rung.data[1]["block_size"])


def _whole(kind: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with the defaults of those that were not given: a new default is another configuration."""
    return {**_defaults(kind), **given}


@cache
def _defaults(kind: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
