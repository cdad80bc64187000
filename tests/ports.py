"""Ports that neither another process of the test run asks for nor the system takes for connections."""

from __future__ import annotations

import os
import socket
from itertools import count

_STRETCH = 500
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Below the range that systems take the ports of connections from.
_FIRST = 20_000 + _STRETCH * (_WORKER % 20)
_NUMBERS = count()


def free_port() -> int:
    """Return a port that nobody listens on, and that was not returned for a while."""
    while True:
        port = _FIRST + next(_NUMBERS) % _STRETCH
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
