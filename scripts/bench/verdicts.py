"""A verdict on each method, by the rules of the protocol and in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from scripts.bench.analysis import CONFIDENCE, Evidence, Gap, Reading
from scripts.bench.study import Arm

Verdict = Literal["helps", "does not help", "undecided", "not finished"]


def verdict(evidence: Evidence, arm: Arm) -> tuple[Verdict, str]:
    """Return the verdict on a method, and the reasons in a sentence.

    Args:
        evidence: What the log says.
        arm: The method.
    """
    readings = evidence.of(arm.name)
    missing = [
        budget
        for budget in evidence.rung.budgets
        if not any(each.budget == budget and each.b1 and each.b2 for each in readings)
    ]
    reasons = "; ".join(_reasons(reading) for reading in readings)
    if missing:
        budgets = " and ".join(f"x{budget:g}" for budget in missing)
        return "not finished", f"{reasons}{'; ' if reasons else ''}runs at budget {budgets} are missing"
    if all(_helps(evidence, reading) for reading in readings):
        return "helps", reasons
    if all(_loses(reading) for reading in readings):
        return "does not help", reasons
    return "undecided", reasons


def _helps(evidence: Evidence, reading: Reading) -> bool:
    saving, p = reading.in_flops, evidence.p_values.get((reading.arm.name, reading.budget), 1.0)
    is_above = saving.low is not None and saving.low > 0 and p < 1 - CONFIDENCE
    return is_above and all(gap is not None and gap.high < 0 for gap in (reading.b1, reading.b2))


def _loses(reading: Reading) -> bool:
    saving = reading.in_flops
    is_below = saving.high is not None and saving.high < 0
    # Worse than the cheapest dense run, and dearer: nothing was saved, though nobody can say how much was lost.
    is_far_below = saving.reason is not None and "worse" in saving.reason
    return is_below or is_far_below or any(gap is not None and gap.low > 0 for gap in (reading.b1, reading.b2))


def _reasons(reading: Reading) -> str:
    parts: Sequence[str] = [
        f"at x{reading.budget:g} {saved(reading)}",
        *(_against(name, gap) for name, gap in (("B1", reading.b1), ("B2", reading.b2)) if gap is not None),
    ]
    return ", ".join(parts)


def saved(reading: Reading) -> str:
    """Say in words what was saved in FLOPs."""
    saving = reading.in_flops
    if saving.share is None:
        return f"ends {str(saving.reason).rpartition(': ')[2]}"
    word = "saves" if saving.share >= 0 else "costs"
    return f"{word} {abs(saving.share):.0%}{'' if saving.share >= 0 else ' more'}"


def _against(name: str, gap: Gap) -> str:
    if gap.high < 0:
        return f"beats {name}"
    return f"loses to {name}" if gap.low > 0 else f"cannot be told from {name}"
