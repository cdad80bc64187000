"""Making models of another size: construction without initialisation, and compilation block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lit_accel.anatomy.base import Anatomy, AnatomyError, Size

COMPILE_OPTIONS = "_lit_accel_compile_options"
_OWN_HOOKS = ("transformers", "lit_accel")
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
        setattr(module, COMPILE_OPTIONS, dict(options))


def is_compiled(module: nn.Module) -> bool:
    """Whether :meth:`torch.nn.Module.compile` was called on a module.

    ``lit_accel.routing`` keeps what intercepts a block's calls in the same place, which says itself what it replaced.
    """
    call = getattr(module, "_compiled_call_impl", None)
    return call is not None and getattr(call, "is_compiled", True)


def build_resized(model: nn.Module, anatomy: Anatomy, size: Size) -> nn.Module:
    """Build a model of the same class at another size from its config, without weights.

    Training mode of each module, dropout probabilities, dtype and device, frozen parameters, activation checkpointing
    and the compilation of blocks are carried over, to each block from the one that it is like (see
    :meth:`Anatomy.block_sources`). Where blocks drop out differently, the rates of blocks that have no counterpart at
    the new depth are not remembered.

    Other changes that were made to the old modules by hand are not carried over: forward hooks, a compilation of the
    whole model and, in families that are built from a config (Hugging Face's), other attributes and modules of another
    class. There, an ``Identity`` in the place of a ``Dropout`` becomes a ``Dropout`` of probability 0.

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
    _copy_buffers(model, resized, device=next(iter(old_parameters.values())).device)
    _copy_checkpointing(model, resized)
    _copy_input_gradients(model, resized)
    for new in target.blocks:
        old_module = model.get_submodule(first_path[new.stage])
        if is_compiled(old_module):
            options = getattr(old_module, COMPILE_OPTIONS, {})
            module = resized.get_submodule(new.path)
            module.compile(**options)
            setattr(module, COMPILE_OPTIONS, options)
    old_modules = dict(model.named_modules())
    sources = [anatomy.blocks[index].path for index in anatomy.block_sources(size.depths)]
    for name, module in resized.named_modules():
        for new, old_path in zip(target.blocks, sources, strict=True):
            if name == new.path or name.startswith(f"{new.path}."):
                name = old_path + name.removeprefix(new.path)
                break
        module.training = old_modules[name].training if name in old_modules else model.training
        if name in old_modules:
            _copy_dropout(old_modules[name], module)
    return resized


def rehearse_build(model: nn.Module, anatomy: Anatomy, target: Anatomy) -> None:
    """Build a model at another size on the meta device, to see before training that it can be built.

    Args:
        model: The present model.
        anatomy: Its anatomy.
        target: The anatomy that the new model must have.

    Raises:
        AnatomyError: If its class cannot be built from a config alone, or becomes another model than expected.
    """
    try:
        with torch.device("meta"):
            built = build_without_init(lambda: anatomy.build(model, target.size))
    except Exception as error:
        raise AnatomyError(
            f"{type(model).__name__} could not be built at another size: {error}. A subclass must take a config as its "
            "only required argument; for another constructor register an anatomy of its own with "
            "lit_accel.anatomy.register_anatomy."
        ) from error
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    expected = {name: layout.shape(target.size.axes) for name, layout in target.parameters.items()}
    if shapes != expected:
        wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise AnatomyError(
            f"{type(model).__name__} built at another size differs from its anatomy in {', '.join(wrong[:3])}: the "
            "anatomy's build function does not fit the class."
        )


def loses_compilation(model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether a resize would lose a compilation, or its options: only :func:`compile_blocks` is carried over."""
    blocks = [model.get_submodule(block.path) for block in anatomy.blocks]
    compiled = [module for module in model.modules() if is_compiled(module)]
    return any(module not in blocks or not hasattr(module, COMPILE_OPTIONS) for module in compiled)


def lost_in_resize(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Say what of a model a resize would lose, because it is no part of the configuration that it is built from.

    Args:
        model: The present model.
        anatomy: Its anatomy.

    Returns:
        A phrase for each forward hook, module of another class, function that was put onto a module, and number, string
        or flag that is set otherwise.
    """
    with torch.device("meta"):
        built = build_without_init(lambda: anatomy.build(model, anatomy.size))
    new_modules = dict(built.named_modules())
    lost = []
    for path, module in model.named_modules():
        where = path or "the model"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # Those of Hugging Face come with activation checkpointing, which is carried over; ours go to the new model.
        if any(getattr(hook, "__module__", "").partition(".")[0] not in _OWN_HOOKS for hook in hooks):
            lost.append(f"forward hooks of {where}")
        new = new_modules.get(path)
        if new is None or type(new) is not type(module):
            # The probability of a dropout that was replaced is carried over.
            if not isinstance(new, nn.Dropout):
                lost.append(f"{where} as {type(module).__name__}")
            continue
        for name, value in vars(module).items():
            if _is_carried(name):
                continue
            if isinstance(value, (bool, int, float, str)) and vars(new).get(name) != value:
                lost.append(f"{name}={value!r} of {where}")
            # A function compares with none of its kind; one that classes or constructors give is in the new one, too.
            if callable(value) and name not in vars(new):
                lost.append(f"{name} of {where}")
    return lost


def _is_carried(name: str) -> bool:
    """Whether an attribute is Python's or torch's own business, or one that ``build_resized`` takes over."""
    return name.startswith("_") or name in ("training", "p", *_CHECKPOINTING) or "dropout" in name


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


def _copy_buffers(old: nn.Module, new: nn.Module, device: torch.device) -> None:
    """Carry buffers over, as far as they do not depend on the size: in another precision they are others."""
    old_buffers = dict(old.named_buffers())
    for path, module in new.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            source = old_buffers.get(f"{path}.{key}" if path else key)
            if source is not None and source.shape == buffer.shape:
                module._buffers[key] = source.detach().clone()
            else:
                module._buffers[key] = buffer.to(device)


def _copy_input_gradients(old: nn.Module, new: nn.Module) -> None:
    """Carry over that embeddings pass gradients on though they are frozen, without which checkpoints have none."""
    if any(_passes_gradients(hook) for module in old.modules() for hook in module._forward_hooks.values()):
        new.enable_input_require_grads()  # type: ignore[operator]


def _passes_gradients(hook: Any) -> bool:
    """Whether a hook is what Hugging Face's ``enable_input_require_grads`` hangs onto embeddings."""
    is_theirs = getattr(hook, "__module__", "").partition(".")[0] == "transformers"
    return is_theirs and getattr(hook, "__name__", "") == "make_inputs_require_grads"


def _copy_checkpointing(old: nn.Module, new: nn.Module) -> None:
    """Carry activation checkpointing over, which Hugging Face keeps as attributes of modules, by module class."""
    settings: dict[type, dict[str, Any]] = {}
    for module in old.modules():
        if getattr(module, "gradient_checkpointing", False):
            settings.setdefault(type(module), {k: v for k, v in vars(module).items() if k in _CHECKPOINTING})
    for module in new.modules():
        for key, value in settings.get(type(module), {}).items():
            setattr(module, key, value)


def _copy_dropout(old: nn.Module, new: nn.Module) -> None:
    """Carry dropout probabilities over: a user may have changed them after the model was built from its config."""
    if isinstance(new, nn.Dropout):
        if isinstance(old, nn.Dropout):
            new.p = old.p
        elif isinstance(old, nn.Identity):
            new.p = 0.0
    # Attention with fused kernels keeps its probability as a number.
    for name, value in vars(old).items():
        if "dropout" in name and _is_probability(value) and _is_probability(vars(new).get(name)):
            setattr(new, name, value)


def _is_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def uses_activation_checkpointing(model: nn.Module) -> bool:
    """Whether the blocks of a model recompute their activations in the backward pass.

    Raises:
        AnatomyError: If some do and others of their kind do not.
    """
    chosen: dict[type, set[bool]] = {}
    for module in model.modules():
        for name in ("gradient_checkpointing", "grad_checkpointing"):
            if hasattr(module, name):
                chosen.setdefault(type(module), set()).add(bool(getattr(module, name)))
    if in_part := [kind.__name__ for kind, flags in chosen.items() if len(flags) > 1]:
        raise AnatomyError(
            f"Some {in_part[0]} of this {type(model).__name__} recompute their activations and others do not. What "
            "that costs cannot be counted, nor can it be carried over to another depth: recompute those of all blocks "
            "(every_n_layers=1) or of none."
        )
    return any(flags == {True} for flags in chosen.values())
