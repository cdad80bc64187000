"""IDX, the file format of MNIST and its successors: a header of big-endian integers, then the values."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> np.ndarray:
    """Reads a file of unsigned bytes, compressed (.gz) or not.

    The header is two zero bytes, the type of the values, the number of dimensions, and each dimension in four bytes.

    Args:
        path: The file.

    Returns:
        uint8, of the shape that the file says.

    Raises:
        ValueError: If it is no such file, or a part of it is missing.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} could not be read: {error}; fetch the file again") from error
    if not data:
        raise ValueError(f"{path} is empty; fetch the file again")
    if len(data) < 4 or data[:3] != bytes((0, 0, _UNSIGNED_BYTE)):
        raise ValueError(
            f"{path} is no IDX file of unsigned bytes: it begins with {data[:4].hex(' ')} and not with 00 00 08;"
            " a compressed file must be called .gz"
        )
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise ValueError(f"{path} ends within its header and holds 0 values; fetch the file again")
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path} says that its shape is {tuple(shape)} and holds {max(0, len(data) - start)} values;"
            " fetch the file again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
