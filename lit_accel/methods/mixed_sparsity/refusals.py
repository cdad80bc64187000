"""What mixed sparsity training cannot work with; each message says what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lit_accel.anatomy import Anatomy, is_compiled
from lit_accel.methods.mixed_sparsity.attention import PATTERNS
from lit_accel.methods.mixed_sparsity.distribution import DISTRIBUTIONS
from lit_accel.methods.mixed_sparsity.schedule import Stages
from lit_accel.methods.mixed_sparsity.targets import Targets
from lit_accel.methods.mixed_sparsity.units import MatrixUnits, n_of_m

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
    WeightAveraging: "averages weights entry by entry",
    StochasticWeightAveraging: "averages weights entry by entry",
    ModelPruning: "keeps masks of its own on the same weights",
    BaseFinetuning: "freezes and thaws parameters in mid-training",
}


def check_units(ffn: str, attention: str, head: str) -> None:
    """Check that units have names that exist.

    Raises:
        ValueError: If one has not.
    """
    matrix = ("element", "block")
    for argument, units, allowed in (
        ("ffn_units", ffn, ("neuron", *matrix)),
        ("attention_units", attention, ("head", *matrix)),
        ("head_units", head, ("element",)),
    ):
        if units in (*allowed, "dense"):
            continue
        pattern = n_of_m(units)
        if argument == "head_units" or pattern is None:
            more = "" if argument == "head_units" else ', or "N:M" such as "2:4"'
            names = ", ".join(repr(name) for name in (*allowed, "dense"))
            raise ValueError(f"{argument} is {units!r}; it is one of {names}{more}.")
        num_kept, of = pattern
        if not 0 < num_kept < of:
            raise ValueError(
                f"{argument} is {units!r}: of {of} neighbours {num_kept} are kept. Keep at least 1 and fewer than all."
            )


def check_numbers(
    stages: Stages, update_every: int, drop_fraction: float, gradient_share: float, counts: Mapping[str, int]
) -> None:
    """Check the numbers of a schedule.

    Args:
        stages: See :class:`~lit_accel.MixedSparsityTraining`.
        update_every: See there.
        drop_fraction: See there.
        gradient_share: See there.
        counts: Further arguments that are at least 1, by name.

    Raises:
        ValueError: If one cannot be.
    """
    if not stages:
        raise ValueError("stages is empty. Give at least one pair of a start and a sparsity, such as [[0, 0.0]].")
    for entry in stages:
        if not isinstance(entry, Sequence) or len(entry) != 2:
            raise ValueError(f"stages has the entry {entry!r}; each is a pair of a start and a sparsity: [0.06, 0.9].")
        start, sparsity = entry
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"stages has the sparsity {sparsity}: at 1 every layer would be empty. It is the share of the units "
                "that are off, at least 0 and below 1."
            )
        if start < 0 or (isinstance(start, float) and start > 1):
            raise ValueError(
                f"stages has the start {start}; it is a number of optimizer steps (int), or a share of the run (float "
                "from 0 to 1)."
            )
    if stages[0][0] != 0:
        raise ValueError(f"The first of stages starts at {stages[0][0]}; it starts at 0: how sparse is the run before?")
    for kind in (int, float):
        starts = [start for start, _ in stages if isinstance(start, kind)]
        if starts != sorted(starts):
            raise ValueError(f"stages are out of order: they start at {starts}. List them by their starts.")
    for argument, value, below in (("drop_fraction", drop_fraction, True), ("gradient_share", gradient_share, False)):
        if not 0 <= value <= 1 or (below and value == 1) or math.isnan(value):
            raise ValueError(f"{argument} is {value}; it is a share, from 0 to {'below ' if below else ''}1.")
    for argument, count in {"update_every": update_every, **counts}.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{argument} is {count!r}; it is a whole number, at least 1.")


def check_choices(distribution: str, execution: str, pattern: str | None, phase: Sequence[Any]) -> None:
    """Check the remaining arguments.

    Raises:
        ValueError: If one is none of its values.
    """
    for argument, value, allowed in (
        ("distribution", distribution, DISTRIBUTIONS),
        ("execution", execution, ("compact", "masked")),
        ("attention_pattern", pattern, (*PATTERNS, None)),
    ):
        if value not in allowed:
            raise ValueError(f"{argument} is {value!r}; it is one of {', '.join(map(repr, allowed))}.")
    if len(phase) != 2 or any(bound < 0 for bound in phase):
        raise ValueError(
            f"attention_phase is {list(phase)}; it is a pair: the first step that attends by the pattern and the first "
            "one after, in optimizer steps (int) or as shares of the run (float)."
        )


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
                what = "tiles in each row of tiles" if space.num_groups > 1 else "entries"
                raise MisconfigurationException(
                    f"A sparsity of {sparsity} would leave {name} empty: it has {space.num_units} {what}, and "
                    f"{(1 - sparsity) * space.num_units:.2f} of them round to none. Lower the sparsity in stages"
                    + (", or take a smaller block_size." if isinstance(space, MatrixUnits) and space.tile > 1 else ".")
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
        raise MisconfigurationException(f"This {anatomy.family} model {reason}. Set attention_pattern to null (None).")
    if any(block.attention.window is not None for block in anatomy.blocks):
        raise MisconfigurationException(
            f"This {anatomy.family} model attends within a window of its own (sliding_window). Set attention_pattern "
            "to null (None)."
        )


def check_trainer(trainer: L.Trainer, pl_module: L.LightningModule, callback: L.Callback) -> None:
    """Check strategy, callbacks and kind of optimization.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        callback: Who asks.

    Raises:
        MisconfigurationException: If one of them cannot live with parameters whose shape changes.
    """
    name, strategy = type(callback).__name__, trainer.strategy
    is_plain = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(
        strategy, (DeepSpeedStrategy, SingleDeviceXLAStrategy)
    )
    if not is_plain:
        instead = "ddp" if isinstance(strategy, ParallelStrategy) else "auto"
        raise MisconfigurationException(
            f"{name} takes units out of whole parameters, and {type(strategy).__name__} keeps parameters in pieces or "
            f'in a form of its own. Use Trainer(strategy="{instead}").'
        )
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} changes the topology between the backward pass and the optimizer step, which only the module "
            "itself knows with manual optimization. Set automatic_optimization = True."
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is not callback and isinstance(other, type(callback)):
            raise MisconfigurationException(f"Two {name} callbacks would switch units of one model. Use one of them.")
        for kind, reason in _INCOMPATIBLE.items():
            if isinstance(other, kind):
                raise MisconfigurationException(
                    f"{type(other).__name__} {reason}, and {name} switches them on and off. Remove one of the two; to "
                    "average or prune, do so in a second run on the final checkpoint."
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
            f"MixedSparsityTraining works with one optimizer, and there are {len(trainer.optimizers)}."
        )
    optimizer = trainer.optimizers[0]
    if not isinstance(optimizer, SUPPORTED_OPTIMIZERS) or isinstance(optimizer, ZeroRedundancyOptimizer):
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
    num_graphs = len(sizes) * (2 if targets.pattern is not None else 1) * (2 if evaluates else 1)
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


def check_resizes(trainer: L.Trainer, targets: Targets) -> None:
    """Check that the model changes its size only while all units are on.

    Args:
        trainer: The Trainer.
        targets: Its units and their numbers.

    Raises:
        MisconfigurationException: If it does otherwise.
    """
    schedule = targets.schedule
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        for step in getattr(other, "resize_steps", ()):
            if schedule.sparsity(step) > 0 or (step > 0 and schedule.sparsity(step - 1) > 0):
                raise MisconfigurationException(
                    f"{type(other).__name__} changes the size of the model at step {step}, where the sparsity is "
                    f"{max(schedule.sparsity(step), schedule.sparsity(max(step - 1, 0)))}: units that are off cannot "
                    "be merged or split. Let stages be 0 before and after each change of size."
                )
