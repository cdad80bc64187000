"""What the study says, where it is said: blocks of generated text by file, and the pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from scripts.bench import pictures, tables
from scripts.bench.analysis import Evidence, read_study
from scripts.bench.log import read_log
from scripts.bench.study import RUNGS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results"
# The method's card, and the arms that it shows.
_CARDS = {
    "multilevel": ("vcycle", "vcycle-paper", "small-expanded", "vcycle-ltd"),
    "layer_dropping": (
        *("pld-paper", "pld-unscaled", "pld", "pld-plain", "dropping-decreasing", "dropping-unscaled"),
        *("sbld", "sbld-later", "sbld-unscaled", "sbld-both"),
    ),
    "token_dropping": ("ltd", "ltd-ltlr", "dense-ltlr", "ltd-route", "ltd-input", "ltd-patches", "vcycle-ltd"),
    "mixed_sparsity": ("mst-units", "mst-entries"),
}
_PARTS = ("regime", "frontier", "depths", "checks", "verdicts", "savings", "costs", "tuning")
_HOW_TO_READ = (
    "FLOPs and seconds are those of a run in parts of a dense run of as many steps; *saved* is at equal loss, against\n"
    "the tuned dense frontier, with 95 % intervals; *above B1* and *above B2* are nats above dense training of the\n"
    "same cost and above a smaller dense model of it, negative where the method is better.\n"
    "[How it was measured](../../../docs/results/README.md)."
)


@cache
def evidence() -> dict[str, Evidence]:
    """Return what the log says of each rung; computed once, since its intervals take a while."""
    return read_study(read_log())


def blocks() -> dict[Path, dict[str, str]]:
    """Return the generated blocks of all files."""
    rows = read_log()
    found = evidence()
    study = {"study:state": tables.state(rows)}
    for name in RUNGS:
        each = found.get(name)
        if each is None:
            study |= {f"study:{name}:{part}": "Not run yet." for part in _PARTS}
            continue
        study |= {
            f"study:{name}:regime": tables.regime(each),
            f"study:{name}:frontier": tables.frontier_table(each),
            f"study:{name}:depths": _by_budget(each, tables.depths_table),
            f"study:{name}:checks": tables.checks_table(each),
            f"study:{name}:verdicts": tables.verdicts_table(each),
            f"study:{name}:savings": _by_budget(each, tables.savings_table),
            f"study:{name}:costs": _by_budget(each, tables.costs_table),
            f"study:{name}:tuning": tables.tuning_table(each),
        }
    study["study:short"] = tables.in_short(found)
    summary = [tables.state(rows), tables.in_short(found), tables.FAR_FROM_CONVERGED, tables.summary(found)]
    cards = {
        ROOT / "lit_accel" / "methods" / method / "README.md": {
            "results:study": "\n\n".join(
                [_HOW_TO_READ, *(f"{tables.regime(e)}\n\n{tables.card_table(e, arms)}" for e in found.values())]
            )
        }
        for method, arms in _CARDS.items()
    }
    return {FOLDER / "README.md": study, ROOT / "README.md": {"results:study": "\n\n".join(summary)}, **cards}


def draw() -> None:
    """Draw the pictures."""
    for each in evidence().values():
        pictures.draw(each, FOLDER)


def _by_budget(each: Evidence, make: Callable[[Evidence, float], str]) -> str:
    parts = [
        f"Budget x{budget:g}:\n\n{make(each, budget)}"
        for budget in each.rung.budgets
        if any(reading.budget == budget for reading in each.readings)
    ]
    return "\n\n".join(parts) or "Nothing yet."
