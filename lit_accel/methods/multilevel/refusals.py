"""What multi-level training cannot work with; each message says what to do."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as L
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lit_accel.anatomy import Anatomy, loses_compilation, lost_in_resize, rehearse_build, require_blocks_alike
from lit_accel.methods.multilevel.maps import LevelMap
from lit_accel.methods.multilevel.moments import SUPPORTED_OPTIMIZERS, OptimizerStatePolicy
from lit_accel.methods.multilevel.phases import LearningRatePolicy
from lit_accel.resizing import require_all_optimized

# Each keeps parameters, or copies of them, that a resize leaves behind.
_INCOMPATIBLE: dict[type, str] = {
    WeightAveraging: "averages weights of one size",
    StochasticWeightAveraging: "averages weights of one size",
    ModelPruning: "keeps masks of one size",
    BaseFinetuning: "moves named parameters between groups",
}


def check_model(
    pl_module: L.LightningModule, path: str, transformer: nn.Module, anatomy: Anatomy, maps: list[LevelMap]
) -> list[str]:
    """Check that a transformer can be resized where it is.

    Args:
        pl_module: The LightningModule.
        path: Where in it the transformer is.
        transformer: The transformer.
        anatomy: Its anatomy.
        maps: The maps between its levels.

    Returns:
        The parameters outside of the transformer that may depend on its width, so that the training step may fail with
        a narrower one; they are warned of.

    Raises:
        AnatomyError: If it cannot be built at the size of a level, or is frozen in part.
        MisconfigurationException: If it shares a parameter with the rest of the module.
    """
    require_blocks_alike(transformer, anatomy)
    for step in maps:
        rehearse_build(transformer, anatomy, step.small)
    prefix = f"{path}."
    inside = {id(p): name for name, p in pl_module.named_parameters(remove_duplicate=False) if name.startswith(prefix)}
    outside = [
        (name, p) for name, p in pl_module.named_parameters(remove_duplicate=False) if not name.startswith(prefix)
    ]
    widths, dependent = _narrowed_widths(maps), []
    for name, parameter in outside:
        if id(parameter) in inside:
            raise MisconfigurationException(
                f"{name} and {inside[id(parameter)]} are one parameter. A resize replaces what is inside of "
                f"{path} and would untie it from what is outside. Use the model's own class with a "
                "tied head, such as GPT2LMHeadModel."
            )
        if width := widths & set(parameter.shape):
            dependent.append(name)
            rank_zero_warn(
                f"{name} {tuple(parameter.shape)} lies outside of {path} and may be as wide as its "
                f"hidden states ({width.pop()}), which become narrower. It is not resized: use the model's own "
                "class with a head, or width 1 in every level."
            )
    if lost := lost_in_resize(transformer, anatomy):
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        rank_zero_warn(
            f"At its first change of size {type(transformer).__name__} is built anew from its configuration, and this "
            f"is lost for the rest of the run: {', '.join(lost[:4])}{more}. Do without, or make it part of "
            "the configuration where it can be."
        )
    if loses_compilation(transformer, anatomy):
        rank_zero_warn(
            "A resize keeps only what lit_accel.anatomy.compile_blocks(model, ...) has compiled: another "
            "compilation of the model or its blocks, or its options, would be lost."
        )
    return dependent


def warn_of_frozen(transformer: nn.Module, maps: list[LevelMap]) -> None:
    """Say so where growth is to keep the function, and what is frozen keeps its weights instead.

    Args:
        transformer: The transformer, at the full size or at that of a level.
        maps: The maps between its levels.
    """
    full, small = maps[0].large, maps[-1].small
    changes_depth = full.size.depths != small.size.depths
    frozen = [
        name
        for name, parameter in transformer.named_parameters()
        if not parameter.requires_grad
        and (
            full.parameters[name].shape(full.size.axes) != full.parameters[name].shape(small.size.axes)
            or (changes_depth and full.split_name(name)[0] is not None)
        )
    ]
    if frozen:
        more = f" and {len(frozen) - 2} more" if len(frozen) > 2 else ""
        rank_zero_warn(
            f'preset="exact" is not exact here: {", ".join(frozen[:2])}{more} will be what it was before the small '
            "phase, since it is frozen, and not what the small model was trained with. Train it, or leave its width "
            '(width 1 in every level) and depth; with preset="correction" growth keeps frozen weights and what was '
            "learned beside them."
        )


def _narrowed_widths(maps: list[LevelMap]) -> set[int]:
    """Return the widths of hidden states, ``embed`` or one a stage, that some level reduces."""
    large, small = maps[0].large.size.axes, maps[-1].small.size.axes
    return {size for axis, size in large.items() if axis.startswith("embed") and small[axis] != size}


def check_trainer(trainer: L.Trainer, pl_module: L.LightningModule, *, changes_lr: bool) -> None:
    """Check callbacks and kind of optimization.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        changes_lr: Whether the learning rate depends on the phase.

    Raises:
        MisconfigurationException: If one of them cannot live with a model that changes its size.
    """
    if changes_lr and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "A learning rate that depends on the phase needs automatic optimization: in manual optimization nobody "
            'but the module knows when its schedulers step. Use learning_rate="continue" with lr_scale 1.'
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in _INCOMPATIBLE.items():
            if isinstance(callback, kind):
                raise MisconfigurationException(
                    f"{type(callback).__name__} {reason}, and MultiLevelTraining changes the size of the model. "
                    "Remove one of the two; to average or prune, do so in a second run on the final checkpoint."
                )
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            rank_zero_warn(
                f"ModelCheckpoint monitors {callback.monitor} beside MultiLevelTraining: it compares models of "
                "different sizes, and the best may be a small one. With a monitor, save_last too writes the last best "
                "one only. To go on from where a run was stopped, leave the monitor out, or add another "
                "ModelCheckpoint(save_last=True) without one."
            )
        if isinstance(callback, EarlyStopping):
            rank_zero_warn(
                "EarlyStopping beside MultiLevelTraining: the monitored value jumps when the size changes, and a "
                "stop in a small phase leaves a small model. Set its patience longer than the longest phase."
            )


def check_merging(
    trainer: L.Trainer, pl_module: L.LightningModule, numbers: list[int], *, takes_iterator: bool
) -> None:
    """Check that micro-batches can be merged as the levels ask for.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        numbers: How many micro-batches each smaller level merges.
        takes_iterator: Whether the training step takes its batches from an iterator.

    Raises:
        MisconfigurationException: If they cannot.
    """
    accumulated = trainer.accumulate_grad_batches
    for number in numbers:
        if number < 1 or (number > 1 and accumulated % number):
            raise MisconfigurationException(
                f"A level has merge_batches={number}, and the Trainer accumulate_grad_batches={accumulated}, which "
                "must be a multiple of it. Merged are micro-batches of one optimizer step: give the Trainer smaller "
                "batches and a longer accumulation, or set merge_batches to one of its divisors."
            )
        if number > 1 and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "merge_batches needs automatic optimization: in manual optimization nobody but the module knows which "
                "micro-batches make an optimizer step. Set merge_batches=1."
            )
        if number > 1 and takes_iterator:
            raise MisconfigurationException(
                "merge_batches hands the training step several micro-batches as one, and this one takes batches from a "
                "dataloader_iter by itself. Give it the argument batch instead, or set merge_batches=1."
            )


def check_length(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Check that the optimizer steps of the run can be counted before it.

    Args:
        trainer: The Trainer.
        pl_module: Its module.

    Raises:
        MisconfigurationException: If the run has a length in epochs and the module steps when it likes.
    """
    if not pl_module.automatic_optimization and trainer.max_epochs != -1:
        raise MisconfigurationException(
            "In manual optimization nobody but the module knows which batches make an optimizer step, and the length "
            "of the run in epochs says nothing of their number: the model could still be small at its end. Give the "
            "Trainer max_steps and max_epochs=-1."
        )


def check_end(trainer: L.Trainer, last_level: int, level_given: Callable[[], int]) -> None:
    """Check that a run may end at a level; warn if that is a small one.

    Args:
        trainer: The Trainer.
        last_level: The level of the last phase.
        level_given: Says the level of the model that the module came with, which is what the main process keeps; asked
            for where processes are started that do not run the script anew.

    Raises:
        MisconfigurationException: If the main process could not take the last model over.
    """
    start_method = getattr(trainer.strategy, "_start_method", "popen")
    if start_method != "popen" and last_level != (given_level := level_given()):
        # What was given small is there to grow.
        end = "Use" if given_level else "End with a phase at level 0, or use"
        raise MisconfigurationException(
            f"The last phase is at level {last_level}, and processes are started by {start_method!r}: the main process "
            f"keeps the model of level {given_level} that it was given, and could not load the one that its workers "
            f'end with. {end} start_method="popen".'
        )
    if last_level != 0:
        rank_zero_warn(
            f"The last phase is at level {last_level}: the run will end with a smaller model than the full one."
        )


def check_optimizers(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    *,
    optimizer_state: OptimizerStatePolicy,
    learning_rate: LearningRatePolicy,
    changes_lr: bool,
) -> None:
    """Check optimizers and schedulers, which exist only once training is about to start.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        optimizer_state: What becomes of the optimizers' state.
        learning_rate: What becomes of the learning rate.
        changes_lr: Whether it depends on the phase.

    Raises:
        MisconfigurationException: If the policies do not fit what ``configure_optimizers`` returns.
    """
    require_all_optimized(pl_module, trainer.optimizers)
    if len(trainer.optimizers) > 1 and trainer.max_epochs != -1:
        raise MisconfigurationException(
            "With several optimizers each of their steps counts, and the length of the run in epochs says "
            "nothing of their number. Give the Trainer max_steps and max_epochs=-1."
        )
    if optimizer_state != "reset":
        for optimizer in trainer.optimizers:
            if type(optimizer) not in SUPPORTED_OPTIMIZERS:
                supported = ", ".join(kind.__name__ for kind in SUPPORTED_OPTIMIZERS)
                raise MisconfigurationException(
                    f"optimizer_state={optimizer_state!r} can carry the state of {supported}, not of "
                    f'{type(optimizer).__name__}. Use optimizer_state="reset".'
                )
    configs = trainer.lr_scheduler_configs
    if learning_rate == "paper" and configs:
        raise MisconfigurationException(
            'learning_rate="paper" sets a schedule of its own in each phase, but configure_optimizers returns a '
            f'{type(configs[0].scheduler).__name__} too. Remove it, or use learning_rate="continue".'
        )
    if changes_lr and any(config.reduce_on_plateau for config in configs):
        raise MisconfigurationException(
            "ReduceLROnPlateau cannot be combined with a learning rate that depends on the phase: the monitored "
            'value jumps when the size changes. Use learning_rate="continue" with lr_scale 1, or another scheduler.'
        )
