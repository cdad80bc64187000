"""Real processes for a test, forked from one that has done the imports."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from tests.ports import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [f"tests.distributed.{name}" for name in ("cycle", "dropping", "merged", "sharded", "sparsity", "tokens")]
)


def _rank_main(rank: int, port: int, devices: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
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


def launch(target: Callable[..., None], *args: Any, devices: int, exitcode: int = 0) -> None:
    """Run a function in processes, one a rank, and see that each ends with the given exit code."""
    port = free_port()
    ranks = [CONTEXT.Process(target=_rank_main, args=(rank, port, devices, target, args)) for rank in range(devices)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
        rank.kill()
        rank.join()
    assert [rank.exitcode for rank in ranks] == [exitcode] * devices
