"""How a global sparsity is spread over matrices of different shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

Distribution = Literal["uniform", "er", "erk"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)


def densities(
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float,
    distribution: Distribution = "uniform",
    sizes: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Return the density of each tensor.

    ``"er"`` gives a matrix the density ``eps * (n_in + n_out) / (n_in * n_out)`` (Erdős-Rényi; SET, Mocanu et al.
    2018), ``"erk"`` has the sizes of a convolution's kernel beside ``n_in`` and ``n_out`` (RigL, arXiv 1911.11134,
    section 3): on matrices they are the same. ``eps`` is such that the share of all entries is right; a tensor
    whose density would be above 1 is dense, and the others share the rest.

    Args:
        shapes: Shapes by name; the first two sizes are those of outputs and inputs.
        sparsity: Share of all entries that are off, in [0, 1).
        distribution: The rule.
        sizes: Entries that are switched with each tensor, where they are more than its own.
    """
    if distribution == "uniform" or sparsity == 0:
        return dict.fromkeys(shapes, 1 - sparsity)
    used = {name: shape if distribution == "erk" else shape[:2] for name, shape in shapes.items()}
    weights = {name: sum(shape) / math.prod(shape) for name, shape in used.items()}
    sizes = sizes or {name: math.prod(shape) for name, shape in shapes.items()}
    budget = (1 - sparsity) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        if not rest:
            return dict.fromkeys(shapes, 1.0)
        epsilon = (budget - sum(sizes[name] for name in dense)) / sum(weights[name] * sizes[name] for name in rest)
        full = {name for name in rest if epsilon * weights[name] > 1}
        if not full:
            return {name: 1.0 if name in dense else epsilon * weights[name] for name in shapes}
        dense |= full
