"""The schedules of progressive layer dropping (PLD): keep probabilities that fall with training and with depth.

Zhang and He, NeurIPS 2020, arXiv 2010.13369. Steps t are optimizer steps, blocks i are counted from 1 to L.
"""

from __future__ import annotations

import math
from typing import Literal

Direction = Literal["increasing", "decreasing"]
"""Whether the drop rate grows over the run, as published, or falls, as later work argues (arXiv 2402.05913)."""
Convention = Literal["paper", "deepspeed", "timm"]
"""How keep probabilities fall with depth; see :func:`keep_probabilities`."""


def theta_at(
    step: int, *, theta: float, gamma: float, direction: Direction = "increasing", release: int = 0, num_steps: int = 0
) -> float:
    """Return the keep probability of the deepest block at a step.

    Args:
        step: Completed optimizer steps t, at least 0.
        theta: Its limit, in (0, 1].
        gamma: Rate of the exponential, per step. Not used when decreasing.
        direction: ``"increasing"`` drops more and more: (1 - theta) exp(-gamma t) + theta (arXiv 2010.13369).
            ``"decreasing"`` begins at theta and rises linearly to 1; this shape is ours.
        release: The last steps of the run. Decreasing, every block is active in them; increasing, the probability rises
            in them linearly, to 1 at the last step. 0 is the published schedule.
        num_steps: Length of the run in optimizer steps. Not used when increasing without ``release``.

    Returns:
        A probability in [theta, 1].
    """
    if direction == "decreasing":
        rise = num_steps - release
        return 1.0 if step >= rise else theta + (1 - theta) * step / rise
    present = (1 - theta) * math.exp(-gamma * step) + theta
    if release and step >= num_steps - release:
        # From the end, so that it is exactly 1 there.
        num_left = max(num_steps - 1 - step, 0)
        present = max(present, 1 - (1 - theta) * num_left / release)
    return present


def keep_probabilities(theta: float, num_blocks: int, convention: Convention = "paper") -> list[float]:
    """Return the keep probability of each block, which falls linearly with depth.

    Args:
        theta: The keep probability of the deepest block, in (0, 1].
        num_blocks: Number of blocks L.
        convention: ``"paper"``: 1 - (i/L)(1 - theta) for block i (arXiv 2010.13369). ``"deepspeed"``: (i-1)/L
            in its place, as the reference code draws: the first block is always kept, the last more often than theta.
            ``"timm"``: (i-1)/(L-1), as lists of drop-path rates have it: from 1 to theta.

    Returns:
        L probabilities, the first block's first.
    """
    first, span = {"paper": (1, num_blocks), "deepspeed": (0, num_blocks), "timm": (0, num_blocks - 1)}[convention]
    return [1 - (first + index) / span * (1 - theta) for index in range(num_blocks)]
