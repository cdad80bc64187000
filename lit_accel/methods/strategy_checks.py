"""What methods need of the strategy, by their facts; checked before training."""

from __future__ import annotations

import lightning.pytorch as L
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.flat_parameters import refuse_flat_parameters
from lit_accel.methods.method import Method
from lit_accel.resizing import ResizableStrategy

# What to use instead of Lightning's own; the first that fits, for some are subclasses of others.
_RESIZABLE: dict[type, str] = {
    FSDPStrategy: "resizable_model_parallel",
    DeepSpeedStrategy: "resizable_model_parallel",
    ModelParallelStrategy: "resizable_model_parallel",
    DDPStrategy: "resizable_ddp",
}


def check_strategy(trainer: L.Trainer, method: Method) -> None:
    """Check that the strategy can live with what a method does.

    Args:
        trainer: The Trainer.
        method: The method.

    Raises:
        MisconfigurationException: If it cannot.
    """
    name = type(method).__name__
    if method.changes_size:
        _check_resizable(trainer.strategy, name)
    if method.leaves_parameters_unused:
        check_unused_parameters(trainer, name)
    if method.needs_whole_parameters:
        _check_whole_parameters(trainer.strategy, name)
    # Last: what a method needs besides says better what to use.
    refuse_flat_parameters(trainer.strategy, name)


def _check_resizable(strategy: Strategy, method: str) -> None:
    if isinstance(strategy, ResizableStrategy):
        return
    if isinstance(strategy, (XLAStrategy, SingleDeviceXLAStrategy)):
        instead = "There is no strategy for TPUs that can."
    else:
        name = next((name for kind, name in _RESIZABLE.items() if isinstance(strategy, kind)), "resizable")
        instead = f'Use Trainer(strategy="{name}") instead, after `import lit_accel`, or --trainer.strategy {name}.'
    raise MisconfigurationException(
        f"{method} changes the model's size in mid-training, which {type(strategy).__name__} cannot. "
        f'{instead} There is "resizable" for one device, "resizable_ddp" for several, and "resizable_model_parallel" '
        "for several that share one copy of the weights (FSDP2)."
    )


def check_unused_parameters(trainer: L.Trainer, method: str) -> None:
    """Check that the strategy can live with parameters that take no part in some steps.

    Args:
        trainer: The Trainer.
        method: What leaves them unused, for messages.

    Raises:
        MisconfigurationException: If it cannot.
    """
    strategy = trainer.strategy
    # Before DDP, of which Lightning's DeepSpeedStrategy is a subclass.
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"{method} leaves parameters without a gradient. {type(strategy).__name__} keeps them in flat buffers, "
            "where a missing gradient counts as zero, or waits for a block that is never called. For sharded training "
            'use Lightning\'s ModelParallelStrategy or Trainer(strategy="resizable_model_parallel"), which are FSDP2.'
        )
    if isinstance(strategy, DDPStrategy):
        options = strategy._ddp_kwargs
        if options.get("static_graph"):
            raise MisconfigurationException(
                f"{method} changes from step to step which parameters are used, and static_graph=True promises that "
                "this never happens. Leave static_graph out and set find_unused_parameters=True."
            )
        if not options.get("find_unused_parameters"):
            how = (
                'Trainer(strategy="ddp_find_unused_parameters_true")'
                if type(strategy) is DDPStrategy
                else f"Trainer(strategy={type(strategy).__name__}(find_unused_parameters=True))"
            )
            raise MisconfigurationException(
                f"{method} leaves parameters without a gradient, and DDP would then leave the gradients of others "
                f"unsynchronised without saying so. Use {how}."
            )


def _check_whole_parameters(strategy: Strategy, method: str) -> None:
    is_plain = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(
        strategy, (DeepSpeedStrategy, SingleDeviceXLAStrategy)
    )
    if not is_plain:
        instead = "ddp" if isinstance(strategy, ParallelStrategy) else "auto"
        raise MisconfigurationException(
            f"{method} takes units out of whole parameters, and {type(strategy).__name__} keeps parameters in pieces "
            f'or in a form of its own. Use Trainer(strategy="{instead}").'
        )
