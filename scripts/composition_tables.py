"""The tables of docs/composition.md: what methods say about themselves, and which of them go together."""

from __future__ import annotations

from lit_accel import (
    MixedSparsityTraining,
    MultiLevelTraining,
    ProgressiveLayerDropping,
    RandomLTD,
    SensitivityLayerDropping,
)
from lit_accel.methods.compatibility import PAIRS, in_order
from lit_accel.methods.method import Method

METHODS: tuple[type[Method], ...] = (
    MultiLevelTraining,
    MixedSparsityTraining,
    ProgressiveLayerDropping,
    SensitivityLayerDropping,
    RandomLTD,
)
FACTS = {
    "changes_size": "changes the size",
    "leaves_parameters_unused": "leaves parameters unused",
    "needs_whole_parameters": "needs whole parameters",
    "chooses_by_gradient": "needs all blocks in some steps",
    "measures_blocks": "depends on measurements",
}


def facts_table() -> str:
    """Return the facts of each method, in the order in which they decide."""
    lines = [
        f"| callback | decides | {' | '.join(FACTS.values())} |",
        f"| --- | --- | {' | '.join('---' for _ in FACTS)} |",
    ]
    kinds = [type(method) for method in in_order(kind.__new__(kind) for kind in METHODS)]
    for kind in kinds:
        facts = " | ".join("yes" if getattr(kind, fact) else "" for fact in FACTS)
        lines.append(f"| `{kind.__name__}` ({kind.title}) | {kind.decides} | {facts} |")
    return "\n".join(lines)


def pairs_table() -> str:
    """Return each pair with its verdict and the reason."""
    rows = [f"| {pair.first} + {pair.second} | {pair.verdict} | {pair.reason} |" for pair in PAIRS]
    return "\n".join(["| methods | verdict | because |", "| --- | --- | --- |", *rows])
