"""Holding a table of layouts against a model: every parameter must be claimed, with the shape that it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from lit_accel.anatomy.axes import parse_layout
from lit_accel.anatomy.base import AnatomyError, ParameterLayout


@dataclass(frozen=True)
class Entry:
    """What a family's table says of one parameter.

    Args:
        layout: Its dimensions, as :func:`~lit_accel.anatomy.axes.parse_layout` reads them.
        block: See :class:`~lit_accel.anatomy.base.ParameterLayout`, as for all that follow.
        fold: See there.
        place: See there.
        reads_data: See there.
    """

    layout: str
    block: int | None = None
    fold: str | None = None
    place: str = "token"
    reads_data: bool = False


def read_layouts(
    model: nn.Module, family: str, axes: Mapping[str, int], entry_of: Callable[[str], Entry | None]
) -> dict[str, ParameterLayout]:
    """Return the layout of every parameter of a model.

    Args:
        model: The model.
        family: The family's name, for messages.
        axes: The axis sizes.
        entry_of: Returns the table's entry for a parameter's name, or ``None``.

    Raises:
        AnatomyError: If a parameter or a saved buffer has no entry, or a parameter has another shape than its layout
            says.
    """
    layouts = {}
    # Blocks repeat their layouts: a shape is worked out once.
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        entry = entry_of(name)
        if entry is None:
            raise AnatomyError(
                f"The parameter {name!r} {tuple(parameter.shape)} of {type(model).__name__} has no layout in the "
                f"family {family!r}. {_what_to_do(name)}"
            )
        layout = ParameterLayout(
            dims=parse_layout(entry.layout),
            fold=entry.fold,
            place=entry.place,
            reads_data=entry.reads_data,
            block=entry.block,
        )
        if (shape := shapes.get(entry.layout)) is None:
            shape = shapes[entry.layout] = layout.shape(axes)
        if shape != parameter.shape:
            raise AnatomyError(
                f"The parameter {name!r} of {type(model).__name__} has the shape {tuple(parameter.shape)}, but its "
                f"layout {entry.layout!r} and the config give {shape}. The config and the weights "
                "disagree."
            )
        layouts[name] = layout
    if unknown := sorted(_saved_buffers(model)):
        raise AnatomyError(
            f"{type(model).__name__} keeps buffers in its state dict that the family {family!r} knows nothing "
            f"of: {', '.join(unknown)}."
        )
    return layouts


def _saved_buffers(model: nn.Module) -> set[str]:
    """Return the names of what a state dict holds beside parameters.

    Not by making one: a sharded model would put itself together for it, and it may be in the middle of a forward pass.
    """
    found = set()
    for prefix, module in model.named_modules():
        names = {name for name, buffer in module._buffers.items() if buffer is not None}
        names -= module._non_persistent_buffers_set
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            names.add("_extra_state")
        found |= {f"{prefix}.{name}" if prefix else name for name in names}
    return found


def tied_groups(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the groups of names that are one parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _what_to_do(name: str) -> str:
    """Say what to do about a parameter that no model of the family has."""
    if "_orig_mod" in name:
        return (
            "The block is wrapped by torch.compile(block). Use lit_accel.anatomy.compile_blocks(model) instead, or "
            "compile_blocks: true of the tasks."
        )
    return (
        "Methods work on the parts that they know of a model, so adapters (LoRA and others) inside of it are not "
        "supported: train without them, or without the method. Extra layers belong beside the model, in the "
        "LightningModule. Of a subclass with parameters of its own, register the anatomy with "
        "lit_accel.anatomy.register_anatomy."
    )
