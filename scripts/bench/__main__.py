"""Go on with the study: make the runs that are missing from the log, one process a core.

A process may be killed at any time: what it was at is made anew. Several may be started; no two make the same run.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from scripts.bench.data import data_hash, data_of
from scripts.bench.jobs import jobs, row_key
from scripts.bench.log import Row, append, read_log
from scripts.bench.study import RUNGS
from scripts.bench.train import ROOT, Job, current_commit, run_job
from scripts.timed_gpt import KEEP_MEMORY

_CLAIMS = ROOT / "runs" / "bench"
_WORKER = "LIT_ACCEL_BENCH_WORKER"
_WAIT = 3.0


def main() -> None:
    """Start a process a core, and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="start no run after so long; default: until nothing is missing")
    arguments = parser.parse_args()
    until = None if arguments.minutes is None else time.time() + 60 * arguments.minutes
    if _WORKER in os.environ:
        work(os.environ[_WORKER], until)
        return
    rows = read_log()
    Console().print(f"Commit {current_commit()}; {len(rows)} runs in the log.")
    check_data(rows)
    command = [sys.executable, "-m", "scripts.bench", *sys.argv[1:]]
    # timm too has an attention whose backward pass is slow here; see attention.py.
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TIMM_FUSED_ATTN": "0", **KEEP_MEMORY}
    workers = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings, _WORKER: str(number)})
        for number in range(os.cpu_count() or 1)
    ]
    try:
        codes = [worker.wait() for worker in workers]
    except KeyboardInterrupt:
        for worker in workers:
            worker.kill()
        raise SystemExit("Stopped; the same command goes on.") from None
    if any(codes):
        raise SystemExit(f"Processes ended with {codes}.")


def check_data(rows: Sequence[Row]) -> None:
    """Refuse to go on with other data than those of the log.

    Raises:
        SystemExit: If this machine has others.
    """
    for rung in RUNGS.values():
        known = {row["data"] for row in rows if row["rung"] == rung.name}
        if not known:
            continue
        data = data_of(rung, 0)
        data.prepare_data()
        data.setup("fit")
        if data_hash(data) not in known:
            raise SystemExit(
                f"The runs of {rung.name} in the log were trained on other data ({', '.join(known)}) than this machine "
                f"has ({data_hash(data)}): the standard library differs between versions of Python. Use that of the "
                "log's rows (provenance), or move the log away to begin a study of your own."
            )


def work(name: str, until: float | None) -> None:
    """Make runs until none is missing or the time is up."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    console = Console()
    # That of now: this process goes on with what it has imported, whatever is committed later.
    commit = current_commit()
    failed: set[str] = set()
    while until is None or time.time() < until:
        rows = read_log()
        done = {row_key(row) for row in rows}
        missing = list({job.key: job for job in jobs(rows) if job.key not in done | failed}.values())
        if not missing:
            console.print(f"[{name}] nothing is missing; {len(failed)} runs failed", markup=False)
            return
        with claimed(missing) as job:
            if job is None:
                time.sleep(_WAIT)
                continue
            try:
                row = run_job(job, commit)
            except Exception:
                # One run that cannot be made must not keep the others from it.
                console.print_exception()
                failed.add(job.key)
                continue
            append(row)
        what = f"{job.rung.name} {job.arm.name} x{job.budget:g} {job.stage} lr {job.lr:g} seed {job.seed}"
        console.print(
            f"[{name}] {time.strftime('%H:%M:%S')} {what}: {row['val_loss']:.4f}, "
            f"{row['flops'] / row['dense_flops']:.0%} of dense, {row['wall_seconds']:.0f} s; "
            f"{len(missing) - 1} known to be missing",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


@contextmanager
def claimed(missing: list[Job]) -> Iterator[Job | None]:
    """Hold the first run that no other process is at; the system lets go of it when this process dies."""
    _CLAIMS.mkdir(parents=True, exist_ok=True)
    for job in missing:
        with (_CLAIMS / f"{job.key}.claim").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            # Another process may have made it between our look at the log and now.
            if job.key in {row_key(row) for row in read_log()}:
                continue
            yield job
            Path(file.name).unlink(missing_ok=True)
            return
    yield None


if __name__ == "__main__":
    main()
