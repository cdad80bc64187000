"""What a model is made of: residual blocks, named axes, tied parameters. One file a family, as data."""

# Importing a family registers it; none of them imports its model library.
from lit_accel.anatomy import bert, gpt2, llama, roberta, swin_v2, vit  # noqa: F401
from lit_accel.anatomy.axes import Axis, Dim, parse_layout, positions_along
from lit_accel.anatomy.base import Anatomy, AnatomyError, Attention, AttentionKernel, Block, ParameterLayout, Size
from lit_accel.anatomy.build import (
    build_resized,
    compile_blocks,
    is_compiled,
    loses_compilation,
    lost_in_resize,
    rehearse_build,
    require_blocks_alike,
    uses_activation_checkpointing,
)
from lit_accel.anatomy.following import TransformerFollower
from lit_accel.anatomy.registry import anatomy_of, describe_as, find_transformer, register_anatomy

__all__ = [
    "Anatomy",
    "AnatomyError",
    "Attention",
    "AttentionKernel",
    "Axis",
    "Block",
    "Dim",
    "ParameterLayout",
    "Size",
    "TransformerFollower",
    "anatomy_of",
    "build_resized",
    "compile_blocks",
    "describe_as",
    "find_transformer",
    "is_compiled",
    "loses_compilation",
    "lost_in_resize",
    "parse_layout",
    "positions_along",
    "register_anatomy",
    "rehearse_build",
    "require_blocks_alike",
    "uses_activation_checkpointing",
]
