"""How many tokens are kept: monotonic sequence-length growth (Yao et al., arXiv 2211.11586, section 3).

A pure function of the optimizer step and of the sequence's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lit_accel.arguments import is_number, is_whole

Compat = Literal["deepspeed"]


@dataclass(frozen=True)
class TokenSchedule:
    """Kept tokens that grow linearly from a start to the whole sequence, in steps of a quantum.

    Deviations from the released code: the quantum never rounds below ``start``, and the whole sequence is reached at
    ``growth_steps`` also where its length is no multiple of the quantum. ``compat="deepspeed"`` is the code's formula.

    Args:
        start: Kept tokens at step 0: a number (int) or a share of the sequence in (0, 1] (float).
        growth_steps: Optimizer steps until nothing is dropped; with 0 nothing ever is.
        quantum: Of which the number of kept tokens is a multiple while it grows.
        max_lengths: At most so many distinct lengths, the whole sequence included; the quantum is multiplied as need
            be. Default: no limit.
        compat: ``"deepspeed"`` for the formula of DeepSpeed's scheduler ``fixed_linear``.

    Raises:
        ValueError: If a value is not allowed.
    """

    start: int | float
    growth_steps: int
    quantum: int = 8
    max_lengths: int | None = None
    compat: Compat | None = None

    def __post_init__(self) -> None:
        is_share = isinstance(self.start, float)
        if not is_number(self.start) or self.start <= 0 or (is_share and self.start > 1):
            raise ValueError(
                f"start_tokens is {self.start!r}; it is a number of tokens (int), at least 1, or a share of the "
                "sequence (float) in (0, 1]. 1.0 drops nothing."
            )
        if not is_whole(self.growth_steps, 0):
            raise ValueError(f"growth_steps is {self.growth_steps!r}; it is a number of optimizer steps, at least 0.")
        if not is_whole(self.quantum, 1):
            raise ValueError(
                f"quantum is {self.quantum!r}; kept tokens grow by multiples of it, so it is at least 1. 8 suits "
                "16-bit matrix units."
            )
        if self.max_lengths is not None and not is_whole(self.max_lengths, 2):
            raise ValueError(
                f"max_lengths is {self.max_lengths!r}; the whole sequence is one length, so at least 2 are needed for "
                "anything to be dropped."
            )
        if self.compat not in (None, "deepspeed"):
            raise ValueError(f"compat is {self.compat!r}; allowed are None and 'deepspeed'.")
        if self.compat and (is_share or self.max_lengths is not None):
            raise ValueError(
                'compat="deepspeed" is its formula as it is: start_tokens is a number of tokens, and there is no '
                "max_lengths."
            )
        if self.compat and self.start < self.quantum:
            raise ValueError(
                f'compat="deepspeed" rounds start_tokens {self.start} down to a multiple of quantum {self.quantum}, '
                "which is 0: nothing would be kept. Raise start_tokens, lower the quantum, or leave compat out."
            )

    def kept_tokens(self, step: int, num_tokens: int) -> int:
        """Return how many tokens of a sequence are kept.

        Args:
            step: Completed optimizer steps, 0 or more.
            num_tokens: Tokens of the sequence.

        Returns:
            A number from 1 to ``num_tokens``; the latter, too, where a sequence is no longer than ``start``.
        """
        if self.compat == "deepspeed":
            if num_tokens <= self.start or self.growth_steps == 0:
                return num_tokens
            grown = math.floor(step / self.growth_steps * (num_tokens - self.start) + self.start)
            return min(grown - grown % self.quantum, num_tokens)
        if step >= self.growth_steps:
            return num_tokens
        start, first = self._start_of(num_tokens), self.first_tokens(num_tokens)
        quantum = self.quantum_for(num_tokens)
        # In integers: a share of the growth as a float falls short of whole numbers now and then.
        num_quanta = ((start - first) * self.growth_steps + (num_tokens - start) * step) // (
            self.growth_steps * quantum
        )
        return min(num_tokens, first + quantum * max(0, num_quanta))

    def is_over(self, step: int) -> bool:
        """Return whether no sequence, however long, loses a token any more.

        Args:
            step: Completed optimizer steps.
        """
        # By DeepSpeed's formula it depends on the length when the whole sequence is reached.
        return self.compat is None and step >= self.growth_steps

    def kept_windows(self, step: int, num_windows: int) -> int:
        """Return how many windows of an image are kept.

        There are often so few of them that rounding down would drop far more than was asked for. So they are rounded up
        or down in such a way that all windows kept up to a step are those wanted up to it, but for less than one.

        Args:
            step: Completed optimizer steps, 0 or more.
            num_windows: Windows of the image; ``start`` must be a share.

        Returns:
            A number from 1 to ``num_windows``.
        """
        if step >= self.growth_steps:
            return num_windows
        before, after = (
            math.floor(num_windows * (self.start * t + (1 - self.start) * t * (t - 1) / (2 * self.growth_steps)))
            for t in (step, step + 1)
        )
        return max(1, min(num_windows, after - before))

    def first_tokens(self, num_tokens: int) -> int:
        """Return the smallest number of kept tokens: ``start``, rounded up to a multiple of ``quantum``."""
        return min(num_tokens, -(-self._start_of(num_tokens) // self.quantum) * self.quantum)

    def quantum_for(self, num_tokens: int) -> int:
        """Return the multiple of ``quantum`` that gives no more than ``max_lengths`` lengths."""
        if self.max_lengths is None:
            return self.quantum
        span = num_tokens - self.first_tokens(num_tokens)
        return self.quantum * max(1, -(-span // (self.quantum * (self.max_lengths - 1))))

    def _start_of(self, num_tokens: int) -> int:
        start = round(self.start * num_tokens) if isinstance(self.start, float) else self.start
        return max(1, min(start, num_tokens))
