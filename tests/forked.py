"""A program in a process forked from one that has done the imports, which take longer than most programs."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.distributed.launch import CONTEXT


class Done(NamedTuple):
    """How a process ended, what it printed and what it took."""

    returncode: int | None
    stdout: str
    stderr: str
    processor_seconds: float
    peak_bytes: int


def _main(folder: Path, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        target(*args)
    finally:
        after = resource.getrusage(resource.RUSAGE_SELF)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        # In units of 1024 bytes; with what was there when it was forked.
        (folder / "usage").write_text(f"{seconds} {after.ru_maxrss * 1024}")


def run_forked(folder: Path, target: Callable[..., Any], *args: Any, timeout: float = 120) -> Done:
    """Run a function in a process; an exception in it ends that with exit code 1.

    Args:
        folder: An empty one, for what the process prints.
        target: The function.
        args: Its arguments.
        timeout: Seconds after which the process is killed.
    """
    process = CONTEXT.Process(target=_main, args=(folder, target, args))
    process.start()
    process.join(timeout)
    process.kill()
    process.join()
    seconds, size = (folder / "usage").read_text().split()
    return Done(
        process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text(), float(seconds), int(size)
    )


def lit_accel(folder: Path, *args: str) -> None:
    """What the command does, in a folder."""
    from lit_accel.cli import main

    os.chdir(folder)
    sys.argv = ["lit-accel", *args]
    main()
