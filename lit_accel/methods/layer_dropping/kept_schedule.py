"""How much of the blocks' compute is kept over a run: a pure function of the optimizer step.

SBLD (Zeng et al., AAAI 2023) has a scheduler for the whole model's keep probability whose formula is in none of the
public sources that we could read. This one is a reconstruction: everything is kept while the model is new and
everything changes, then less, and everything again at the end, so that the trained model is the one that is used.
"""

import math

_SHARE_OF_RAMP_DONE = 0.99


def kept_share(step: int, num_steps: int, *, kept: float, warmup: int, ramp: int, release: int) -> float:
    """Return the share of the blocks' compute to keep at an optimizer step.

    Args:
        step: Completed optimizer steps, 0 or more.
        num_steps: Length of the run in optimizer steps, 1 or more.
        kept: Share that is kept between ramp and release, in (0, 1].
        warmup: Steps at the start in which everything is kept.
        ramp: Steps in which 99 % of the way from 1 to ``kept`` is gone, exponentially; the rest follows at the same
            rate. 0 gets there at once.
        release: Steps at the end in which the share returns linearly to 1; 0 is none.

    Returns:
        A share in [``kept``, 1]: exactly 1 before step ``warmup`` and, with a release, from the last step
        ``num_steps - 1`` on. What is left of the ramp when the release begins counts until the release is above it.

    Raises:
        ValueError: If ``kept`` is outside (0, 1], a duration is negative, or together they exceed the run.

    Example::

        >>> [kept_share(step, 6, kept=0.5, warmup=2, ramp=0, release=2) for step in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.75, 1.0]
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept is {kept}; it is the share of the blocks' compute to keep and must be in (0, 1].")
    if min(warmup, ramp, release) < 0:
        raise ValueError(
            f"warmup, ramp and release are {warmup}, {ramp} and {release} optimizer steps; none may be negative. "
            "0 leaves a part out."
        )
    if warmup + ramp + release > num_steps:
        raise ValueError(
            f"warmup, ramp and release take {warmup} + {ramp} + {release} optimizer steps, the run has {num_steps}. "
            "Shorten them, or train for longer."
        )
    if step < warmup:
        return 1.0
    above = math.exp(math.log(1 - _SHARE_OF_RAMP_DONE) * (step - warmup) / ramp) if ramp else 0.0
    if release:
        above = max(above, min((step - (num_steps - release) + 1) / release, 1.0))
    return kept + (1 - kept) * above
