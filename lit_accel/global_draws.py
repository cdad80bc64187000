"""Stateless randomness for libraries that draw from the global generators, as timm's augmentation does."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lit_accel.draws import generator


@contextmanager
def seeded_globals(*keys: int) -> Iterator[None]:
    """Seeds the global generators from integer keys inside of the context, and puts them back after it.

    So a draw in it is a pure function of the keys, and nobody outside can tell that there was one. It holds for
    Python's `random`, NumPy and torch on the CPU; generators of other devices are left alone, because their state
    is slow to read and cannot be read in a forked process.

    Args:
        *keys: One or more integers; see `lit_accel.draws.generator`.

    Raises:
        ValueError: If no key is given.
    """
    seed = generator(*keys).initial_seed()
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        random.seed(seed)
        np.random.seed([seed >> 32, seed & 0xFFFFFFFF])  # noqa: NPY002 - the very generator that must be seeded
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the other devices as well
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
