"""Wall time that can be paused."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Measures laps; time while it is paused belongs to no lap."""

    def __init__(self) -> None:
        self._since: float | None = None

    def start(self) -> None:
        """Begin to count."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap or start, 0 while paused."""
        if self._since is None:
            return 0.0
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    def pause(self) -> None:
        """Stop counting until the next start; take the lap first."""
        self._since = None


def synchronize(device: torch.device) -> None:
    """Wait until a device has done the work it was given; on the CPU nothing waits."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
