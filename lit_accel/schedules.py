"""Pure functions of the optimizer step: how far along a run is, and what follows from it.

Steps count completed optimizer steps, so the first one is taken at step 0 and the last at ``num_total_steps -
1``. Nothing here keeps state: the same step gives the same value before and after a resume, and on every
rank.
"""

import math
from typing import Literal

from lit_accel.arguments import is_number

Decay = Literal["linear", "cosine", "constant"]


def num_steps_of(duration: int | float, num_total_steps: int) -> int:
    """Turn a duration into optimizer steps.

    Args:
        duration: An ``int`` is a number of steps; a ``float`` in [0, 1] is a share of the run.
        num_total_steps: Length of the run in optimizer steps.

    Returns:
        The number of optimizer steps, a share rounded to the nearest one.

    Raises:
        ValueError: If ``duration`` is no number, negative, or a ``float`` above 1.

    Example::

        >>> num_steps_of(100, num_total_steps=2000), num_steps_of(0.1, num_total_steps=2000)
        (100, 200)
    """
    if not is_number(duration) or duration < 0 or (isinstance(duration, float) and duration > 1):
        raise ValueError(
            f"A duration is a number of steps (int) or a share of the run (float in [0, 1]), got {duration!r}."
        )
    return round(duration * num_total_steps) if isinstance(duration, float) else duration


def warmup_factor(step: int, num_warmup_steps: int) -> float:
    """Linear warm-up that neither wastes its first step on a zero nor ever exceeds one.

    Args:
        step: Completed optimizer steps, 0 or more.
        num_warmup_steps: Steps the warm-up takes; 0 is none.

    Returns:
        ``(step + 1) / num_warmup_steps``, at most 1: ``1 / num_warmup_steps`` at step 0, 1 from
        ``num_warmup_steps - 1`` on.
    """
    return 1.0 if step >= num_warmup_steps else (step + 1) / num_warmup_steps


def decay_factor(remaining: float, decay: Decay) -> float:
    """Decay from one to zero.

    Args:
        remaining: Share of the decay that still lies ahead, in [0, 1]. Ahead and not behind, because near the
            end a small number is exact where its difference from one is not.
        decay: ``"linear"``, ``"cosine"`` (half a period) or ``"constant"``, which never decays.

    Returns:
        A factor in [0, 1], exactly 1 where ``remaining`` is 1 and, unless constant, exactly 0 where it is 0.

    Raises:
        ValueError: If ``decay`` is none of the three.
    """
    if decay == "linear":
        return remaining
    if decay == "cosine":
        # The same curve as (1 - cos(pi * remaining)) / 2, which rounds to zero before its end.
        return math.sin(math.pi / 2 * remaining) ** 2
    if decay == "constant":
        return 1.0
    raise ValueError(f"decay must be 'linear', 'cosine' or 'constant', got {decay!r}.")


def warmup_decay_factor(step: int, *, num_warmup_steps: int, num_total_steps: int, decay: Decay = "linear") -> float:
    """Linear warm-up, then decay to zero at the end of the run.

    Args:
        step: Completed optimizer steps, 0 or more.
        num_warmup_steps: Steps the warm-up takes; 0 is none.
        num_total_steps: Length of the run, warm-up included. Not used when ``decay`` is ``"constant"``.
        decay: What follows the warm-up.

    Returns:
        A factor in [0, 1] of the peak learning rate: ``1 / num_warmup_steps`` at step 0 (1 without warm-up),
        1 when the warm-up ends, above 0 at the last step ``num_total_steps - 1``, and, unless constant,
        exactly 0 from ``num_total_steps`` on.

    Raises:
        ValueError: If ``decay`` is unknown.

    Example::

        >>> [warmup_decay_factor(s, num_warmup_steps=2, num_total_steps=6) for s in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if decay == "constant":
        return warmup_factor(step, num_warmup_steps)
    if step >= num_total_steps:
        return 0.0
    if step < num_warmup_steps:
        return warmup_factor(step, num_warmup_steps)
    return decay_factor((num_total_steps - step) / (num_total_steps - num_warmup_steps), decay)
