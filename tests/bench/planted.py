"""A log in which every arm saves what is planted, for a study without training."""

import math
from collections.abc import Mapping

import numpy as np

from scripts.bench.jobs import jobs, row_key
from scripts.bench.log import Row
from scripts.bench.train import Job

FLOOR, EXCESS, POWER = 1.0, 1.0, 0.2
DEVIATION = 0.003
# What an arm costs in parts of a dense run of as many steps, and by what its compute counts for more.
# Dense models cost the more, the more blocks they have, and something without any.
SHARES = {f"smaller-{depth}": 1 - 0.12 * (8 - depth) for depth in range(1, 8)}
SHARES |= {"vcycle": 0.57, "pld-paper": 0.75, "ltd": 0.78, "mst-units": 0.32}
FULL_SECONDS = {"mst-entries": 1.1}


def planted_log(worth: Mapping[str, float], best_lr: float = 5e-3) -> list[Row]:
    """Return the log of a finished study.

    Args:
        worth: How much dense compute a unit of an arm's compute is worth, by arm; 1 for those that are not named.
        best_lr: The optimum of all arms.
    """
    rows: list[Row] = []
    while True:
        done = {row_key(row) for row in rows}
        missing = {job.key: job for job in jobs(rows) if job.key not in done}
        if not missing:
            return rows
        rows += [_row(job, worth, best_lr) for job in missing.values()]


def _row(job: Job, worth: Mapping[str, float], best_lr: float) -> Row:
    share = SHARES.get(job.arm.name, 0.8 if job.arm.role == "method" else 1.0)
    dense_flops = job.num_steps * 1e10
    flops = share * dense_flops
    rng = np.random.default_rng([job.seed, job.num_steps, *job.arm.name.encode()])
    off = math.log2(job.lr / best_lr) ** 2 * 0.05
    effective = flops * worth.get(job.arm.name, 1.0) / 1e13
    loss = FLOOR + EXCESS * effective**-POWER + off + DEVIATION * rng.standard_normal()
    curve = [
        [dense_flops * part, FLOOR + EXCESS * (dense_flops * part / 1e13) ** -POWER + 0.1 * (1 - part)]
        for part in np.arange(1, 8) / 8
    ]
    return {
        "rung": job.rung.name,
        "arm": job.arm.name,
        "stage": job.stage,
        "budget": job.budget,
        "num_steps": job.num_steps,
        "lr": job.lr,
        "seed": job.seed,
        "flops": flops,
        "dense_flops": dense_flops,
        "cpu_seconds": FULL_SECONDS.get(job.arm.name, share) * job.num_steps * 0.1,
        "wall_seconds": 1.0,
        "reference_step": [0.1, 0.1],
        "val_loss": loss,
        "val_metrics": {"val/top1": 1 / loss, "val/accuracy": 1 / loss},
        "curve": curve if job.curve else [],
        "config": job.config_hash,
        "data": "planted",
        "commit": "planted",
        "time": "2026-01-01T00:00:00+00:00",
    }
