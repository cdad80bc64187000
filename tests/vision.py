"""Small vision models of timm, of the same sizes as the language models beside them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.layers import GluMlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

IMAGE_SIZE = 12
# Older versions of timm build a SwinV2 only where windows fill the image.
PADS_WINDOWS = "dynamic_img_size" in inspect.signature(SwinTransformerV2.__init__).parameters
# (class, arguments): tokens of every kind, norms in every place, packed gates, heads that a factor of 2 cannot divide.
VISION_ZOO: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "vit": (VisionTransformer, {}),
    "vit-pooled": (VisionTransformer, {"class_token": False, "global_pool": "avg", "pre_norm": True}),
    "vit-registers": (
        VisionTransformer,
        {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.5, "qk_norm": True, "proj_bias": False},
    ),
    "vit-swiglu": (VisionTransformer, {"mlp_layer": SwiGLU, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "vit-glu": (VisionTransformer, {"mlp_layer": GluMlp}),
    "vit-respost": (VisionTransformer, {"block_fn": ResPostBlock, "num_classes": 0}),
    "deit-distilled": (VisionTransformerDistilled, {}),
    "swin": (SwinTransformerV2, {"window_size": 3}),
    # Three patches a side in the second stage: padded to two windows of two.
    "swin-padded": (SwinTransformerV2, {"window_size": 2, "qkv_bias": False, "global_pool": "max"}),
    "swin-heads": (SwinTransformerV2, {"window_size": 3, "num_heads": 1}),
}
if not PADS_WINDOWS:
    del VISION_ZOO["swin-padded"]


def make_vision_module(name: str, *, heads: int, head_dim: int, ffn: int, blocks: int, **extra: Any) -> nn.Module:
    """Build a vision model; Swin has ``blocks`` pairs of blocks in its second stage, of twice the heads."""
    cls, arguments = VISION_ZOO[name]
    arguments = {"num_classes": 5, **arguments, **extra}
    embed = heads * head_dim
    if cls is SwinTransformerV2:
        first = arguments.pop("num_heads", heads)
        return cls(
            img_size=IMAGE_SIZE,
            patch_size=2,
            embed_dim=embed,
            depths=(2, 2 * blocks),
            num_heads=(first, 2 * first),
            mlp_ratio=ffn / embed,
            **{"drop_path_rate": 0.0, **arguments},
        )
    ratio = (2 if "glu" in name and "swi" not in name else 1) * ffn / embed
    return cls(
        img_size=IMAGE_SIZE,
        patch_size=4,
        embed_dim=embed,
        depth=blocks,
        num_heads=heads,
        mlp_ratio=ratio,
        **arguments,
    )


def images(model: Any, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Draw images for a vision model, in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator, dtype=dtype)
