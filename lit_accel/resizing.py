"""A LightningModule whose transformer changes size: what its checkpoints must say, and what a strategy must offer.

A checkpoint written in a small phase holds small tensors. They fit only if the model is rebuilt at that size
before its weights are loaded, and the one hook that runs in time for ``fit``, ``validate``, ``test``, ``predict``
and ``load_from_checkpoint`` alike is ``LightningModule.on_load_checkpoint``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_accel.anatomy import AnatomyError, Size, anatomy_of, build_resized, find_transformer
from lit_accel.stored_state import require_readable

CHECKPOINT_KEY = "lit_accel"
CHECKPOINT_VERSION = 1
_PATCHED = "_lit_accel_has_size_hooks"
# On the LightningModule: the transformer itself stays what its library made.
_FULL_SIZE = "_lit_accel_full_size"

OptimizerState = dict[str, dict[str, Tensor]]
"""Optimizer state by parameter name, then by the optimizer's own key."""


@dataclass
class _FullSize:
    """How large the full model is.

    Args:
        size: The size.
        transformer: Of which it was said: another one that the user puts in its place is no small version of it.
        was_said_earlier: From the setup of a fit until it is known whether a checkpoint is loaded: by an earlier run.
    """

    size: Size
    transformer: nn.Module
    was_said_earlier: bool = False


@runtime_checkable
class ResizableStrategy(Protocol):
    """What a strategy must offer for the model to change in mid-training; see ``lit_accel.strategies``."""

    def resize(
        self, rebuild: Callable[[], None], carry: Callable[[OptimizerState], OptimizerState] | None = None
    ) -> Any:
        """Rebuild the model and everything that refers to its parameters."""


def replace_transformer(module: nn.Module, path: str, transformer: nn.Module) -> None:
    """Put another size of the present transformer in its place; the LightningModule itself stays.

    Args:
        module: The LightningModule.
        path: Where the transformer is, as :func:`~lit_accel.anatomy.find_transformer` returns it.
        transformer: The new one.
    """
    if (said := _said(module)) is not None:
        said.transformer = transformer
    parent, _, name = path.rpartition(".")
    # A model around it, with a head of another kind, has the same configuration, and is saved with it.
    if (former := getattr(module.get_submodule(path), "config", None)) is not None:
        for around in (module, *(module.get_submodule(path[:end]) for end, sign in enumerate(path) if sign == ".")):
            if getattr(around, "config", None) is former:
                around.config = transformer.config
    module.get_submodule(parent).register_module(name, transformer)


def full_size(module: nn.Module) -> Size:
    """Return the size of the full model: the present one, unless a checkpoint or a callback has said otherwise.

    What they have said holds for the transformer that it was said of and for what it is resized to, until a fit begins
    anew (see :func:`begin_anew`).

    Args:
        module: The LightningModule.
    """
    said = _said(module)
    return anatomy_of(find_transformer(module)[1]).size if said is None else said.size


def set_full_size(module: nn.Module, size: Size) -> None:
    """Say how large the full model is, where it is not what the module was built with.

    Args:
        module: The LightningModule.
        size: The size of the full model.
    """
    setattr(module, _FULL_SIZE, _FullSize(size, find_transformer(module)[1]))


def _said(module: nn.Module) -> _FullSize | None:
    said: _FullSize | None = getattr(module, _FULL_SIZE, None)
    return None if said is None or said.transformer is not find_transformer(module)[1] else said


def ensure_built(trainer: L.Trainer, module: L.LightningModule) -> None:
    """See that a LightningModule holds its transformer when a callback is set up.

    Callbacks are set up before Lightning calls ``configure_model``, which may build the model; the contract of that
    hook is that it can be called again.

    Args:
        trainer: The Trainer.
        module: Its module.

    Raises:
        AnatomyError: If there is no transformer of a known family inside.
    """
    try:
        find_transformer(module)
    except AnatomyError:
        strategy = trainer.strategy
        with (
            strategy.tensor_init_context(),
            strategy.model_sharded_context(),
            strategy.precision_plugin.module_init_context(),
        ):
            module.configure_model()
    if trainer.state.fn == TrainerFn.FITTING and (said := _said(module)) is not None:
        # A callback that starts with a small model says itself, at setup, how large the full one is.
        said.was_said_earlier = not _starts_small(trainer) and said.size != anatomy_of(said.transformer).size


def begin_anew(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Take the model that is there for the full one, if a fit begins anew; the same again does no more.

    It does if its Trainer has trained nothing yet and no checkpoint was loaded that says how large the full model is:
    then it does not matter what the model was in an earlier run. A model that was loaded or left at a small size is
    trained for itself. Call it from ``on_train_start``, or from ``on_fit_start``, where a strategy that loads
    checkpoints later leaves it to ``on_train_start``: before, nobody knows whether there is a checkpoint.

    Args:
        trainer: The Trainer, at whose setup :func:`ensure_built` was called.
        module: Its module.
    """
    said = _said(module)
    if trainer.global_step or said is None or not said.was_said_earlier:
        return
    anatomy, full = anatomy_of(said.transformer), said.size
    path, _ = find_transformer(module)
    set_full_size(module, anatomy.size)
    rank_zero_warn(
        f"{path} has {anatomy.num_parameters:,} parameters; in an earlier run the full model had "
        f"{anatomy.at(full).num_parameters:,}. This fit begins anew and takes the present model for the full one. To "
        "go on with that run instead, call fit with ckpt_path and its last checkpoint."
    )


def prepare_module(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Make a LightningModule ready to be resized: its model is built, its checkpoints say their size.

    Args:
        trainer: The Trainer.
        module: Its module.

    Raises:
        AnatomyError: If there is no transformer of a known family inside.
    """
    ensure_built(trainer, module)
    if _said(module) is None:
        # The present size is put on record before the model is resized.
        set_full_size(module, full_size(module))
    ensure_resizable(module)


def require_all_optimized(module: L.LightningModule, optimizers: list[Optimizer]) -> None:
    """See that the optimizers hold every trainable parameter of a module, and no other.

    Args:
        module: The LightningModule.
        optimizers: Its optimizers.

    Raises:
        MisconfigurationException: If they do not.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    lost = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if stale := len(held - {id(parameter) for parameter in module.parameters()}):
        raise MisconfigurationException(
            f"The optimizers hold {stale} parameters that are no longer in the model and miss {len(lost)} that are: "
            "nothing would be trained. configure_optimizers must build its optimizers from self.parameters() each time "
            "it is called. With LightningCLI pass auto_configure_optimizers=False and give the module an "
            "OptimizerCallable: its default binds the optimizer to the first parameters for ever."
        )
    if lost:
        raise MisconfigurationException(
            f"The optimizers miss {len(lost)} trainable parameters ({', '.join(lost[:3])}). After a resize "
            "nobody could tell this from a mistake: set requires_grad=False on what is not to be trained, or "
            "optimize it."
        )


def record_size(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Write the present size of the transformer inside ``module`` into a checkpoint.

    A module whose transformer has no anatomy cannot have been resized; its checkpoints stay as they are.
    """
    try:
        anatomy = anatomy_of(find_transformer(module)[1])
    except AnatomyError:
        return
    checkpoint[CHECKPOINT_KEY] = {
        "version": CHECKPOINT_VERSION,
        "family": anatomy.family,
        "size": anatomy.size.to_state(),
        "full_size": full_size(module).to_state(),
        "resized_by": _resizing(module),
    }


def recorded_size(module: nn.Module, checkpoint: Mapping[str, Any]) -> Size | None:
    """Return the size that a checkpoint was written at, and take up what it says of the full size.

    Args:
        module: The LightningModule that is to load it.
        checkpoint: The checkpoint, or its metadata.

    Returns:
        The size, or ``None`` if the transformer inside ``module`` has it, or lit-accel has not written the checkpoint.

    Raises:
        AnatomyError: If the checkpoint holds another family, was written by a newer version, or differs in more
            than width and depth.
        MisconfigurationException: If what it says is damaged, or the model was small and nothing would grow it back.
    """
    record = checkpoint.get(CHECKPOINT_KEY)
    if record is None:
        return None
    path, transformer = find_transformer(module)
    anatomy = anatomy_of(transformer)
    state = anatomy.size.to_state()
    present = {"version": CHECKPOINT_VERSION, "family": anatomy.family, "size": state, "full_size": state}
    require_readable(record, present, "the model's size")
    size = Size.from_state(record["size"])
    if record["family"] != anatomy.family:
        raise AnatomyError(
            f"The checkpoint holds a {record['family']} model, but {path!r} is a {anatomy.family} model."
        )
    set_full_size(module, Size.from_state(record["full_size"]))
    if size == anatomy.size:
        _require_growth(module, size, record.get("resized_by", []))
        return None
    resizable = {axis for alternatives in anatomy.width_axes for axis in alternatives}
    fixed = {
        axis: (size.axes.get(axis), present)
        for axis, present in anatomy.size.axes.items()
        if axis not in resizable and size.axes.get(axis) != present
    }
    if fixed:
        differences = ", ".join(f"{axis} {stored} (here {present})" for axis, (stored, present) in fixed.items())
        raise AnatomyError(
            f"The checkpoint's model differs from {path!r} in more than width and depth: {differences}. Build the "
            "module with the arguments that it was trained with."
        )
    return size


def rebuild_recorded_size(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Rebuild the transformer inside ``module`` at the size that a checkpoint was written at.

    Args:
        module: The LightningModule, before its weights are loaded.
        checkpoint: The checkpoint; one that lit-accel has not written is left to load as it is.

    Raises:
        AnatomyError: If :func:`recorded_size` refuses the checkpoint.
        MisconfigurationException: If it does, or weights of the transformer are not in it.
    """
    size = recorded_size(module, checkpoint)
    if size is None:
        return
    _require_growth(module, size, checkpoint[CHECKPOINT_KEY].get("resized_by", []))
    path, transformer = find_transformer(module)
    anatomy = anatomy_of(transformer)
    resized = build_resized(transformer, anatomy, size)
    # The weights of a sharded checkpoint are in other files than what is known here.
    if "state_dict" in checkpoint:
        _require_weights(path, resized, checkpoint["state_dict"])
    replace_transformer(module, path, resized)
    rank_zero_info(
        f"lit-accel: the checkpoint was written at another size; {path} is now a {anatomy.family} with "
        f"{anatomy.at(size).num_parameters:,} parameters instead of {anatomy.num_parameters:,}."
    )


def _require_weights(path: str, resized: nn.Module, weights: Mapping[str, Any]) -> None:
    """Refuse a checkpoint without some weights of a model that was only allocated.

    At its own size a module keeps what it was built with where a checkpoint has nothing; here that is any memory.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in resized.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(f"{path}.{name}")
    # What is tied is loaded under any of its names.
    missing = [tied[0] for tied in names.values() if not any(name in weights for name in tied)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise MisconfigurationException(
            f"The checkpoint was written at another size of {path} and lacks {len(missing)} of its parameters: "
            f"{', '.join(missing[:3])}{more}. What the module was built with has another shape and cannot take their "
            "place, whatever strict_loading or strict says. Save all parameters of the transformer, frozen ones too "
            "(in on_save_checkpoint or state_dict), or use a checkpoint of a phase at the size that the module is "
            "built with."
        )


def _resizing(module: nn.Module) -> list[str]:
    """Return the names of the callbacks that change the size of a module's model."""
    trainer = getattr(module, "_trainer", None)
    callbacks = () if trainer is None else trainer.callbacks
    return [type(callback).__name__ for callback in callbacks if getattr(callback, "changes_size", False)]


def _starts_small(trainer: L.Trainer) -> bool:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(getattr(callback, "start_level", 0) for callback in callbacks)


def _require_growth(module: nn.Module, size: Size, resized_by: list[str]) -> None:
    """Refuse to go on training a model that was small when it was saved, where nothing would grow it back."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None or trainer.state.fn != TrainerFn.FITTING or size == full_size(module):
        return
    if resized_by and not _resizing(module):
        raise MisconfigurationException(
            f"The checkpoint was written while {resized_by[0]} had made the model small, and this run has nothing that "
            f"would grow it back. Give the Trainer the {resized_by[0]} that it was trained with. To train the small "
            "model for itself, load it with load_from_checkpoint, and call fit without ckpt_path."
        )


class ResizableMixin:
    """Lets a LightningModule load checkpoints of any size of its transformer. Stands left of ``LightningModule``.

    Callbacks that resize add these hooks to any module themselves; a class needs the mixin so that
    ``load_from_checkpoint`` works without them.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the size."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        record_size(self, checkpoint)  # type: ignore[arg-type]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the recorded size, before the weights are loaded."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        rebuild_recorded_size(self, checkpoint)  # type: ignore[arg-type]


def ensure_resizable(module: L.LightningModule) -> None:
    """Give a LightningModule the hooks of :class:`ResizableMixin`, unless it has them.

    Args:
        module: Any LightningModule with one known transformer inside.
    """
    if isinstance(module, ResizableMixin) or getattr(module, _PATCHED, False):
        return
    for hook, action in (("on_save_checkpoint", record_size), ("on_load_checkpoint", rebuild_recorded_size)):
        setattr(module, hook, partial(_call_both, getattr(module, hook), action, module))
    setattr(module, _PATCHED, True)


def _call_both(
    original: Callable[[dict[str, Any]], None],
    action: Callable[[nn.Module, dict[str, Any]], None],
    module: nn.Module,
    checkpoint: dict[str, Any],
) -> None:
    original(checkpoint)
    action(module, checkpoint)
