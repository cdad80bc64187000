"""Which arguments of mixed sparsity training can be; each message says what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_accel.arguments import is_number, is_whole
from lit_accel.methods.mixed_sparsity.attention import PATTERNS
from lit_accel.methods.mixed_sparsity.distribution import DISTRIBUTIONS
from lit_accel.methods.mixed_sparsity.units import n_of_m


def check_units(ffn: Any, attention: Any, head: Any) -> None:
    """Check that units have names that exist.

    Raises:
        ValueError: If one has not.
    """
    matrix = ("element", "block")
    for argument, units, allowed in (
        ("ffn_units", ffn, ("neuron", *matrix)),
        ("attention_units", attention, ("head", *matrix)),
        ("head_units", head, ("element",)),
    ):
        if units in (*allowed, "dense"):
            continue
        pattern = n_of_m(units) if isinstance(units, str) else None
        if argument == "head_units" or pattern is None:
            more = "" if argument == "head_units" else ', or "N:M" such as "2:4"'
            names = ", ".join(repr(name) for name in (*allowed, "dense"))
            raise ValueError(f"{argument} is {units!r}; it is one of {names}{more}.")
        num_kept, of = pattern
        if not 0 < num_kept < of:
            raise ValueError(
                f"{argument} is {units!r}: of {of} neighbours {num_kept} are kept. Keep at least 1 and fewer than all."
            )


def check_stages(stages: Any) -> None:
    """Check the stages of a schedule.

    Raises:
        ValueError: If there cannot be such stages.
    """
    if not isinstance(stages, Sequence) or isinstance(stages, str):
        raise ValueError(
            f"stages is {stages!r}; it is a list of pairs of a start and a sparsity: [[0, 0.0], [0.06, 0.9]]."
        )
    if not stages:
        raise ValueError("stages is empty. Give at least one pair of a start and a sparsity, such as [[0, 0.0]].")
    for entry in stages:
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            raise ValueError(f"stages has the entry {entry!r}; each is a pair of a start and a sparsity: [0.06, 0.9].")
        start, sparsity = entry
        if not is_number(sparsity) or not 0 <= sparsity < 1:
            reason = ": at 1 every layer would be empty" if sparsity == 1 else ""
            raise ValueError(
                f"stages has the sparsity {sparsity}{reason}. It is the share of the units that are off, at least 0 "
                "and below 1."
            )
        if not _is_point(start):
            raise ValueError(
                f"stages has the start {start}; it is a number of optimizer steps (int), or a share of the run (float "
                "from 0 to 1)."
            )
    if stages[0][0] != 0:
        raise ValueError(f"The first of stages starts at {stages[0][0]}; it starts at 0: how sparse is the run before?")
    for kind in (int, float):
        starts = [start for start, _ in stages if isinstance(start, kind)]
        if starts != sorted(starts):
            raise ValueError(f"stages are out of order: they start at {starts}. List them by their starts.")


def check_numbers(drop_fraction: Any, gradient_share: Any, seed: Any, counts: Mapping[str, Any]) -> None:
    """Check the remaining numbers.

    Args:
        drop_fraction: See :class:`~lit_accel.MixedSparsityTraining`.
        gradient_share: See there.
        seed: See there.
        counts: Arguments that are at least 1, by name.

    Raises:
        ValueError: If one cannot be.
    """
    for argument, value, below in (("drop_fraction", drop_fraction, True), ("gradient_share", gradient_share, False)):
        if not is_number(value) or not 0 <= value <= 1 or (below and value == 1):
            raise ValueError(f"{argument} is {value!r}; it is a share, from 0 to {'below ' if below else ''}1.")
    for argument, count in counts.items():
        if not is_whole(count) or count < 1:
            raise ValueError(f"{argument} is {count!r}; it is a whole number, at least 1.")
    if not is_whole(seed):
        raise ValueError(f"seed is {seed!r}; it is a whole number.")


def check_choices(distribution: Any, execution: Any, pattern: Any, phase: Any) -> None:
    """Check the remaining arguments.

    Raises:
        ValueError: If one is none of its values.
    """
    for argument, value, allowed in (
        ("distribution", distribution, DISTRIBUTIONS),
        ("execution", execution, ("compact", "masked")),
        ("attention_pattern", pattern, (*PATTERNS, "dense", None)),
    ):
        if value not in allowed:
            raise ValueError(f"{argument} is {value!r}; it is one of {', '.join(map(repr, allowed))}.")
    is_pair = isinstance(phase, Sequence) and not isinstance(phase, str) and len(phase) == 2
    given = list(phase) if isinstance(phase, Sequence) and not isinstance(phase, str) else phase
    if not is_pair or not all(_is_point(bound) for bound in phase):
        raise ValueError(
            f"attention_phase is {given!r}; it is a pair: the first step that attends by the pattern and the first one "
            "after, in optimizer steps (int) or as shares of the run (float from 0 to 1)."
        )
    if type(phase[0]) is type(phase[1]) and phase[0] > phase[1]:
        raise ValueError(f"attention_phase is {given!r}: it ends before it begins. Give the first step first.")


def _is_point(value: Any) -> bool:
    """Whether a value is a number of steps or a share of the run."""
    return is_number(value) and value >= 0 and (isinstance(value, int) or value <= 1)
