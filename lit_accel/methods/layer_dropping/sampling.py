"""Which blocks run in an optimizer step: draws that depend on the seed, the step and the probabilities so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from lit_accel.draws import generator

Sampler = Literal["systematic", "bernoulli"]
"""``bernoulli``: each block by itself. ``systematic``: as many in every step as the probabilities sum up to."""

# Tells these draws from those of other parts of the package with the same seed.
_LAYERS = 6
# Sums of probabilities that differ from a whole number by rounding alone are meant to be whole.
_ROUNDING = 1e-9


def sample_blocks(
    keep_probabilities: Sequence[float],
    *,
    seed: int,
    step: int,
    sampler: Sampler = "systematic",
    num_expected: float = 0.0,
) -> list[bool]:
    """Draw the blocks that run in a step; the same everywhere, and no global generator is touched.

    Args:
        keep_probabilities: Of each block, in [0, 1]. Those of 1 always run.
        seed: Seed of the run.
        step: The optimizer step.
        sampler: ``"bernoulli"`` (arXiv 2010.13369) keeps each block independently. ``"systematic"`` has the same
            probabilities, but keeps the sum of them rounded down or up, and rounds such that the blocks kept in a
            whole run differ from their expectation by less than one.
        num_expected: For ``"systematic"``, the sum of the probabilities of all blocks over all earlier steps.

    Returns:
        Whether each block runs.

    Raises:
        ValueError: If ``sampler`` is none of the two.
    """
    draws = generator(seed, _LAYERS, step)
    if sampler == "bernoulli":
        uniform = torch.rand(len(keep_probabilities), generator=draws, dtype=torch.float64).tolist()
        return [u < p for u, p in zip(uniform, keep_probabilities, strict=True)]
    if sampler != "systematic":
        raise ValueError(f"sampler is {sampler!r}; allowed are 'systematic' and 'bernoulli'.")
    keep = [p >= 1 for p in keep_probabilities]
    # A fixed order would never drop two neighbours together, or always.
    order = [i for i in torch.randperm(len(keep), generator=draws).tolist() if not keep[i]]
    expected = math.fsum(keep_probabilities[i] for i in order)
    whole = math.floor(expected + _ROUNDING)
    part = max(expected - whole, 0.0)
    part = 0.0 if part < _ROUNDING else part
    # One offset in [0, 1) for the whole run: rounding then carries over from step to step, and over all runs a step
    # rounds up with probability `part`. Given that, `start` is uniform in [0, 1), as systematic sampling wants it.
    offset = torch.rand((), generator=generator(seed, _LAYERS), dtype=torch.float64).item()
    carried = offset + num_expected % 1.0
    rounds_up = part > 0 and math.floor(carried % 1.0 + part) > 0
    share = torch.rand((), generator=draws, dtype=torch.float64).item()
    start = 1 - part + share * part if rounds_up else share * (1 - part)
    total = 0.0
    for place, index in enumerate(order):
        last = place == len(order) - 1
        following = whole + part if last else total + keep_probabilities[index]
        keep[index] = math.floor(following + start) > math.floor(total + start)
        total = following
    return keep
