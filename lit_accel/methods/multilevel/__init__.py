"""Multi-level training (V-cycle): Zou, Han and Deng, ICLR 2024, arXiv 2404.07999."""

from lit_accel.methods.multilevel.maps import LevelMap, level_map
from lit_accel.methods.multilevel.moments import merge_optimizer_state, project_optimizer_state
from lit_accel.methods.multilevel.operators import Interpolation, coalesce, decoalesce, interpolate

__all__ = [
    "Interpolation",
    "LevelMap",
    "coalesce",
    "decoalesce",
    "interpolate",
    "level_map",
    "merge_optimizer_state",
    "project_optimizer_state",
]
