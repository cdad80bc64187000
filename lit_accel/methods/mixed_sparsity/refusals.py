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
# In learning rates: what (0.9, 0.99) comes to is below it, what torch's own (0.9, 0.999) does is twice as much.
_LONGEST_STEP = 3.0
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
    updates = [step for step in range(first + 1, end) if step % every == 0]
    if updates and not any(_num_dropped(targets, step) for step in updates):
        rank_zero_warn(
            f"No unit will ever be exchanged: drop_fraction={schedule.drop_fraction} of those that are on is less than "
            "one in every group at each update. Raise it, or say with drop_fraction=0 that this is meant."
        )
    if not updates:
        rank_zero_warn(
            f"No unit will ever be exchanged: the model is sparse from step {first} until units come back at {end}, "
            f"and update_every={every} falls on none of these steps. Set it to about {max(1, (end - first) // 20)}, "
            "lengthen the run, or say with drop_fraction=0 that this is meant."
        )


def _num_dropped(targets: Targets, step: int) -> int:
    return sum(change.num_dropped for change in targets.changes(step, targets.counts(step)).values())


def check_phase(targets: Targets, given: tuple[int | float, int | float]) -> None:
    """Check that the pattern's phase does not end before it begins.

    Args:
        targets: The schedule, for the whole run.
        given: The phase as it was written.

    Raises:
        MisconfigurationException: If it does.
    """
    first, end = targets.pattern_steps
    if targets.pattern is not None and first > end:
        hint = " A whole number is one of steps: the end of the run is 1.0." if given[1] == 1 else ""
        raise MisconfigurationException(
            f"attention_phase is {list(given)}, which in a run of {targets.schedule.num_steps} steps is from step "
            f"{first} to step {end}: it ends before it begins.{hint} Write both bounds as steps, or both as shares."
        )


def warn_of_phase(targets: Targets, given: tuple[int | float, int | float]) -> None:
    """Warn if no step follows the pattern, or the last one does.

    Args:
        targets: The schedule, for the whole run.
        given: The phase as it was written.
    """
    first, end = targets.pattern_steps
    num_steps = targets.schedule.num_steps
    if targets.pattern is None:
        return
    if first >= min(end, num_steps):
        rank_zero_warn(
            f"No step will follow attention_pattern: attention_phase {list(given)} is from step {first} to step {end} "
            f"of {num_steps}. A whole number is one of steps, and a share of the run has a point."
        )
    elif end >= num_steps:
        rank_zero_warn(
            "The last steps of the run attend by the pattern, and the model that it leaves behind attends densely, as "
            "it was not trained to. Let attention_phase end some steps before the run does."
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


def check_trainer(trainer: L.Trainer, pl_module: L.LightningModule, callback: L.Callback, *, reshapes: bool) -> None:
    """Check callbacks and kind of optimization.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        callback: Who asks.
        reshapes: Whether units are ever off.

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
            if reshapes and isinstance(other, kind):
                raise MisconfigurationException(
                    f"{type(other).__name__} {reason}, which {name} takes out of the model and puts back. Remove one "
                    "of the two, or use it in a second run on the final checkpoint."
                )


def check_optimizers(trainer: L.Trainer, transformer: nn.Module, targets: Targets) -> None:
    """Check the optimizer, which exists only once training is about to start.

    Args:
        trainer: The Trainer.
        transformer: The model.
        targets: Its units, if any are ever off.

    Raises:
        MisconfigurationException: If its state cannot be switched with the units, or it does not train them.
    """
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"MixedSparsityTraining works with one optimizer, and there are {len(trainer.optimizers)}. Give all "
            "parameters to one, in several parameter groups if need be."
        )
    if not targets.spaces:
        return
    optimizer = trainer.optimizers[0]
    if not isinstance(optimizer, SUPPORTED_OPTIMIZERS):
        names = ", ".join(kind.__name__ for kind in SUPPORTED_OPTIMIZERS)
        raise MisconfigurationException(
            f"MixedSparsityTraining starts the optimizer state of units anew, and knows what that means for {names}, "
            f"not for {type(optimizer).__name__}. Use one of these, such as torch.optim.AdamW."
        )
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = dict(transformer.named_parameters())
    for space in targets.spaces.values():
        if untrained := [each for each in space.names if id(parameters[each]) not in trained]:
            raise MisconfigurationException(
                f"{untrained[0]} is in no parameter group of the optimizer, and switching units off changes it for "
                f'good. Give it to the optimizer, or set {space.part}_units="dense".'
            )
    _warn_of_first_steps(optimizer)


def _warn_of_first_steps(optimizer: torch.optim.Optimizer) -> None:
    """Warn if units that come back begin with steps of many times the learning rate.

    Their moments begin at zero, while the optimizer's count of steps, by which it corrects young moments, goes on.
    Under a constant gradient the k-th step of an Adam is lr (1 - b1^k) / sqrt(1 - b2^k) long then.
    """
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.RMSprop):
        betas, option, better = (0.0, float(group["alpha"])), f"alpha={group['alpha']:g}", "a smaller alpha"
    elif "betas" in group and not isinstance(optimizer, torch.optim.Adamax):
        betas = (float(group["betas"][0]), float(group["betas"][1]))
        option, better = f"betas=({betas[0]:g}, {betas[1]:g})", "betas=(0.9, 0.95)"
    else:
        return
    longest = max((1 - betas[0] ** k) / (1 - betas[1] ** k) ** 0.5 for k in range(1, 100)) if betas[1] > 0 else 1.0
    if longest > _LONGEST_STEP:
        rank_zero_warn(
            f"Units that are switched on begin with steps of up to {longest:.1f} times the learning rate: their "
            f"moments start at zero, and with {option} they fill slowly. Use {better}."
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
