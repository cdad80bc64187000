"""What the drawings of the documentation share: colours, the words of a panel, and models of common sizes."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from matplotlib.axes import Axes
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from lit_accel.anatomy import Anatomy, anatomy_of

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
BLUE, GREEN, ORANGE, PALE = "#33508c", "#3f8f8a", "#d08c2e", "#e8e4dc"


def plain(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Give a panel its words."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def models() -> dict[str, tuple[Anatomy, int]]:
    """Return models of common sizes with the number of tokens that they are called with; nothing is allocated."""
    with torch.device("meta"):
        gpt2 = GPT2Config()
        medium = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
        deit = timm.create_model("deit_base_patch16_224")
        swin = timm.create_model("swinv2_large_window12_192")
        return {
            "BERT-Base, 128 tokens": (anatomy_of(BertForMaskedLM(BertConfig())), 128),
            "GPT-2 small, 1024 tokens": (anatomy_of(GPT2LMHeadModel(gpt2)), 1024),
            "GPT-2 medium, 1024 tokens": (anatomy_of(GPT2LMHeadModel(medium)), 1024),
            "DeiT-B, 224 pixels": (anatomy_of(deit), num_tokens_of(deit, 224)),
            "SwinV2-L, 192 pixels": (anatomy_of(swin), num_tokens_of(swin, 192)),
        }


def num_tokens_of(model: torch.nn.Module, size: int) -> int:
    """Return how many tokens an image is to a model."""
    return anatomy_of(model).input_shape((torch.empty(1, 3, size, size, device="meta"),), {})[1]
