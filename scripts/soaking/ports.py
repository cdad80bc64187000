"""Ports that nobody else asks for: neither another run, nor the system for its connections."""

from __future__ import annotations

import socket
from itertools import count


class Ports:
    """A stretch of ports, to be asked for one after the other.

    Args:
        first: The first of them; systems take the ports of connections from 32,768 on.
        number: How many there are.
        start: Where to begin among them.
    """

    def __init__(self, first: int, number: int, start: int = 0) -> None:
        self.first = first
        self.number = number
        self._numbers = count(start)

    def free(self) -> int:
        """Return a port that nobody listens on, and that was not returned for a while."""
        while True:
            port = self.first + next(self._numbers) % self.number
            with socket.socket() as tried:
                try:
                    tried.bind(("127.0.0.1", port))
                except OSError:
                    continue
                return port
