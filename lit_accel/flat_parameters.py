"""Strategies under which a model's parameters lose their names and shapes, by which everything here knows a model."""

from __future__ import annotations

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def refuse_flat_parameters(strategy: Strategy, who: str) -> None:
    """Refuse a strategy that leaves nothing of the parameters to see; before the model is built under it.

    Args:
        strategy: The Trainer's strategy.
        who: What looks at the model, for messages.

    Raises:
        MisconfigurationException: If it is FSDP1, or DeepSpeed with ZeRO stage 3.
    """
    if isinstance(strategy, FSDPStrategy):
        how = "FSDPStrategy (FSDP1) keeps parameters in flat buffers"
    elif isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        how = "DeepSpeedStrategy with ZeRO stage 3 keeps parameters in flat pieces"
    else:
        return
    raise MisconfigurationException(
        f"{who} knows a model by the names and shapes of its parameters. {how}, which have neither. For sharded "
        'training use Lightning\'s ModelParallelStrategy or Trainer(strategy="resizable_model_parallel"), which are '
        "FSDP2."
    )
