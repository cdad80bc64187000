"""What mixed sparsity training cannot work with; each message says what to do."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lit_accel.anatomy import Anatomy, is_compiled
from lit_accel.methods.mixed_sparsity.targets import Targets
from lit_accel.methods.mixed_sparsity.units import MatrixUnits

SUPPORTED_OPTIMIZERS: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
"""Optimizers whose state has a zero that means "nothing seen yet", entry by entry."""
# Each keeps parameters, or copies of them, of one shape.
_INCOMPATIBLE: dict[type, str] = {
    WeightAveraging: "averages weights of one shape",
    StochasticWeightAveraging: "averages weights of one shape",
    ModelPruning: "masks the same weights",
    BaseFinetuning: "freezes and thaws parameters",
}


def check_model(transformer: nn.Module, targets: Targets) -> None:
    """Check that a model can be as sparse as is asked for.

    Args:
        transformer: The model.
        targets: Its units and their numbers.

    Raises:
        MisconfigurationException: If it cannot.
    """
    check_counts(targets)
    parameters = dict(transformer.named_parameters())
    for space in targets.spaces.values():
        if frozen := [each for each in space.names if not parameters[each].requires_grad]:
            raise MisconfigurationException(
                f"{frozen[0]} is frozen, and switching units off changes it for good. Train it, or set "
                f'{space.part}_units="dense".'
            )
        if isinstance(space, MatrixUnits) and space.tile > 1:
            check_tiles(transformer, targets.anatomy)


def check_tiles(transformer: nn.Module, anatomy: Anatomy) -> None:
    """Check that a model can be multiplied in tiles.

    Args:
        transformer: The model.
        anatomy: Its anatomy.

    Raises:
        MisconfigurationException: If its blocks are compiled.
    """
    if any(is_compiled(transformer.get_submodule(block.path)) for block in anatomy.blocks):
        raise MisconfigurationException(
            'Units are "block", and the blocks of the model are compiled: each update would compile them anew, since '
            'other tiles are on then. Do not compile them, or use "neuron" and "head".'
        )


def check_counts(targets: Targets) -> None:
    """Check that no place of a model is left without any unit.

    Args:
        targets: Its units and their numbers.

    Raises:
        MisconfigurationException: If one is.
    """
    for name, space in targets.spaces.items():
        for sparsity, counts in zip(targets.schedule.sparsities, targets.stage_counts, strict=True):
            if counts[name] == 0:
                what = f"{space.num_units} tiles of a row" if space.num_groups > 1 else f"{space.num_units} entries"
                raise MisconfigurationException(
                    f"A sparsity of {sparsity} would leave {name} empty: none of the {what} would be on. Lower the "
                    "sparsity in stages"
                    + (", or take a smaller block_size." if isinstance(space, MatrixUnits) and space.tile > 1 else ".")
                )


def warn_of_no_update(targets: Targets) -> None:
    """Warn if the topology is chosen once and never updated, though that was asked for.

    Args:
        targets: The schedule on the model's units, for the whole run.
    """
    schedule = targets.schedule
    sparse = [step for step in range(schedule.num_steps) if schedule.sparsity(step) > 0]
    if not sparse or schedule.drop_fraction == 0:
        return
    first, end = sparse[0], schedule.restoration_start or sparse[-1] + 1
    every = schedule.update_every
    if not any(step % every == 0 for step in range(first + 1, end)):
        rank_zero_warn(
            f"No unit will ever be exchanged: the model is sparse from step {first} until units come back at {end}, "
            f"and update_every={every} falls on none of these steps. Set it to about {max(1, (end - first) // 20)}, "
            "lengthen the run, or say with drop_fraction=0 that this is meant."
        )


def check_pattern(anatomy: Anatomy) -> None:
    """Check that a model can attend by a pattern.

    Args:
        anatomy: The model.

    Raises:
        MisconfigurationException: If it cannot.
    """
    if anatomy.attend is None:
        causal = all(block.attention.causal for block in anatomy.blocks)
        reason = (
            "is not known to let its attention be replaced"
            if causal
            else "attends to later tokens too, and the patterns are of causal attention"
        )
        raise MisconfigurationException(f'This {anatomy.family} model {reason}. Set attention_pattern="dense".')
    if any(block.attention.window is not None for block in anatomy.blocks):
        raise MisconfigurationException(
            f"This {anatomy.family} model attends within a window of its own (sliding_window). Set "
            'attention_pattern="dense".'
        )


def check_trainer(trainer: L.Trainer, pl_module: L.LightningModule, callback: L.Callback) -> None:
    """Check callbacks and kind of optimization.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        callback: Who asks.

    Raises:
        MisconfigurationException: If one of them cannot live with parameters whose shape changes.
    """
    name = type(callback).__name__
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} changes the topology between the backward pass and the optimizer step; with manual optimization "
            "only the module knows where that is. Set automatic_optimization = True."
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in _INCOMPATIBLE.items():
            if isinstance(other, kind):
                raise MisconfigurationException(
                    f"{type(other).__name__} {reason}, which {name} takes out of the model and puts back. Remove one "
                    "of the two, or use it in a second run on the final checkpoint."
                )


def check_optimizers(trainer: L.Trainer) -> None:
    """Check the optimizer, which exists only once training is about to start.

    Args:
        trainer: The Trainer.

    Raises:
        MisconfigurationException: If its state cannot be switched with the units.
    """
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"MixedSparsityTraining works with one optimizer, and there are {len(trainer.optimizers)}. Give all "
            "parameters to one, in several parameter groups if need be."
        )
    optimizer = trainer.optimizers[0]
    if not isinstance(optimizer, SUPPORTED_OPTIMIZERS):
        names = ", ".join(kind.__name__ for kind in SUPPORTED_OPTIMIZERS)
        raise MisconfigurationException(
            f"MixedSparsityTraining starts the optimizer state of units anew, and knows what that means for {names}, "
            f"not for {type(optimizer).__name__}. Use one of these, such as torch.optim.AdamW."
        )


def check_graphs(transformer: nn.Module, targets: Targets, evaluates: bool) -> None:
    """Check that compiled blocks do not come in more sizes than torch makes graphs of.

    Args:
        transformer: The transformer.
        targets: Its units and their numbers.
        evaluates: Whether the model is evaluated in between, for which graphs are others.

    Raises:
        MisconfigurationException: If they do.
    """
    modules = [transformer.get_submodule(block.path) for block in targets.anatomy.blocks]
    if not any(map(is_compiled, modules)):
        return
    import torch._dynamo.config

    limit = torch._dynamo.config.recompile_limit
    # The whole model runs at each update.
    separable = {name: space.num_units for name, space in targets.spaces.items() if targets.takes_out(space)}
    sizes = {tuple(counts[name] for name in separable) for counts in (*targets.stage_counts, separable)}
    kinds = {(block.stage, index % targets.anatomy.depth_unit) for index, block in enumerate(targets.anatomy.blocks)}
    num_graphs = len(sizes) * len(kinds) * (2 if targets.pattern is not None else 1) * (2 if evaluates else 1)
    if num_graphs > limit:
        raise MisconfigurationException(
            f"The blocks are compiled, and these stages make up to {num_graphs} graphs of them"
            f"{', those of evaluation included' if evaluates else ''}; torch makes no more than {limit} "
            "(torch._dynamo.config.recompile_limit). Take fewer stages, or raise that limit."
        )


def check_masks(masks: Mapping[str, torch.Tensor], targets: Targets) -> None:
    """Check that a checkpoint's units are those of this run.

    Args:
        masks: The checkpoint's masks.
        targets: The units of this run.

    Raises:
        MisconfigurationException: If they are not.
    """
    stored = {name: tuple(mask.shape) for name, mask in masks.items()}
    if stored != {name: (space.num_groups, space.num_units) for name, space in targets.spaces.items()}:
        raise MisconfigurationException(
            "The units of the checkpoint are others than those of this run: their kind, or the size of the model, has "
            "changed. Resume with the settings that it was trained with."
        )
