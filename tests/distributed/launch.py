"""Real processes for a test, forked from one that has done the imports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.soaking.processes import CONTEXT, start_ranks
from tests.ports import free_port

CONTEXT.set_forkserver_preload(
    [
        "scripts.soaking.training",
        *(
            f"tests.distributed.{name}"
            for name in ("cycle", "dropping", "merged", "ranks", "sharded", "sparsity", "tokens")
        ),
    ]
)


def launch(target: Callable[..., None], *args: Any, devices: int, exitcode: int = 0) -> None:
    """Run a function in processes, one a rank, and see that each ends with the given exit code."""
    ranks = start_ranks(target, args, devices, free_port())
    for rank in ranks:
        rank.join(timeout=120)
        rank.kill()
        rank.join()
    assert [rank.exitcode for rank in ranks] == [exitcode] * devices
