"""timm's SwinTransformerV2: stages of growing width, attention within plain and shifted windows, norms after branches.

Each stage has axes of its own (``embed_0``, ``heads_0``, ...). They are independent, since they meet only in the patch
merging, whose matrix reads four neighbours of the stage before: ``embed_1, in:4*embed_0``. Because attention is by the
cosine, which does not change when coordinates are repeated, ``head_dim`` may shrink where the number of heads cannot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lit_accel.anatomy.base import SEQUENCE_PLACES, Anatomy, AnatomyError, Attention, Block, Rows, Size
from lit_accel.anatomy.layouts import Entry, read_layouts, tied_groups
from lit_accel.anatomy.registry import register_anatomy
from lit_accel.anatomy.shifted_windows import ShiftedWindows
from lit_accel.anatomy.timm import copy_resized, patch_shape, set_existing

_WINDOWS = ShiftedWindows()
_BRANCH_OUTPUTS = frozenset(f"{norm}.{name}" for norm in ("norm1", "norm2") for name in ("weight", "bias"))


@register_anatomy("swin_v2", ["timm.models.swin_transformer_v2.SwinTransformerV2"])
def describe(model: Any) -> Anatomy:
    """Describe a SwinTransformerV2."""
    axes: dict[str, int] = {}
    places: dict[str, Rows] = dict(SEQUENCE_PLACES)
    tables: list[dict[str, Entry]] = []
    blocks: list[Block] = []
    body = _stem(model)
    for index, stage in enumerate(model.layers):
        first = stage.blocks[0]
        heads, embed = first.attn.num_heads, first.attn.qkv.in_features
        axes |= {
            f"embed_{index}": embed,
            f"heads_{index}": heads,
            f"head_dim_{index}": embed // heads,
            f"ffn_{index}": first.mlp.fc1.out_features,
        }
        places |= _places(model.patch_embed.grid_size, index, first.window_size)
        tables.append(_block_table(index, first.attn.cpb_mlp[0].out_features))
        if index > 0:
            path = f"layers.{index}.downsample"
            body[f"{path}.reduction.weight"] = Entry(f"embed_{index}, in:4*embed_{index - 1}", place=f"stage_{index}")
            body |= {f"{path}.norm.{name}": Entry(f"embed_{index}") for name in ("weight", "bias")}
        attention = Attention(
            heads=(f"heads_{index}",),
            head_dim=f"head_dim_{index}",
            causal=False,
            tile=math.prod(first.window_size),
            place=f"windows_{index}",
        )
        blocks += [
            Block(
                path=f"layers.{index}.blocks.{number}",
                stage=index,
                residual="res_post_norm",
                attention=attention,
                token_dims={"x": (1, 2)},
                branch_outputs=_BRANCH_OUTPUTS,
                place=f"stage_{index}",
                windows=_WINDOWS,
                ffn=f"ffn_{index}",
                inlined=frozenset({"attn.qkv.weight"}),
                indivisible={f"heads_{index}": "this class takes as many features from its heads as it has channels"},
            )
            for number in range(len(stage.blocks))
        ]
    axes["classes"] = model.num_classes
    num_stages = len(model.layers)
    last = num_stages - 1
    pooled = model.head.fc.in_features // axes[f"embed_{last}"] if isinstance(model.head.fc, nn.Linear) else 1
    body |= {
        "norm.weight": Entry(f"embed_{last}"),
        "norm.bias": Entry(f"embed_{last}"),
        "head.fc.weight": Entry(
            f"classes, in:{pooled}*embed_{last}", place="sequence" if model.global_pool else f"stage_{last}"
        ),
        "head.fc.bias": Entry("classes"),
    }
    position = {block.path: number for number, block in enumerate(blocks)}

    def entry_of(name: str) -> Entry | None:
        path, local = ".".join(name.split(".")[:4]), ".".join(name.split(".")[4:])
        if path not in position:
            return body.get(name)
        block = blocks[position[path]]
        entry = tables[block.stage].get(local)
        return None if entry is None else Entry(entry.layout, position[path], None, entry.place, entry.reads_data)

    stages = range(num_stages)
    return Anatomy(
        family="swin_v2",
        size=Size(axes, tuple(len(stage.blocks) for stage in model.layers)),
        blocks=tuple(blocks),
        parameters=read_layouts(model, "swin_v2", axes, entry_of),
        tied=tied_groups(model),
        tied_heads=(),
        width_axes=(
            *((f"embed_{stage}",) for stage in stages),
            *((f"heads_{stage}", f"head_dim_{stage}") for stage in stages),
            *((f"ffn_{stage}",) for stage in stages),
        ),
        build=_build,
        input_shape=partial(_input_shape, patch_shape(model)[1:]),
        # A plain and a shifted block make one step of the whole: a stage of plain ones would not mix its windows.
        depth_unit=2,
        places=places,
        num_tokens=math.prod(model.patch_embed.grid_size) if model.patch_embed.strict_img_size else None,
    )


def _stem(model: Any) -> dict[str, Entry]:
    channels, height, width = patch_shape(model)
    return {
        "patch_embed.proj.weight": Entry(f"embed_0, in:{channels}, {height}, {width}", reads_data=True),
        "patch_embed.proj.bias": Entry("embed_0"),
        "patch_embed.norm.weight": Entry("embed_0"),
        "patch_embed.norm.bias": Entry("embed_0"),
    }


def _block_table(stage: int, num_hidden: int) -> dict[str, Entry]:
    embed, ffn, heads = f"embed_{stage}", f"ffn_{stage}", f"heads_{stage}*head_dim_{stage}"
    windows, tokens, table = f"windows_{stage}", f"stage_{stage}", f"table_{stage}"
    return {
        "attn.logit_scale": Entry(f"heads_{stage}, 1, 1"),
        # The relative position bias is computed once a call, from the coordinates within a window.
        "attn.cpb_mlp.0.weight": Entry(f"{num_hidden}, in:2", place=table, reads_data=True),
        "attn.cpb_mlp.0.bias": Entry(f"{num_hidden}"),
        "attn.cpb_mlp.2.weight": Entry(f"heads_{stage}, in:{num_hidden}", place=table),
        "attn.qkv.weight": Entry(f"{heads} + {heads} + {heads}, in:{embed}", place=windows),
        "attn.q_bias": Entry(heads),
        "attn.v_bias": Entry(heads),
        "attn.proj.weight": Entry(f"{embed}, in:{heads}", place=windows),
        "attn.proj.bias": Entry(embed),
        **{name: Entry(embed) for name in _BRANCH_OUTPUTS},
        "mlp.fc1.weight": Entry(f"{ffn}, in:{embed}", place=tokens),
        "mlp.fc1.bias": Entry(ffn),
        "mlp.fc2.weight": Entry(f"{embed}, in:{ffn}", place=tokens),
        "mlp.fc2.bias": Entry(embed),
    }


def _places(grid_size: tuple[int, int], stage: int, window_size: tuple[int, int]) -> dict[str, Rows]:
    """Return the rows of a stage: its tokens, these padded to whole windows, and the table of relative positions."""
    return {
        f"stage_{stage}": partial(_tokens, grid_size, stage),
        f"windows_{stage}": partial(_padded_tokens, grid_size, stage, window_size),
        f"table_{stage}": partial(_offsets, window_size),
    }


def _tokens(grid_size: tuple[int, int], stage: int, num_sequences: int, num_tokens: int) -> int:
    return num_sequences * math.prod(_stage_grid(grid_size, stage, num_tokens))


def _padded_tokens(
    grid_size: tuple[int, int], stage: int, window_size: tuple[int, int], num_sequences: int, num_tokens: int
) -> int:
    grid = _stage_grid(grid_size, stage, num_tokens)
    padded = (-(-size // window) * window for size, window in zip(grid, window_size, strict=True))
    return num_sequences * math.prod(padded)


def _offsets(window_size: tuple[int, int], num_sequences: int, num_tokens: int) -> int:
    return math.prod(2 * size - 1 for size in window_size)


def _stage_grid(grid_size: tuple[int, int], stage: int, num_tokens: int) -> tuple[int, int]:
    """Return the height and width of a stage, of an image with so many patches and the model's aspect ratio."""
    height, width = grid_size
    if height * width != num_tokens:
        height = round(math.sqrt(num_tokens * height / width))
        width = num_tokens // height
        if height * width != num_tokens:
            raise AnatomyError(
                f"{num_tokens} patches do not fit the aspect ratio of this SwinTransformerV2, whose grid is "
                f"{grid_size[0]} x {grid_size[1]}: its windows cannot be counted. Give it images of its own shape."
            )
    return -(-height // 2**stage), -(-width // 2**stage)


def _build(model: nn.Module, size: Size) -> nn.Module:
    return copy_resized(model, describe(model), size, _adapt)


def _adapt(model: Any, size: Size) -> None:
    previous = size.axes["embed_0"]
    for index, stage in enumerate(model.layers):
        embed, heads = size.axes[f"embed_{index}"], size.axes[f"heads_{index}"]
        set_existing(stage, dim=previous, out_dim=embed, depth=len(stage.blocks))
        set_existing(stage.downsample, dim=previous, out_dim=embed)
        for block in stage.blocks:
            set_existing(block, dim=embed, num_heads=heads)
            set_existing(block.attn, dim=embed, num_heads=heads)
            if block.attn.k_bias is not None:
                block.attn.k_bias = torch.zeros(embed, dtype=block.attn.k_bias.dtype)
        model.feature_info[index]["num_chs"] = embed
        previous = embed
    set_existing(model, embed_dim=size.axes["embed_0"], num_features=previous)
    num_pooled = model.head.fc.in_features if isinstance(model.head.fc, nn.Linear) else previous
    set_existing(model, head_hidden_size=num_pooled)
    set_existing(model.head, in_features=previous, num_features=num_pooled)


def _input_shape(patch_size: tuple[int, int], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    images = args[0] if args else kwargs["x"]
    patches = [size // patch for size, patch in zip(images.shape[-2:], patch_size, strict=True)]
    return images.shape[0], patches[0] * patches[1]
