"""Sharding a LightningModule by the anatomy of its transformer, and putting a sharded transformer together again.

The units of FSDP2 (``torch.distributed.fsdp.fully_shard``) are the blocks, what else is in the transformer, and each
other child of the LightningModule that trains something. A unit's parameters are gathered when its ``forward`` is
called: that is why a parameter must belong to exactly one unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_accel.anatomy import anatomy_of, find_transformer, is_compiled
from lit_accel.anatomy.build import COMPILE_OPTIONS

# What a copy of a module must not share with it.
_CONTAINERS = ("_parameters", "_buffers", "_modules")


def unit_paths(module: nn.Module) -> list[str]:
    """Return the paths of the modules to shard, inner ones first.

    Args:
        module: The LightningModule.

    Raises:
        AnatomyError: If there is no transformer of a known family inside.
        MisconfigurationException: If a parameter belongs to no unit or to several, or has no values.
    """
    path, transformer = find_transformer(module)
    blocks = [f"{path}.{block.path}" for block in anatomy_of(transformer).blocks]
    units = [*blocks, path, *_siblings(module, "", path)]
    _check_parameters(module, units)
    return units


def _siblings(module: nn.Module, prefix: str, transformer_path: str) -> Iterator[str]:
    for name, child in module.named_children():
        path = prefix + name
        if path == transformer_path:
            continue
        # Lists have no forward that could gather them, and what holds the transformer is often passed by.
        if transformer_path.startswith(f"{path}.") or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _siblings(child, f"{path}.", transformer_path)
        elif any(parameter.requires_grad for parameter in child.parameters()):
            yield path


def _check_parameters(module: nn.Module, units: list[str]) -> None:
    names: dict[str, list[tuple[str, nn.Parameter]]] = {unit: [] for unit in units}
    owners: dict[int, tuple[str, str]] = {}
    for unit in units:
        for local, parameter in module.get_submodule(unit).named_parameters(remove_duplicate=False):
            name = f"{unit}.{local}"
            if any(name.startswith(f"{inner}.") for inner in units if inner.startswith(f"{unit}.")):
                continue
            names[unit].append((name, parameter))
            owner, first = owners.setdefault(id(parameter), (unit, name))
            if owner != unit:
                raise MisconfigurationException(
                    f"{name} and {first} are one parameter, but {unit} and {owner} are sharded apart, which would "
                    "untie them. Tie only parameters outside of the blocks and inside of the model's own class, such "
                    'as the head of GPT2LMHeadModel, or use strategy="resizable_ddp".'
                )
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise MisconfigurationException(
                f"{name} is on the meta device, without values. Build the model with its weights, on the CPU: it is "
                "moved to the devices shard by shard."
            )
        if parameter.requires_grad and id(parameter) not in owners:
            raise MisconfigurationException(
                f"The parameter {name} belongs to no module whose forward could gather it: sharded training would not "
                "synchronise it between the processes. Put it into an nn.Module of its own that uses it in its "
                "forward, and make that a child of the LightningModule."
            )


def refuse_sharded(module: nn.Module) -> None:
    """Refuse a module that somebody else has sharded.

    Args:
        module: A child of the LightningModule.

    Raises:
        MisconfigurationException: If it is.
    """
    if any(isinstance(child, FSDPModule) for child in module.modules()) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    ):
        raise MisconfigurationException(
            f"{type(module).__name__} is sharded already. If configure_model applies fully_shard, remove that: "
            'the strategy "resizable_model_parallel" shards the model itself, before training and after every resize. '
            "If another Trainer has trained this module, build it anew and load its checkpoint."
        )


def shard(module: nn.Module, units: Iterable[str], mesh: DeviceMesh, device: torch.device) -> None:
    """Shard modules in place, after making all ranks begin with the values of rank 0.

    One unit at a time is on the device as a whole.

    Args:
        module: The LightningModule.
        units: Paths of the modules to shard, inner ones first.
        mesh: The processes to shard among.
        device: The device of this process.
    """
    for unit in units:
        child = module.get_submodule(unit)
        equalize((p for p in child.parameters() if not isinstance(p, DTensor)), device)
        fully_shard(child, mesh=mesh)


@torch.no_grad()
def equalize(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Bring parameters or buffers to a device, with the values that they have on rank 0.

    Args:
        tensors: The tensors, in the same order on all ranks.
        device: The device of this process.
    """
    for tensor in tensors:
        tensor.data = tensor.data.to(device).contiguous()
        # As bytes: not every backend knows every type.
        torch.distributed.broadcast(tensor.data.view(-1).view(torch.uint8), src=0)


def copy_structure(module: nn.Module) -> nn.Module:
    """Copy a tree of modules with everything that they hold, except for parameters and buffers.

    Sharding cannot be undone in place: it changes classes and hooks. Such a copy, made before, remembers them.
    Attributes are shared with the original, not copied: some lead to the whole program.

    Args:
        module: The module.
    """
    return _copy_structure(module, {})


def _copy_structure(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in copies:
        copy = copies[module] = object.__new__(type(module))
        vars(copy).update(vars(module), _parameters={}, _buffers={}, _modules={})
        vars(copy).update({key: value.copy() for key, value in vars(module).items() if _is_hooks(key, value)})
        # It would call the original.
        vars(copy).pop("_compiled_call_impl", None)
        for name, child in module._modules.items():
            copy._modules[name] = None if child is None else _copy_structure(child, copies)
    return copies[module]


@torch.no_grad()
def gather(sharded: nn.Module, structure: nn.Module) -> nn.Module:
    """Put a sharded module together, on the CPU of every rank. Must be called on all ranks.

    Args:
        sharded: The module; it stays as it is.
        structure: What :func:`copy_structure` returned before it was sharded.

    Returns:
        A plain module with the same parameters and buffers, ties, training modes and attributes.
    """
    whole = copy_structure(structure)
    parameters: dict[int, nn.Parameter] = {}
    for target, source in zip(whole.modules(), sharded.modules(), strict=True):
        for key, value in vars(source).items():
            if key in vars(target) and key not in _CONTAINERS and not _is_hooks(key, value):
                vars(target)[key] = value
        for name, parameter in source._parameters.items():
            if parameter is not None and id(parameter) not in parameters:
                parameters[id(parameter)] = nn.Parameter(whole_tensor(parameter), parameter.requires_grad)
            target._parameters[name] = None if parameter is None else parameters[id(parameter)]
        for name, buffer in source._buffers.items():
            target._buffers[name] = None if buffer is None else buffer.clone().cpu()
        if is_compiled(source):
            target.compile(**getattr(source, COMPILE_OPTIONS, {}))
    return whole


def _is_hooks(key: str, value: object) -> bool:
    return "_hooks" in key and isinstance(value, dict)


def whole_tensor(value: Any) -> Any:
    """Return a sharded tensor as a whole new one on the CPU, and anything else as it is; call it on all ranks."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor().detach()
    # The shard of the only process may be the whole tensor.
    return full.clone() if full.device.type == "cpu" else full.cpu()


def shard_like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Shard a tensor that all ranks hold alike as a parameter is; what has another shape stays whole."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    # No rank needs to send anything: each has all the values. The clone lets go of the other ranks' share.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()
