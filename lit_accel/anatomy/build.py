"""Making models of another size: construction without initialisation, and compilation block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lit_accel.anatomy.base import Anatomy, AnatomyError, Size

_COMPILE_OPTIONS = "_lit_accel_compile_options"
_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


class _SkipInit(TorchFunctionMode):
    """Turns the functions of ``torch.nn.init`` into no-ops: every parameter is about to be overwritten."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build_without_init(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module whose parameters will all be overwritten: no time for initialising them, no global randomness.

    Args:
        build: Returns the new module; its buffers are computed as usual.
    """
    with torch.random.fork_rng(devices=[]), _SkipInit():
        return build()


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block of a model by itself, in place, keeping the state dict's keys.

    One graph of a whole model would be compiled anew whenever the depth changes or a block is skipped; blocks of
    one shape share theirs. A resize compiles the new blocks with the same options.

    Args:
        model: A model with a registered anatomy.
        **options: Arguments of :func:`torch.compile`.
    """
    from lit_accel.anatomy.registry import anatomy_of

    for block in anatomy_of(model).blocks:
        module = model.get_submodule(block.path)
        module.compile(**options)
        setattr(module, _COMPILE_OPTIONS, dict(options))


def build_resized(model: nn.Module, anatomy: Anatomy, size: Size) -> nn.Module:
    """Build a model of the same class at another size, without weights but otherwise configured like the old one.

    Training mode, dtype and device, frozen parameters, activation checkpointing and per-block compilation are
    carried over. Forward hooks are not: they belong to modules that no longer exist.

    Args:
        model: The present model.
        anatomy: Its anatomy.
        size: The wanted size.

    Returns:
        A new model with uninitialised parameters.
    """
    resized = anatomy.build(model, size)
    target = anatomy.at(size)
    old_parameters = dict(model.named_parameters())
    first_path: dict[int, str] = {}
    for block in anatomy.blocks:
        first_path.setdefault(block.stage, block.path)
    require_blocks_alike(model, anatomy)
    for name, parameter in resized.named_parameters():
        new_block, local = target.split_name(name)
        source = old_parameters[name if new_block is None else f"{first_path[new_block.stage]}.{local}"]
        parameter.data = parameter.data.to(device=source.device, dtype=source.dtype)
        parameter.requires_grad_(source.requires_grad)
    device = next(iter(old_parameters.values())).device
    for module in resized.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    _copy_checkpointing(model, resized)
    for new in target.blocks:
        old_module = model.get_submodule(first_path[new.stage])
        if getattr(old_module, "_compiled_call_impl", None) is not None:
            options = getattr(old_module, _COMPILE_OPTIONS, {})
            module = resized.get_submodule(new.path)
            module.compile(**options)
            setattr(module, _COMPILE_OPTIONS, options)
    return resized.train(model.training)


def require_blocks_alike(model: nn.Module, anatomy: Anatomy) -> None:
    """Refuse blocks that are frozen in part: after a change of depth nobody could say which ones are meant.

    Raises:
        AnatomyError: If blocks of one stage differ in which parameters are trained.
    """
    first_path: dict[int, str] = {}
    for block in anatomy.blocks:
        path = first_path.setdefault(block.stage, block.path)
        first = dict(model.get_submodule(path).named_parameters())
        for local, parameter in model.get_submodule(block.path).named_parameters():
            if parameter.requires_grad != first[local].requires_grad:
                raise AnatomyError(
                    f"{block.path}.{local} and {path}.{local} differ in requires_grad. A model whose blocks are frozen "
                    "in part cannot be resized: freeze the same parameters in every block."
                )


def _copy_checkpointing(old: nn.Module, new: nn.Module) -> None:
    """Carry activation checkpointing over, which Hugging Face keeps as attributes of modules, by module class."""
    settings: dict[type, dict[str, Any]] = {}
    for module in old.modules():
        if getattr(module, "gradient_checkpointing", False):
            settings.setdefault(type(module), {k: v for k, v in vars(module).items() if k in _CHECKPOINTING})
    for module in new.modules():
        for key, value in settings.get(type(module), {}).items():
            setattr(module, key, value)


def uses_activation_checkpointing(model: nn.Module) -> bool:
    """Whether the blocks of a model recompute their activations in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
