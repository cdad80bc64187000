"""Kill runs of every method at random moments, resume them, and compare them with the uninterrupted ones.

``python -m scripts.soak --minutes 30`` appends a line a kill to ``scripts/results/soak.jsonl``, prints what they come
to, and fails if a resumed run differs in a single bit or a checkpoint was lost; what such an attempt has left stays in
``runs/soak/kept``. ``--summary`` prints what the file says; ``--memory`` and ``--parity`` are measurements apart.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import lit_accel
import lit_accel.strategies
from scripts.soaking.attempts import Attempt, Soak
from scripts.soaking.cases import Case, cases
from scripts.soaking.processes import CONTEXT
from scripts.soaking.recording import RESULT, append, is_bad, origin, read, records_of, show

FOLDER = Path("runs/soak")
PRELOAD = ["scripts.soaking.training"]


def sources_digest() -> str:
    """Return what stands for the sources of the package, of the runs and of torch: references are of one version."""
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=6)
    package = [path for folder in (lit_accel, lit_accel.strategies) for path in Path(folder.__path__[0]).rglob("*.py")]
    soaking = Path(__file__).parent / "soaking"
    for path in [*sorted(package), soaking / "cases.py", soaking / "training.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def chosen(pattern: str, dropout: float) -> list[Case]:
    """Return the cases whose name matches a pattern.

    Raises:
        SystemExit: If there is none.
    """
    every = cases(dropout)
    if found := [case for case in every if fnmatch.fnmatch(case.name, pattern)]:
        return found
    raise SystemExit(f"No case matches {pattern!r}; there are {', '.join(case.name for case in every)}.")


def dealt(among: list[Case], seed: int) -> Iterator[tuple[int, Case]]:
    """Yield seeds and cases without end: all cases in a random order, then all in another one."""
    draws = random.Random(seed)
    while True:
        for case in draws.sample(among, len(among)):
            yield draws.getrandbits(32), case


def soak(minutes: float, num_kills: int | None, among: list[Case], seed: int, console: Console) -> list[dict]:
    """Kill, resume and compare until the time is over or there were enough kills.

    Args:
        minutes: How long.
        num_kills: How many kills are enough; ``None``: no number is.
        among: The cases.
        seed: Of everything that is drawn.
        console: Where to say what goes on.

    Returns:
        A record of each kill; they are in the result file, too.
    """
    CONTEXT.set_forkserver_preload(PRELOAD)
    folder = FOLDER / sources_digest()
    source, place = origin(), Soak(folder.absolute())
    records: list[dict] = []
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("soak", total=num_kills or minutes * 60, state="")
        for index, (attempt_seed, case) in enumerate(dealt(among, seed)):
            passed = time.monotonic() - started
            if passed > minutes * 60 or (num_kills is not None and len(records) >= num_kills):
                break
            num_bad = sum(map(is_bad, records))
            progress.update(
                bar,
                completed=len(records) if num_kills else passed,
                state=f"{len(records)} kills, {num_bad} bad; {case.name}",
            )
            name = f"{seed}-{index}"
            at = folder.absolute() / "attempts" / name
            shutil.rmtree(at, ignore_errors=True)
            attempt = place.attempt(case, attempt_seed, at)
            new = [{**record, **source} for record in records_of(attempt, name, attempt_seed)]
            append(new)
            records += new
            if attempt.is_good:
                shutil.rmtree(at)
            else:
                _say_what_is_wrong(attempt, _kept(at), console)
            if not attempt.fates and not attempt.is_good:
                # No kill, and so no record: it would go on as if nothing had been.
                raise SystemExit(f"{case.name} ended by itself before it was killed: {attempt.broken}")
    return records


def _kept(folder: Path) -> Path:
    kept = FOLDER / "kept" / folder.name
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, kept)
    return kept


def _say_what_is_wrong(attempt: Attempt, kept: Path, console: Console) -> None:
    console.print(f"[red]{attempt.case.name}[/red] is not what it should be; see {kept}", soft_wrap=True)
    for fate in attempt.fates:
        console.print(f"  {fate}", soft_wrap=True)
    if attempt.broken:
        console.print(f"  {attempt.broken}", soft_wrap=True)
    if attempt.comparison is not None:
        for part, differences in attempt.comparison.differences.items():
            for difference in differences[:5]:
                console.print(f"  {part}: {difference}", soft_wrap=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to go on")
    parser.add_argument("--kills", type=int, help="stop after so many kills")
    parser.add_argument("--cases", default="*", help='names of cases, as a pattern such as "gpt2-*-ddp"')
    parser.add_argument("--dropout", type=float, default=0.0, help="of the models")
    parser.add_argument("--seed", type=int, help="of everything that is drawn; default: a new one")
    parser.add_argument("--summary", action="store_true", help="only print what the result file says")
    parser.add_argument("--memory", action="store_true", help="measure whether memory grows, instead")
    parser.add_argument("--parity", action="store_true", help="compare two ranks with one, instead")
    arguments = parser.parse_args()
    console = Console()
    if arguments.memory:
        from scripts.soaking.memory import measure

        sys.exit(measure(console))
    if arguments.parity:
        from scripts.soaking.parity import measure as measure_parity

        sys.exit(measure_parity(console))
    if arguments.summary:
        records = read()
    else:
        seed = random.SystemRandom().getrandbits(24) if arguments.seed is None else arguments.seed
        among = chosen(arguments.cases, arguments.dropout)
        console.print(f"{len(among)} cases, seed {seed}; a line a kill goes to {RESULT.parent.name}/{RESULT.name}")
        records = soak(arguments.minutes, arguments.kills, among, seed, console)
    show(records, console)
    sys.exit(any(map(is_bad, records)))


if __name__ == "__main__":
    main()
