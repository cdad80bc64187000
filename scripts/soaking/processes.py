"""Real processes, one a rank, forked from one that has done the imports: a start takes a tenth of a second."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import socket
from collections.abc import Callable, Sequence
from itertools import count
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
_FIRST_PORT, _NUM_PORTS = 30_000, 2_500
# From anywhere: two soaks at a time, begun one after the other, must not look for the same ports.
_NUMBERS = count(random.SystemRandom().randrange(_NUM_PORTS))


def free_port() -> int:
    """Return a port that nobody listens on, outside of the ranges of the tests and of the system's connections."""
    while True:
        port = _FIRST_PORT + next(_NUMBERS) % _NUM_PORTS
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def start_ranks(
    target: Callable[..., None], args: Sequence[Any], devices: int, port: int | None = None
) -> list[BaseProcess]:
    """Run a function in processes, one a rank.

    Args:
        target: The function, importable by its name.
        args: Its arguments.
        devices: The number of ranks.
        port: Where they meet. Default: one that is free.

    Returns:
        The processes, started.
    """
    port = free_port() if port is None else port
    ranks = [CONTEXT.Process(target=_rank_main, args=(rank, port, devices, target, args)) for rank in range(devices)]
    for rank in ranks:
        rank.start()
    return ranks


def _rank_main(rank: int, port: int, devices: int, target: Callable[..., None], args: Sequence[Any]) -> None:
    os.environ["MASTER_PORT"] = str(port)
    if devices > 1:
        # What torchrun tells its workers; Lightning then starts no processes of its own.
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            TORCHELASTIC_RUN_ID="test",
            WORLD_SIZE=str(devices),
            RANK=str(rank),
            GROUP_RANK="0",
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(devices),
        )
    # A resize collects garbage: what was imported is none, and need not be searched each time.
    gc.freeze()
    target(*args)
