"""Stateless randomness: a generator that is a pure function of integers.

A draw that depends only on, say, `(seed, step, layer, rank)` is the same after a resume, on every rank that
uses the same keys, and whatever else has drawn numbers in between. The global generators are never touched.
"""

import hashlib
import operator

import torch


def generator(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Makes a fresh random generator from integer keys.

    The same keys always give the same stream, and keys that differ in any place, or in number, give unrelated
    ones: `generator(0, 1)` has nothing in common with `generator(1, 0)` or `generator(1)`.

    Args:
        *keys: One or more integers of any size and sign, for example `seed, step, layer, rank`.
        device: Where the generator lives. The stream of one device type differs from that of another, so draw
            on the CPU what must be equal on machines of different kinds.

    Returns:
        A new generator, owned by the caller.

    Raises:
        ValueError: If no key is given: everyone would share one stream.
        TypeError: If a key is not an integer.
    """
    if not keys:
        raise ValueError("generator() needs at least one integer key, for example generator(seed, step)")
    # Hashed, and not summed or shifted together: nearby steps and layers must not give nearby or equal seeds.
    words = ",".join(str(operator.index(key)) for key in keys)
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little", signed=True))
