"""Layer dropping: progressive (PLD, arXiv 2010.13369) and sensitivity-based (SBLD, AAAI 2023)."""

from lit_accel.methods.layer_dropping.budget import allocate, floor_of, noise, robust
from lit_accel.methods.layer_dropping.dropper import BlockDropper
from lit_accel.methods.layer_dropping.kept_schedule import kept_share
from lit_accel.methods.layer_dropping.progressive import keep_probabilities, theta_at
from lit_accel.methods.layer_dropping.protection import BlockList
from lit_accel.methods.layer_dropping.sampling import sample_blocks
from lit_accel.methods.layer_dropping.sensitivity import Meter, ablate

__all__ = [
    "BlockDropper",
    "BlockList",
    "Meter",
    "ablate",
    "allocate",
    "floor_of",
    "keep_probabilities",
    "kept_share",
    "noise",
    "robust",
    "sample_blocks",
    "theta_at",
]
