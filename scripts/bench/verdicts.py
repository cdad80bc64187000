"""A verdict on each method, by the rules of the protocol and in plain words."""

from __future__ import annotations

import math
from typing import Literal

from lit_accel.report.noise import Cost
from scripts.bench.analysis import CONFIDENCE, Evidence, Gap, Reading
from scripts.bench.study import Arm

Verdict = Literal["helps", "helps in FLOPs only", "does not help", "undecided", "not finished"]


def verdict(evidence: Evidence, arm: Arm) -> tuple[Verdict, str]:
    """Return the verdict on a method, and the reasons in a sentence.

    Args:
        evidence: What the log says.
        arm: The method.
    """
    readings = evidence.of(arm.name)
    missing: dict[str, list[str]] = {}
    for what, budgets in (
        ("runs", _not_run(evidence, arm.name)),
        ("controls", [each.budget for each in readings if each.b1 is None or each.b2 is None]),
        # Who does not know yet whether the bench can be trusted passes no judgement by it.
        ("runs of the null method", _not_run(evidence, "null")),
        ("runs of half the rate", _not_run(evidence, "half-lr")),
    ):
        if budgets:
            missing.setdefault(" and ".join(f"x{budget:g}" for budget in budgets), []).append(what)
    reasons = "; ".join(_reasons(evidence, reading) for reading in readings)
    if missing:
        said = [f"{_listed(whats)} at budget {budgets} are missing" for budgets, whats in missing.items()]
        return "not finished", "; ".join([*([reasons] if reasons else []), *said])
    if null_holds(evidence) is False:
        return "undecided", f"{reasons}; the null method was told from nothing, so no verdict holds"
    if half_rate_is_seen(evidence) is False:
        return "undecided", f"{reasons}; half the learning rate was not seen, so no verdict holds"
    if all(_helps(evidence, reading) for reading in readings):
        in_seconds = null_holds(evidence, "seconds") is not False and all(
            reading.in_seconds.low is not None
            and reading.in_seconds.low > 0
            and evidence.better_model(reading, "seconds") is None
            for reading in readings
        )
        return "helps" if in_seconds else "helps in FLOPs only", reasons
    if all(_loses(evidence, reading) for reading in readings):
        return "does not help", reasons
    return "undecided", reasons


def _listed(names: list[str]) -> str:
    *firsts, last = names
    return f"{', '.join(firsts)} and {last}" if firsts else last


def _not_run(evidence: Evidence, arm: str) -> list[float]:
    run = {reading.budget for reading in evidence.of(arm)}
    return [budget for budget in evidence.rung.budgets if budget not in run]


def null_holds(evidence: Evidence, cost: Cost = "flops") -> bool | None:
    """Whether nothing was found where there is nothing; ``None`` while that was not looked at.

    Args:
        evidence: What the log says.
        cost: In FLOPs or in seconds.
    """
    savings = [reading.saving(cost) for reading in evidence.of("null")]
    known = [(saving.low, saving.high) for saving in savings if saving.low is not None and saving.high is not None]
    return all(low <= 0 <= high for low, high in known) if known else None


def half_rate_is_seen(evidence: Evidence) -> bool | None:
    """Whether a learning rate that is wrong by a factor of two was seen to cost compute; ``None`` while unknown."""
    savings = [reading.in_flops for reading in evidence.of("half-lr")]
    return all(saving.high is not None and saving.high < 0 for saving in savings) if savings else None


def _helps(evidence: Evidence, reading: Reading) -> bool:
    saving, p = reading.in_flops, evidence.p_values.get((reading.arm.name, reading.budget), 1.0)
    is_above = saving.low is not None and saving.low > 0 and p < 1 - CONFIDENCE
    beats_both = all(gap is not None and gap.outcome == "beats" for gap in (reading.b1, reading.b2))
    return is_above and beats_both and evidence.better_model(reading) is None


def _loses(evidence: Evidence, reading: Reading) -> bool:
    saving = reading.in_flops
    is_below = saving.high is not None and saving.high < 0
    # Worse than the cheapest dense run, and dearer: nothing was saved, though nobody can say how much was lost.
    cheapest, _ = evidence.in_flops.log_costs
    is_far_below = saving.outside == "worse" and saving.cost >= math.exp(cheapest)
    return is_below or is_far_below or reading.loses_to_a_control


def _reasons(evidence: Evidence, reading: Reading) -> str:
    parts = [f"at x{reading.budget:g} {saved(reading)}", *controls(reading)]
    if better := evidence.better_model(reading):
        said = "cost less and end no higher" if better.dominates(reading, "flops") else "save more"
        parts.append(f"{better.arm.title} {said}")
    elif better := evidence.better_model(reading, "seconds"):
        parts.append(f"{better.arm.title} save more seconds")
    return ", ".join(parts)


def saved(reading: Reading) -> str:
    """Say in words what was saved, in FLOPs and in seconds."""
    if reading.in_flops.share is None:
        return f"ends {str(reading.in_flops.reason).rpartition(': ')[2]}"
    flops = f"{reading.in_flops.share:+.0%} FLOPs"
    return flops if reading.in_seconds.share is None else f"{flops} and {reading.in_seconds.share:+.0%} seconds saved"


def controls(reading: Reading) -> list[str]:
    """Say in words how a method stands against its controls, as far as they were run."""
    return [_against(name, gap) for name, gap in (("B1", reading.b1), ("B2", reading.b2)) if gap is not None]


def _against(name: str, gap: Gap) -> str:
    return {"beats": "beats", "loses": "loses to", "not told": "cannot be told from"}[gap.outcome] + f" {name}"
