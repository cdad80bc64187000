"""One attempt: a run is killed, once or several times in a row, then let run to its end and compared."""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from lit_accel.methods.compatibility import MST
from scripts.soaking.cases import STEPS, Case
from scripts.soaking.comparing import Comparison, compare
from scripts.soaking.deaths import POINTS, Death, Kind
from scripts.soaking.journal import Journal
from scripts.soaking.leftovers import check_checkpoint, count_temporary_files
from scripts.soaking.processes import start_ranks
from scripts.soaking.training import FINAL, LIMIT, train

KILLED = -signal.SIGKILL
SAVE_EVERY = (1, 2, 3, 5)
PATIENCE = LIMIT + 30
"""Seconds after which a process is taken to hang: it would have said so and ended by itself before."""
_EARLY = 0.2
ALONE_LIMIT = 60.0
"""Seconds within which a rank that is left alone must have ended."""


class BrokenRunError(RuntimeError):
    """A run that ended in another way than it should have."""


@dataclass
class Fate:
    """What became of the processes of a run that were to die.

    Args:
        death: What was planned.
        start: Which process of the run it was.
        step: Optimizer steps done when it died; ``None`` if it died before the first.
        resumed_at: The step at which the next one has started.
        saved_step: The newest step whose checkpoint was complete when it died; ``None`` if there was none.
        lost: What is wrong with the checkpoints that it left; empty if nothing is.
        seconds_alone: How long the other rank took to end, if it was left to itself.
        hung: Whether it did not end.
    """

    death: Death
    start: int
    step: int | None
    resumed_at: int | None = None
    saved_step: int | None = None
    lost: list[str] = field(default_factory=list)
    seconds_alone: float | None = None
    hung: bool = False


@dataclass
class Attempt:
    """What became of a run that was killed.

    Args:
        case: The case.
        fates: Its deaths.
        comparison: How it ended, in comparison; ``None`` if it did not.
        broken: Why it did not, where it was not killed.
        temporary_files: Files that are neither checkpoints nor logs, left when all was over.
    """

    case: Case
    fates: list[Fate]
    comparison: Comparison | None = None
    broken: str = ""
    temporary_files: int = 0

    @property
    def is_good(self) -> bool:
        """Whether nothing differs, nothing is lost and nothing hung."""
        ended = self.comparison is not None and self.comparison.is_equal
        return ended and not any(fate.lost or fate.hung for fate in self.fates)


@dataclass(frozen=True)
class Soak:
    """Where runs are.

    Args:
        folder: The working folder.
    """

    folder: Path

    @property
    def cache(self) -> Path:
        """The folder of token files."""
        return self.folder / "cache"

    def reference(self, case: Case) -> Path:
        """Return the folder of the uninterrupted run of a case, which is trained if there is none yet."""
        folder = self.folder / "references" / case.name
        done = folder / "done"
        if not done.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            run_to_end(case, folder, self.cache, start=0, save_every=3)
            done.touch()
        return folder

    def seconds(self, case: Case) -> float:
        """Return how long the uninterrupted run of a case has trained."""
        journal = Journal(self.reference(case))
        started, ended = journal.last("starts"), journal.last("ends")
        assert started is not None
        assert ended is not None
        return ended["time"] - started["time"]

    def attempt(self, case: Case, seed: int, folder: Path, planned: list[Death] | None = None) -> Attempt:
        """Kill a run, let it run to its end and compare it.

        Args:
            case: The case.
            seed: Of the choice of deaths.
            folder: The folder of the run; it should not exist.
            planned: The deaths; default is to draw one to three.
        """
        reference = self.reference(case)
        folder.mkdir(parents=True)
        draws = random.Random(seed)
        save_every = draws.choice(SAVE_EVERY)
        attempt = Attempt(case, [])
        journal = Journal(folder)
        try:
            for start in range(draws.choice((1, 1, 2, 3)) if planned is None else len(planned)):
                saved = journal.last("saved")
                now = 0 if saved is None else saved["step"]
                death = draw_death(draws, case, now, save_every) if planned is None else planned[start]
                fate = run_to_death(case, folder, self.cache, start, save_every, death, self.seconds(case))
                if fate is None:
                    # It was through before its time had come.
                    break
                attempt.fates.append(fate)
            else:
                run_to_end(case, folder, self.cache, len(attempt.fates), save_every)
        except BrokenRunError as error:
            attempt.broken = str(error)
        _note_resumes(attempt.fates, journal)
        if not attempt.broken and (folder / FINAL).is_file():
            attempt.comparison = compare(
                folder, reference, [fate.resumed_at for fate in attempt.fates if fate.resumed_at]
            )
        attempt.temporary_files = count_temporary_files(folder)
        return attempt


def draw_death(draws: random.Random, case: Case, now: int, save_every: int) -> Death:
    """Draw when a process dies that starts at a step.

    Args:
        draws: Where from.
        case: The case.
        now: The step.
        save_every: Optimizer steps between checkpoints.
    """
    kinds: list[Kind] = ["time", "step", "backward", "validation", "write", "write"]
    to_resize = [step for step in case.resize_steps if step >= now]
    kinds += ["resize", "resize"] if to_resize else []
    kinds += ["update", "update"] if MST in case.titles and now < case.last_update else []
    kind = draws.choice(kinds)
    last = {"validation": STEPS // 2, "update": case.last_update, "write": STEPS - save_every}.get(kind, STEPS - 1)
    step = draws.choice(to_resize) if kind == "resize" else draws.randint(now, max(last, now))
    # Only the first of several ranks writes.
    rank = 0 if kind == "write" else draws.randrange(case.ranks)
    alone = case.ranks > 1 and draws.random() < 0.4
    return Death(kind, draws.choice(POINTS[kind]), step, rank, alone, draws.random())


def run_to_end(case: Case, folder: Path, cache: Path, start: int, save_every: int) -> None:
    """Start a run, or go on with it, and wait for its end.

    Raises:
        BrokenRunError: If it does not end as it should.
    """
    ranks = start_ranks(train, (case, folder, cache, start, save_every, None), case.ranks)
    _wait(ranks, PATIENCE)
    codes = _end(ranks)
    if any(codes):
        raise BrokenRunError(_how_it_ended(case, folder, start, codes))


def run_to_death(
    case: Case, folder: Path, cache: Path, start: int, save_every: int, death: Death, seconds: float
) -> Fate | None:
    """Start a run, or go on with it, and kill it.

    Args:
        case: The case.
        folder: The folder of the run.
        cache: The folder of token files.
        start: Which process of the run it is.
        save_every: Optimizer steps between checkpoints.
        death: When it dies.
        seconds: How long a whole run trains.

    Returns:
        What became of it; ``None`` if it was through before.

    Raises:
        BrokenRunError: If it ended by itself, and not well.
    """
    journal = Journal(folder)
    ranks = start_ranks(train, (case, folder, cache, start, save_every, death), case.ranks)
    if death.kind == "time":
        _kill_later(ranks, death, journal, start, seconds)
    _wait(ranks, PATIENCE)
    died_at, codes = time.monotonic(), [rank.exitcode for rank in ranks]
    if KILLED not in codes and None not in codes and not any(codes):
        return None
    if KILLED not in codes and any(codes):
        raise BrokenRunError(_how_it_ended(case, folder, start, _end(ranks)))
    steps = [event["step"] for event in journal.events("step") if event["start"] == start]
    fate = Fate(death, start, step=steps[-1] if steps else None, hung=KILLED not in codes)
    if death.alone and not fate.hung:
        others = _running(ranks)
        _wait(others, PATIENCE, everyone=True)
        fate.seconds_alone = round(time.monotonic() - died_at, 2)
        fate.hung = bool(_running(others)) or fate.seconds_alone > ALONE_LIMIT
        if any(rank.exitcode == 0 for rank in ranks):
            fate.lost.append("the rank that was left alone ended as if nothing had happened")
    _end(ranks)
    saved = journal.last("saved")
    fate.saved_step = None if saved is None else saved["step"]
    fate.lost += check_checkpoint(folder, fate.saved_step)
    return fate


def _kill_later(ranks: list[BaseProcess], death: Death, journal: Journal, start: int, seconds: float) -> None:
    """Kill from outside: some before training begins, most in its midst."""
    delay = seconds * death.share
    # Who loses a rank before all have met waits for it as long as torch says, half an hour: that is none of our doing.
    if death.alone or death.share >= _EARLY:
        delay = seconds * (death.share if death.alone else (death.share - _EARLY) / (1 - _EARLY))
        while not _ended(ranks) and all(event["start"] != start for event in journal.events("starts")):
            time.sleep(0.01)
    _wait(ranks, delay)
    ranks[death.rank].kill()


def _note_resumes(fates: list[Fate], journal: Journal) -> None:
    """Note where each killed run has gone on: a process that dies early may not have got so far."""
    starts = journal.events("starts")
    for fate in fates:
        fate.resumed_at = next((event["step"] for event in starts if event["start"] > fate.start), None)
        if fate.resumed_at is None and fate.saved_step == STEPS and journal.events("ends"):
            # From the checkpoint of the last step, after which training does not even start.
            fate.resumed_at = STEPS
        if fate.resumed_at is not None and fate.resumed_at < (fate.saved_step or 0):
            fate.lost.append(f"it went on at step {fate.resumed_at}, and the checkpoint of {fate.saved_step} was whole")


def _how_it_ended(case: Case, folder: Path, start: int, codes: list[int | None]) -> str:
    said = (folder / f"output-{start}-{codes.index(next(filter(None, codes)))}.txt").read_text().splitlines()
    return f"{case.name}: process {start} ended with {codes}: {said[-1] if said else ''}"


def _running(ranks: list[BaseProcess]) -> list[BaseProcess]:
    return [rank for rank in ranks if rank.exitcode is None]


def _ended(ranks: list[BaseProcess]) -> bool:
    return len(_running(ranks)) < len(ranks)


def _wait(ranks: list[BaseProcess], seconds: float, everyone: bool = False) -> None:
    """Wait until one process has ended with an error, or all have ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while running := _running(ranks):
        left = deadline - time.monotonic()
        if left <= 0 or (not everyone and any(rank.exitcode for rank in ranks)):
            return
        wait([cast(Any, rank.sentinel) for rank in running], timeout=left)


def _end(ranks: list[BaseProcess]) -> list[int | None]:
    """End what still runs, and return the exit codes."""
    for rank in ranks:
        rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks]
