"""The data of a rung, and what tells them from others."""

from __future__ import annotations

from typing import Any

import lit_accel.data
from scripts.bench.study import Rung


def data_of(rung: Rung, seed: int) -> Any:
    """Return the data in the order of a seed; what is held out is the same for all."""
    kind, options = rung.data
    return getattr(lit_accel.data, kind)(**options, seed=seed)


def data_hash(data: Any) -> str:
    """Return what tells the data from others."""
    return str(data.state_dict().get("tokens") or data.state_dict().get("images"))
