"""Token dropping: random layerwise token dropping (random-LTD, arXiv 2211.11586) and its learning-rate schedule."""

from lit_accel.methods.token_dropping.arguments import UnroutableArgumentError, restrict
from lit_accel.methods.token_dropping.dropper import TokenDropper
from lit_accel.methods.token_dropping.plan import TokenPlan, kept_by_block, layer_tokens
from lit_accel.methods.token_dropping.schedule import TokenSchedule
from lit_accel.methods.token_dropping.subsets import put, sample_tokens, take

__all__ = [
    "TokenDropper",
    "TokenPlan",
    "TokenSchedule",
    "UnroutableArgumentError",
    "kept_by_block",
    "layer_tokens",
    "put",
    "restrict",
    "sample_tokens",
    "take",
]
