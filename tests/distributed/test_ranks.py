"""Two real processes that disagree, or of which one is lost: an error on what is left, and no waiting for ever."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ranks
from tests.distributed.launch import start_ranks
from tests.distributed.ranks import INTERVAL, METHODS, ODD_STEP, TIMEOUT, TITLES

pytestmark = pytest.mark.processes


def run(target: Any, folder: Path, *args: Any, lost: bool = False) -> tuple[list[int | None], float]:
    """Start two processes and wait for them, for the first alone if the other is lost: exit codes, and the time."""
    processes = start_ranks(target, (folder, *args), devices=2)
    for process in processes[:1] if lost else processes:
        process.join(timeout=120)
    ended = time.time()
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes, ended


def words(folder: Path, rank: int) -> tuple[int, str]:
    num_batches, _, message = (folder / f"{rank}.txt").read_text().partition("\n")
    return int(num_batches), message


@pytest.mark.parametrize(("name", "sharded"), [*((name, False) for name in METHODS), ("cycle", True), ("ltd", True)])
def test_other_settings_are_found_before_the_first_step(tmp_path, name, sharded):
    codes, _ = run(ranks.with_other_settings, tmp_path, name, sharded)
    assert codes == [3, 3]
    for rank in (0, 1):
        num_batches, message = words(tmp_path, rank)
        assert num_batches == 0
        assert message.startswith(f"Ranks 1 and rank 0 disagree about the rules of {TITLES[name]} of step 0.")


@pytest.mark.parametrize("name", ["cycle", "pld", "ltd", "mst"])
def test_other_decisions_are_found_at_the_next_comparison(tmp_path, name):
    codes, _ = run(ranks.with_other_decisions, tmp_path, name)
    assert codes == [3, 3]
    step = -(-ODD_STEP // INTERVAL) * INTERVAL
    for rank in (0, 1):
        num_batches, message = words(tmp_path, rank)
        assert num_batches == step
        assert f"Ranks 1 and rank 0 disagree about what their methods have decided of step {step}." in message


# Within a small level, and right after the last change of size.
@pytest.mark.parametrize(
    ("name", "how", "step", "sharded"),
    [
        ("cycle", signal.SIGKILL, 3, False),
        ("cycle", signal.SIGKILL, 6, True),
        ("pld", signal.SIGKILL, 4, False),
        ("mst", signal.SIGKILL, 4, False),
        # It stands still, and its connections stay open: only the time-out ends that.
        ("cycle", signal.SIGSTOP, 3, False),
    ],
)
def test_a_lost_rank_ends_the_run(tmp_path, name, how, step, sharded):
    codes, ended = run(ranks.losing_a_rank, tmp_path, name, how, step, sharded, lost=True)
    seconds = ended - float((tmp_path / "ended").read_text())
    # An error of ours or of the back end, which may also end the process.
    assert codes[0] not in (0, None), f"rank 0 still waits after {seconds:.0f} s"
    assert seconds < TIMEOUT + 20
    assert how == signal.SIGKILL or seconds > TIMEOUT / 2
