"""What timm's families share: models of another size are made by copying, since timm keeps no config.

The copy is one of everything but the parameters (new ones, of the wanted shapes), the blocks (as many as wanted, each
a copy of the one that it is like), and what was hooked onto the old modules by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lit_accel.anatomy.base import Anatomy, AnatomyError, Size

_DROP_PATH_RATE = "_lit_accel_drop_path_rate"


def copy_resized(model: nn.Module, anatomy: Anatomy, size: Size, adapt: Callable[[Any, Size], None]) -> nn.Module:
    """Copy a timm model at another size.

    Args:
        model: The model.
        anatomy: Its anatomy.
        size: The wanted size.
        adapt: Writes the size into those attributes of the copy that only the family knows; linear layers,
            convolutions, norms and stochastic depth are adapted here.

    Returns:
        The copy. Its parameters are uninitialised.
    """
    target = anatomy.at(size)

    def empty(name: str, parameter: nn.Parameter) -> nn.Parameter:
        shape = target.parameters[name].shape(size.axes)
        return nn.Parameter(torch.empty(shape, dtype=parameter.dtype), parameter.requires_grad)

    memo = _hooks_memo(model)
    for path in {block.path.rpartition(".")[0] for block in anatomy.blocks}:
        container = model.get_submodule(path)
        memo[id(container)] = type(container)()
    for name, parameter in model.named_parameters():
        if anatomy.parameters[name].block is None:
            memo[id(parameter)] = empty(name, parameter)
    resized = copy.deepcopy(model, memo)

    for block, source in zip(target.blocks, anatomy.block_sources(size.depths), strict=True):
        old = model.get_submodule(anatomy.blocks[source].path)
        memo = _hooks_memo(old)
        memo |= {id(p): empty(f"{block.path}.{local}", p) for local, p in old.named_parameters()}
        container_path, _, index = block.path.rpartition(".")
        resized.get_submodule(container_path).add_module(index, copy.deepcopy(old, memo))

    for module in resized.modules():
        # An override that somebody has put on the old module would call the old module.
        vars(module).pop("forward", None)
        _adapt_layer(module)
    if size.depths != anatomy.size.depths:
        rate = getattr(model, _DROP_PATH_RATE, max(_drop_path_rates(model), default=0.0))
        _set_drop_path(rate, [resized.get_submodule(block.path) for block in target.blocks])
        # The smallest model may have no block left that tells the rate.
        setattr(resized, _DROP_PATH_RATE, rate)
    adapt(resized, size)
    return resized


def patch_shape(model: Any) -> tuple[int, int, int]:
    """Return the channels, height and width of the patches that a model's first convolution reads.

    Raises:
        AnatomyError: If its patches come from something else than one convolution.
    """
    projection = getattr(model.patch_embed, "proj", None)
    if not isinstance(projection, nn.Conv2d):
        raise AnatomyError(
            f"The patches of this {type(model).__name__} come from a {type(model.patch_embed).__name__}, not from one "
            "convolution. Use a model with timm's PatchEmbed, or register an anatomy of your own."
        )
    channels, height, width = projection.weight.shape[1:]
    return channels, height, width


def set_existing(module: nn.Module, **values: Any) -> None:
    """Set those attributes that a module has: they differ between versions of timm."""
    for name, value in values.items():
        if hasattr(module, name):
            setattr(module, name, value)


def _hooks_memo(model: nn.Module) -> dict[int, Any]:
    """Return a memo with which deepcopy leaves out hooks and overrides: they may hold anything, a Trainer even."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name.startswith("_") and "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
            elif name == "forward":
                memo[id(value)] = object()
    return memo


def _adapt_layer(module: Any) -> None:
    weight = module._parameters.get("weight")
    if weight is None:
        if getattr(module, "normalized_shape", None) is not None:
            raise AnatomyError(
                f"A {type(module).__name__} without a weight cannot be resized: nothing tells which axis it "
                "normalises. Use one with elementwise_affine=True."
            )
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels = weight.shape[0]
    elif hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(weight.shape)


def _drop_path_rates(model: nn.Module) -> Iterable[float]:
    return (float(vars(module)["drop_prob"]) for module in model.modules() if _is_drop_path(module))


def _is_drop_path(module: nn.Module) -> bool:
    return type(module).__name__ == "DropPath"


def _set_drop_path(rate: float, blocks: list[nn.Module]) -> None:
    """Give the blocks timm's schedule of stochastic depth: rates that grow linearly from 0 to ``rate``."""
    from timm.layers import DropPath

    rates = torch.linspace(0, rate, len(blocks), device="cpu").tolist()
    for block, block_rate in zip(blocks, rates, strict=True):
        for name, child in list(block.named_children()):
            if name.startswith("drop_path") and (_is_drop_path(child) or isinstance(child, nn.Identity)):
                new = DropPath(block_rate) if block_rate > 0 else nn.Identity()
                setattr(block, name, new.train(child.training))
