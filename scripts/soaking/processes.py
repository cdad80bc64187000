"""Real processes, one a rank, forked from one that has done the imports: a start takes a tenth of a second."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from scripts.soaking.ports import Ports

CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
# From anywhere in its stretch: two soaks at a time, begun one after the other, must not look for the same ports.
_PORTS = Ports(30_000, 2_500, random.SystemRandom().randrange(2_500))


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
    port = _PORTS.free() if port is None else port
    ranks = [CONTEXT.Process(target=_rank_main, args=(rank, port, devices, target, args)) for rank in range(devices)]
    for rank in ranks:
        rank.start()
    return ranks


def _rank_main(rank: int, port: int, devices: int, target: Callable[..., None], args: Sequence[Any]) -> None:
    os.environ["MASTER_PORT"] = str(port)
    # The models are tiny: threads of several ranks would only wait for each other. Strategies leave the number as it
    # is where the variable is set.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
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
