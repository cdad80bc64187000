"""Which methods go together, and in which order they decide: one table, checked before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.methods.method import Decision, Method, Span

ORDER: tuple[Decision, ...] = ("size", "units", "layers", "tokens")
"""Who decides first about an optimizer step: the model's size, which of its units are on, which blocks run, and on
which tokens each of these runs."""

_DOES: dict[Decision, str] = {
    "size": "change the size",
    "units": "switch units",
    "layers": "drop layers",
    "tokens": "drop tokens",
}

Verdict = Literal["ok", "warn", "refuse"]
MULTI_LEVEL, PLD, SBLD, RANDOM_LTD, MST = "multi-level", "PLD", "SBLD", "random-LTD", "MST"
TITLES = (MULTI_LEVEL, PLD, SBLD, RANDOM_LTD, MST)


@dataclass(frozen=True)
class Pair:
    """Whether two methods go together.

    Args:
        first: Title of one, see :attr:`~lit_accel.methods.method.Method.title`.
        second: Title of the other.
        verdict: ``"ok"``; ``"warn"``: it runs, and what speaks against it is said; ``"refuse"``: it is an error.
        reason: Why, and what holds in such a run.
    """

    first: str
    second: str
    verdict: Verdict
    reason: str


PAIRS: tuple[Pair, ...] = (
    Pair(
        MULTI_LEVEL,
        PLD,
        "ok",
        "each level drops its own blocks by the rule of depth, and the schedule goes on through changes of size",
    ),
    Pair(
        MULTI_LEVEL,
        SBLD,
        "ok",
        "sensitivities follow the blocks, averaged on the way down and copied on the way up, and are measured anew as "
        "far as max_overhead allows",
    ),
    Pair(
        MULTI_LEVEL,
        RANDOM_LTD,
        "ok",
        "a change of size leaves tokens alone, and the schedule of kept tokens goes on through it",
    ),
    Pair(
        MULTI_LEVEL,
        MST,
        "warn",
        "both save on a model that is small for most of the run: merging units makes a sparse model dense, and copies "
        "of a unit tie for the magnitude by which one would be dropped. The size may change only while all units are "
        "on",
    ),
    Pair(PLD, SBLD, "refuse", "both decide which blocks run"),
    Pair(PLD, RANDOM_LTD, "ok", "a dropped block skips its tokens altogether"),
    Pair(SBLD, RANDOM_LTD, "ok", "a dropped block skips its tokens altogether"),
    Pair(
        PLD,
        MST,
        "warn",
        "a weight is updated less often, so that units are judged after fewer updates: lengthen update_every "
        "accordingly. All blocks run in the steps in which units are chosen by gradient",
    ),
    Pair(
        SBLD,
        MST,
        "warn",
        "what a block is worth changes with the units that are on: it is measured anew at each change of sparsity, "
        "as far as max_overhead allows. All blocks run in the steps in which units are chosen by gradient",
    ),
    Pair(
        RANDOM_LTD,
        MST,
        "ok",
        "tokens and units are independent of each other; units are chosen by the gradients of the tokens that are "
        "there",
    ),
)
"""Whether each two methods go together, of whose settings nothing else is known."""


@dataclass(frozen=True)
class Clash:
    """Settings of two methods that do not go together, though the methods do.

    Args:
        first: Title of one method.
        second: Title of the other.
        why: Returns the reason if it occurs; ``None`` if not.
        needs_plan: Whether it depends on what is done in which step, which is known once the length of the run is.
    """

    first: str
    second: str
    why: Callable[[Any, Any], str | None]
    needs_plan: bool = False


def _shares_steps(first: Iterable[Span], second: Iterable[Span]) -> Span | None:
    for start, end in first:
        for other_start, other_end in second:
            if max(start, other_start) < min(end, other_end):
                return max(start, other_start), min(end, other_end)
    return None


def _drops_input(layers: Any, tokens: Any) -> str | None:
    if tokens.scope != "input":
        return None
    return (
        f'scope="input" takes tokens out before the first block, which {type(layers).__name__} may skip. Use '
        'scope="layer" or "route".'
    )


def _has_pattern(tokens: Any, units: Any) -> str | None:
    if units.attention_pattern is None:
        return None
    shared = _shares_steps(tokens.spans(), [units.targets.pattern_steps])
    if shared is None:
        return None
    return (
        f"in steps {shared[0]} to {shared[1] - 1} RandomLTD drops tokens while attention follows the pattern "
        f'"{units.attention_pattern}": kept tokens are not neighbours, and a pattern of positions would be laid over '
        f"others than those it means. Let attention_phase begin at step {tokens.spans()[-1][1]} or later, let growth "
        'end before it, or set attention_pattern="dense".'
    )


def _resizes_sparse(levels: Any, units: Any) -> str | None:
    sparsity = units.targets.schedule.sparsity
    for step in levels.resize_steps:
        highest = max(sparsity(step), sparsity(max(step - 1, 0)))
        if highest > 0:
            return (
                f"{type(levels).__name__} changes the size of the model at step {step}, where the sparsity is "
                f"{highest}: units that are off cannot be merged or split. Let stages be 0 before and after each "
                "change of size."
            )
    return None


CLASHES: tuple[Clash, ...] = (
    Clash(PLD, RANDOM_LTD, _drops_input),
    Clash(SBLD, RANDOM_LTD, _drops_input),
    Clash(RANDOM_LTD, MST, _has_pattern, needs_plan=True),
    Clash(MULTI_LEVEL, MST, _resizes_sparse, needs_plan=True),
)


def pair_of(first: str, second: str) -> Pair:
    """Return what is known of two methods.

    Args:
        first: Title of one.
        second: Title of the other, in any order.

    Raises:
        KeyError: If it is not in the table.
    """
    for pair in PAIRS:
        if {pair.first, pair.second} == {first, second}:
            return pair
    raise KeyError(f"There is no pair of {first} and {second}; methods are {', '.join(TITLES)}.")


def in_order(methods: Iterable[Method]) -> list[Method]:
    """Return methods in the order in which they decide about a step.

    Args:
        methods: The methods.
    """
    return sorted(methods, key=lambda method: ORDER.index(method.decides))


def check_pairs(methods: Sequence[Method]) -> list[str]:
    """Check that methods go together.

    Args:
        methods: Those of a run; neutral ones count as absent.

    Returns:
        What is to be warned about.

    Raises:
        MisconfigurationException: If two do not, with the reason.
    """
    warnings = []
    for first, second in combinations(in_order(m for m in methods if not m.is_neutral), 2):
        names = type(first).__name__, type(second).__name__
        if first.decides == second.decides:
            who = f"Two {names[0]} callbacks" if names[0] == names[1] else " and ".join(names)
            raise MisconfigurationException(
                f"{who} would {'both ' if names[0] != names[1] else ''}{_DOES[first.decides]} of one model. Use one of "
                "them."
            )
        pair = pair_of(first.title, second.title)
        if pair.verdict == "refuse":
            raise MisconfigurationException(f"{names[0]} and {names[1]} do not go together: {pair.reason}.")
        if pair.verdict == "warn":
            warnings.append(f"{names[0]} and {names[1]} in one run: {pair.reason}.")
    check_clashes(methods, are_planned=False)
    return warnings


def check_clashes(methods: Sequence[Method], *, are_planned: bool = True) -> None:
    """Check that settings of methods go together.

    Args:
        methods: Those of a run; neutral ones count as absent.
        are_planned: Whether the length of the run is known; if not, only what does not depend on it is checked.

    Raises:
        MisconfigurationException: If two do not, with the reason.
    """
    by_title = {method.title: method for method in methods if not method.is_neutral}
    for clash in CLASHES:
        if clash.first in by_title and clash.second in by_title and (are_planned or not clash.needs_plan):
            first, second = by_title[clash.first], by_title[clash.second]
            reason = clash.why(first, second)
            if reason is not None:
                raise MisconfigurationException(
                    f"{type(first).__name__} and {type(second).__name__} do not go together as they are set: {reason}"
                )


def warn_about(warnings: Iterable[str]) -> None:
    """Say what speaks against a combination."""
    for warning in warnings:
        rank_zero_warn(warning)
