"""What layer dropping cannot work with; each message says what to do."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import LBFGS, Optimizer

from lit_accel.anatomy import Anatomy, is_compiled
from lit_accel.methods.layer_dropping.dropper import Scale


def droppable_blocks(anatomy: Anatomy, pinned: Sequence[int], method: str) -> list[int]:
    """Return the indices of the blocks that may be dropped.

    Stages that consist of one unit, such as the plain and the shifted block of a short stage of Swin, are kept whole:
    without one of the two, windows would not exchange anything.

    Args:
        anatomy: The model.
        pinned: Indices of blocks that always run; negative ones count from the last.
        method: Who asks, for messages.

    Raises:
        MisconfigurationException: If a pin does not exist, fewer than two blocks remain, or blocks share parameters.
    """
    num_blocks = len(anatomy.blocks)
    if wrong := [index for index in pinned if not -num_blocks <= index < num_blocks]:
        raise MisconfigurationException(
            f"pinned names block {wrong[0]}, but this {anatomy.family} model has {num_blocks} blocks: 0 to "
            f"{num_blocks - 1}, or -{num_blocks} to -1 from the last."
        )
    kept = {index % num_blocks for index in pinned}
    short = {
        stage
        for stage, depth in enumerate(anatomy.size.depths)
        if anatomy.depth_unit > 1 and depth <= anatomy.depth_unit
    }
    units = [i for i, block in enumerate(anatomy.blocks) if i not in kept and block.stage not in short]
    if len(units) < 2:
        raise MisconfigurationException(
            f"{method} needs at least two blocks that it may drop; of the {num_blocks} blocks of this {anatomy.family} "
            f"model {len(units)} remain (pinned: {sorted(kept) or 'none'}; in stages too short to drop from: "
            f"{sum(anatomy.size.depths[stage] for stage in short)}). Pin fewer blocks, or train a deeper model."
        )
    paths = [f"{anatomy.blocks[unit].path}." for unit in units]
    for group in anatomy.tied:
        if len(group) > 1 and any(name.startswith(path) for name in group for path in paths):
            raise MisconfigurationException(
                f"{' and '.join(group)} are one parameter: blocks that share state cannot be dropped one by one. "
                "Give each block its own parameters."
            )
    return units


def require_gradient(
    module: nn.Module, transformer: nn.Module, anatomy: Anatomy, units: Sequence[int], num_dropped: int
) -> None:
    """Check that something is trained in every step, whichever blocks run.

    Args:
        module: The LightningModule.
        transformer: Its transformer.
        anatomy: The transformer's anatomy.
        units: The blocks that may be dropped.
        num_dropped: How many of them may be dropped from one step.

    Raises:
        MisconfigurationException: If nothing is trained but blocks that may all be dropped.
    """
    parameters = {unit: list(transformer.get_submodule(anatomy.blocks[unit].path).parameters()) for unit in units}
    droppable = {id(parameter) for block in parameters.values() for parameter in block}
    if any(parameter.requires_grad and id(parameter) not in droppable for parameter in module.parameters()):
        return
    trained = [unit for unit, block in parameters.items() if any(parameter.requires_grad for parameter in block)]
    if 0 < len(trained) <= num_dropped:
        raise MisconfigurationException(
            f"Nothing is trained but blocks {trained}, of which a step may drop every one: it would have no gradient, "
            f"and torch would end the run. Pin one of them (pinned=[{trained[-1]}]), or train the head, too."
        )


def require_gradients_of_all(transformer: nn.Module, anatomy: Anatomy, units: Sequence[int], method: str) -> None:
    """Check that the hidden states after every block that may be dropped have a gradient.

    They do if anything is trained that comes before: in all families modules stand in the order of their calls.

    Args:
        transformer: The transformer.
        anatomy: Its anatomy.
        units: The blocks that may be dropped.
        method: Who asks, for messages.

    Raises:
        MisconfigurationException: If those of some block have none.
    """
    path = f"{anatomy.blocks[units[0]].path}."
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            return
        if name.startswith(path):
            break
    first = transformer.get_submodule(path[:-1])
    if not any(parameter.requires_grad for parameter in first.parameters()):
        raise MisconfigurationException(
            f'{method}: estimator="taylor" measures by gradients, and {path[:-1]} has none, since nothing up to there '
            'is trained. It would be taken for worthless. Use "ablate", "ratio" or "cos", or pin the frozen blocks.'
        )


def check_optimizers(optimizers: Sequence[Optimizer], method: str) -> None:
    """Check that optimizers leave parameters without a gradient as they are.

    Args:
        optimizers: The optimizers.
        method: Who asks, for messages.

    Raises:
        MisconfigurationException: If one does not.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise MisconfigurationException(
            f"{method} drops blocks, whose parameters have no gradient then. LBFGS takes it for zero and moves them "
            "along its history. Use an optimizer that leaves them alone, such as AdamW or SGD."
        )


def check_scale(anatomy: Anatomy, scale: Scale, method: str) -> None:
    """Check that nothing is scaled where norms stand after the addition, and warn of dropping there.

    Args:
        anatomy: The model.
        scale: What is scaled.
        method: Who asks, for messages.

    Raises:
        MisconfigurationException: If something is.
    """
    if all(block.residual != "post_norm" for block in anatomy.blocks):
        return
    if scale != "none":
        raise MisconfigurationException(
            f'scale="{scale}" does not fit this {anatomy.family} model, whose norms stand after the addition '
            "(post-norm): "
            'what comes out of a block is normalised, and amplifying it would undo that. Use scale="none".'
        )
    rank_zero_warn(
        f"{method} on a post-norm model ({anatomy.family}): the authors of progressive layer dropping report that "
        "dropping is "
        "unstable there, and moved the norms to the front. A gentle schedule, of at least 0.8 of the blocks on "
        "average, is "
        "advisable."
    )


def check_sublayers(transformer: nn.Module, anatomy: Anatomy, scale: Scale, method: str) -> None:
    """Check that what is scaled is not compiled.

    Args:
        transformer: The transformer.
        anatomy: Its anatomy.
        scale: What is scaled.
        method: Who asks, for messages.

    Raises:
        MisconfigurationException: If it is.
    """
    blocks = [transformer.get_submodule(block.path) for block in anatomy.blocks]
    if scale == "sublayer" and any(is_compiled(module) for block in blocks for module in block.modules()):
        raise MisconfigurationException(
            f'{method}: scale="sublayer" works inside of the blocks, and these are compiled. Use scale="block", which '
            "works outside of them, or leave the blocks uncompiled."
        )


def why_calls_are_not_seen(method: str, what_follows: str) -> str:
    """Return what is wrong where blocks run in a batch in which the model was not called.

    Args:
        method: Who says so.
        what_follows: What it cannot do, a sentence.
    """
    return (
        f"{method}: blocks of the model ran in a batch, but the model itself was not called; calls of its parts, such "
        f"as self.model.transformer(...) or self.model.forward_features(...), are not seen. {what_follows} Call the "
        "model itself, self.model(...), so that they are."
    )
