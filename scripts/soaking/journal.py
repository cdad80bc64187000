"""What a run has seen to its end, written down so that a killed process cannot take it back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE_NAME = "journal.jsonl"


class Journal:
    """A file of one line an event, in the folder of a run; several processes may append to it.

    Args:
        folder: The folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME

    def note(self, event: str, *, sync: bool = False, **fields: Any) -> None:
        """Append an event in one write.

        Args:
            event: What happened.
            sync: Whether it must be on the disk when this returns.
            **fields: What else there is to say.
        """
        line = json.dumps({"event": event, **fields}) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return all events of a kind, oldest first."""
        if not self.path.is_file():
            return []
        entries = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [entry for entry in entries if entry["event"] == event]

    def last(self, event: str) -> dict[str, Any] | None:
        """Return the newest event of a kind."""
        return next(reversed(self.events(event)), None)
