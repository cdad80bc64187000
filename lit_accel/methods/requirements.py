"""What methods need of the strategy and of the model that they meet, checked before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lit_accel.anatomy import Anatomy, is_compiled
from lit_accel.stored_state import compare_rules


def require_equal_on_ranks(trainer: L.Trainer, digest: int, what: str) -> None:
    """Compare a decision across ranks. A collective: every rank must call it.

    Args:
        trainer: The Trainer.
        digest: A number of at most 62 bits that stands for the decision.
        what: What was decided, for the message.

    Raises:
        RuntimeError: If the ranks differ, on all of them.
    """
    if trainer.world_size == 1:
        return
    digests = trainer.strategy.all_gather(torch.tensor(digest, device=trainer.strategy.root_device)).flatten().tolist()
    if len(set(digests)) > 1:
        odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
        raise RuntimeError(
            f"Ranks {', '.join(map(str, odd))} and rank 0 disagree about {what} of step {trainer.global_step}. "
            "Training was stopped before they wait for each other for ever. All ranks must be given the same "
            "configuration and seed."
        )


def check_rules(
    trainer: L.Trainer,
    rules: Mapping[str, Any],
    stored: Mapping[str, Any],
    what: str,
    *,
    fixed: Collection[str] = (),
    why: str = "",
) -> None:
    """Compare rules with those of a checkpoint, and across ranks. A collective.

    Args:
        trainer: The Trainer.
        rules: The rules of this run.
        stored: Those that a checkpoint was trained with; empty if there is none.
        what: Of what they are, for messages.
        fixed: Names of those that what the checkpoint holds depends on.
        why: What would be wrong with others.

    Raises:
        MisconfigurationException: If one of those has changed.
        RuntimeError: If the ranks differ, on all of them.
    """
    # First: ranks that were given different checkpoints may not all raise what follows.
    require_equal_on_ranks(trainer, digest_of(rules), f"the rules of {what}")
    compare_rules(rules, stored, what, fixed=fixed, why=why)


def digest_of(decision: object) -> int:
    """Return a number of 62 bits that stands for a decision, by what ``repr`` says of it.

    Args:
        decision: Numbers, strings and containers of them.
    """
    return int.from_bytes(hashlib.blake2b(repr(decision).encode(), digest_size=8).digest(), "little") >> 2


DROP_LESS = "Or reduce its depth less, or leave small levels as they are, with Composition(drop_levels=[0])."
"""What else may be done where a small model has too few blocks to drop from."""


def check_levels(
    trainer: L.Trainer,
    anatomy: Anatomy,
    check: Callable[[Anatomy], object],
    advice: str,
    is_meant: Callable[[int], bool] = lambda level: True,
) -> None:
    """Check every smaller size that the model will have.

    Args:
        trainer: The Trainer.
        anatomy: The full model.
        check: Raises a MisconfigurationException if it does not work at a size.
        advice: What else may be done about it than what the check says.
        is_meant: Whether the method acts at a level. Default: at each.

    Raises:
        MisconfigurationException: If it does not, with the level.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not getattr(callback, "changes_size", False) or callback.is_neutral:
            continue
        visited = {phase.level for phase in callback.phases}
        for number, level_map in enumerate(callback.plan_levels(anatomy), 1):
            if number not in visited or not is_meant(number):
                continue
            try:
                check(level_map.small)
            except MisconfigurationException as error:
                raise MisconfigurationException(
                    f"At level {number} of {type(callback).__name__}: {error} {advice}"
                ) from error


def check_compilation(pl_module: L.LightningModule, transformer: nn.Module, anatomy: Anatomy, method: str) -> None:
    """Check that no more is compiled than blocks.

    Args:
        pl_module: The LightningModule.
        transformer: The transformer.
        anatomy: Its anatomy.
        method: Who asks, for messages.

    Raises:
        MisconfigurationException: If a whole transformer is.
    """
    blocks = [transformer.get_submodule(block.path) for block in anatomy.blocks]
    around = [module for module in transformer.modules() if module not in blocks and is_compiled(module)]
    # Where Lightning keeps what torch.compile(module) has made, and what it calls from then on.
    is_whole = getattr(pl_module, "_compiler_ctx", None) is not None
    if is_whole or any(block is part for module in around for part in module.modules() for block in blocks):
        raise MisconfigurationException(
            f"{method}: the whole transformer is compiled, which would make graphs for each way to use its blocks. "
            "Compile its blocks with lit_accel.anatomy.compile_blocks(model), or compile_blocks: true of the tasks."
        )


def require_training_mode(transformer: nn.Module, anatomy: Anatomy, method: str) -> None:
    """Check that the blocks are in training mode, outside of which nothing is dropped.

    Args:
        transformer: The transformer.
        anatomy: Its anatomy.
        method: Who asks, for messages.

    Raises:
        MisconfigurationException: If one is not.
    """
    for block in anatomy.blocks:
        if not transformer.get_submodule(block.path).training:
            raise MisconfigurationException(
                f"{block.path} is in evaluation mode, in which {method} drops nothing, and Lightning leaves it so. "
                "Models of from_pretrained come in evaluation mode: call model.train() after loading."
            )


def require_counted_steps(trainer: L.Trainer, method: str) -> None:
    """Check that the optimizer steps of a run are as many as Lightning has estimated, by which schedules are placed.

    Args:
        trainer: The Trainer, with its optimizers.
        method: Who asks, for messages.

    Raises:
        MisconfigurationException: If each of several optimizers steps by itself, or the module steps when it likes, in
            a run whose length is in epochs.
    """
    if len(trainer.optimizers) > 1 and trainer.max_epochs != -1:
        raise MisconfigurationException(
            f"{method} places its schedule by optimizer steps. There are {len(trainer.optimizers)} optimizers, and the "
            "length of the run in epochs says nothing of how often each of them steps. Give the Trainer max_steps, "
            "which counts the steps of all of them, and max_epochs=-1."
        )
    if not trainer.lightning_module.automatic_optimization and trainer.max_epochs != -1:
        raise MisconfigurationException(
            f"{method} places its schedule by optimizer steps. In manual optimization nobody but the module knows "
            "which batches make one, and the length of the run in epochs says nothing of their number. Give the "
            "Trainer max_steps and max_epochs=-1."
        )


def fetches_itself(pl_module: L.LightningModule) -> bool:
    """Whether the training step takes its batches from an iterator.

    Args:
        pl_module: The module.
    """
    return is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True)
