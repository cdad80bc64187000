"""timm's VisionTransformer: ViT and DeiT, with distillation or register tokens, LayerScale, or norms of queries."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from lit_accel.anatomy.base import (
    SEQUENCE_PLACES,
    Anatomy,
    AnatomyError,
    Attention,
    Block,
    Residual,
    Rows,
    Size,
)
from lit_accel.anatomy.layouts import Entry, read_layouts, tied_groups
from lit_accel.anatomy.registry import register_anatomy
from lit_accel.anatomy.timm import copy_resized, patch_shape, set_existing

_HEADS = "heads*head_dim"
_RESIDUALS: dict[str, Residual] = {"Block": "pre_norm", "ResPostBlock": "res_post_norm"}

_BLOCK = {
    **{f"{norm}.{name}": "embed" for norm in ("norm1", "norm2") for name in ("weight", "bias")},
    **{f"{scale}.gamma": "embed" for scale in ("ls1", "ls2")},
    "attn.qkv.weight": f"{_HEADS} + {_HEADS} + {_HEADS}, in:embed",
    "attn.qkv.bias": f"{_HEADS} + {_HEADS} + {_HEADS}",
    **{f"attn.{norm}.{name}": "head_dim" for norm in ("q_norm", "k_norm") for name in ("weight", "bias")},
    "attn.norm.weight": _HEADS,
    "attn.norm.bias": _HEADS,
    "attn.gate.weight": f"{_HEADS}, in:embed",
    "attn.gate.bias": _HEADS,
    "attn.proj.weight": f"embed, in:{_HEADS}",
    "attn.proj.bias": "embed",
    # SwiGLU has its gate and its input apart, GluMlp in one matrix.
    **{f"mlp.{fc}.weight": "ffn, in:embed" for fc in ("fc1", "fc1_g", "fc1_x")},
    **{f"mlp.{fc}.bias": "ffn" for fc in ("fc1", "fc1_g", "fc1_x")},
    "mlp.norm.weight": "ffn",
    "mlp.norm.bias": "ffn",
    "mlp.fc2.weight": "embed, in:ffn",
    "mlp.fc2.bias": "embed",
}
_PACKED_GLU = {"mlp.fc1.weight": "ffn + ffn, in:embed", "mlp.fc1.bias": "ffn + ffn"}


@register_anatomy("vit", ["timm.models.vision_transformer.VisionTransformer"])
def describe(model: Any) -> Anatomy:
    """Describe a VisionTransformer.

    Raises:
        AnatomyError: If it has blocks of another kind, another pooling than of tokens, or drops patches at random.
    """
    first = model.blocks[0]
    # Through the bases: sharding puts a class of its own in front.
    kind = next((cls.__name__ for cls in type(first).__mro__ if cls.__name__ in _RESIDUALS), type(first).__name__)
    if kind not in _RESIDUALS:
        raise AnatomyError(
            f"The blocks of this {type(model).__name__} are {kind}s; known are {', '.join(_RESIDUALS)}. Use a model "
            "with one of these, or register an anatomy of your own."
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise AnatomyError(
            f"This {type(model).__name__} drops patches at random (patch_drop_rate), so that the tokens of its blocks "
            "are not those of its input. Set patch_drop_rate to 0."
        )
    packed = getattr(first.mlp, "fc1", None) is not None and (
        first.mlp.fc1.out_features == 2 * first.mlp.fc2.in_features
    )
    block_table = _BLOCK | _PACKED_GLU if packed else _BLOCK
    channels, patch_height, patch_width = patch_shape(model)
    axes = {
        "patches": 0 if model.pos_embed is None else model.pos_embed.shape[1],
        "embed": model.embed_dim,
        "heads": first.attn.num_heads,
        "head_dim": first.attn.qkv.out_features // 3 // first.attn.num_heads,
        "ffn": first.mlp.fc2.in_features,
        "classes": model.num_classes,
    }
    num_prefix = model.num_prefix_tokens
    head_place = "sequence" if model.global_pool else "token"
    body = {
        "cls_token": Entry("1, 1, embed"),
        "dist_token": Entry("1, 1, embed"),
        "reg_token": Entry(f"1, {model.num_reg_tokens}, embed"),
        "pos_embed": Entry("1, patches, embed"),
        "patch_embed.proj.weight": Entry(
            f"embed, in:{channels}, {patch_height}, {patch_width}", place="patch", reads_data=True
        ),
        "patch_embed.proj.bias": Entry("embed"),
        **{
            f"{norm}.{name}": Entry("embed")
            for norm in ("patch_embed.norm", "norm_pre", "norm", "fc_norm")
            for name in ("weight", "bias")
        },
        **{f"{head}.weight": Entry("classes, in:embed", place=head_place) for head in ("head", "head_dist")},
        **{f"{head}.bias": Entry("classes") for head in ("head", "head_dist")},
    }

    def entry_of(name: str) -> Entry | None:
        if not name.startswith("blocks."):
            return body.get(name)
        _, index, local = name.split(".", 2)
        return Entry(block_table[local], block=int(index)) if local in block_table else None

    parameters = read_layouts(model, "vit", axes, entry_of)
    if _RESIDUALS[kind] == "res_post_norm":
        outputs = {f"{norm}.{name}" for norm in ("norm1", "norm2") for name in ("weight", "bias")}
    else:
        # LayerScale comes last where there is one; only one of the two may be scaled.
        attention_outputs = {"ls1.gamma"} if _has(first, "ls1") else {"attn.proj.weight", "attn.proj.bias"}
        mlp_outputs = {"ls2.gamma"} if _has(first, "ls2") else {"mlp.fc2.weight", "mlp.fc2.bias"}
        outputs = attention_outputs | mlp_outputs
    blocks = tuple(
        Block(
            path=f"blocks.{index}",
            stage=0,
            residual=_RESIDUALS[kind],
            attention=Attention(heads=("heads",), head_dim="head_dim", causal=False),
            token_dims={"x": (1,), "attn_mask": (-2, -1)},
            branch_outputs=frozenset(outputs),
            attributes={"attn.num_heads": "heads", "attn.attn_dim": "heads*head_dim"},
            indivisible={
                axis: "its activations are normalised together"
                for axis, norm in (("heads", first.attn.norm), ("ffn", getattr(first.mlp, "norm", None)))
                if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)
            },
        )
        for index in range(len(model.blocks))
    )
    places: dict[str, Rows] = {**SEQUENCE_PLACES, "patch": partial(_patches, num_prefix)}
    return Anatomy(
        family="vit",
        size=Size(axes, (len(model.blocks),)),
        blocks=blocks,
        parameters=parameters,
        tied=tied_groups(model),
        tied_heads=(),
        width_axes=(("embed",), ("heads",), ("ffn",)),
        build=_build,
        input_shape=partial(_input_shape, (patch_height, patch_width), num_prefix),
        places=places,
        num_tokens=None if model.dynamic_img_size else model.patch_embed.num_patches + num_prefix,
        num_prefix_tokens=num_prefix,
        pools_tokens=bool(model.global_pool),
    )


def _patches(num_prefix: int, num_sequences: int, num_tokens: int) -> int:
    return num_sequences * (num_tokens - num_prefix)


def _has(module: nn.Module, name: str) -> bool:
    return any(True for _ in getattr(module, name, nn.Identity()).parameters())


def _build(model: nn.Module, size: Size) -> nn.Module:
    return copy_resized(model, describe(model), size, _adapt)


def _adapt(model: Any, size: Size) -> None:
    embed, heads = size.axes["embed"], size.axes["heads"]
    set_existing(model, embed_dim=embed, num_features=embed, head_hidden_size=embed)
    for block in model.blocks:
        set_existing(block.attn, num_heads=heads, attn_dim=heads * size.axes["head_dim"])
    template = model.feature_info[0]
    model.feature_info = [
        {**template, "module": f"blocks.{index}", "num_chs": embed} for index in range(len(model.blocks))
    ]


def _input_shape(
    patch_size: tuple[int, int], num_prefix: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, int]:
    images = args[0] if args else kwargs["x"]
    # Images that are no multiple of a patch are padded, if they are accepted at all.
    patches = [-(-size // patch) for size, patch in zip(images.shape[-2:], patch_size, strict=True)]
    return images.shape[0], patches[0] * patches[1] + num_prefix
