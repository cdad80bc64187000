"""Data parallel training with a model that can change its size."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.strategies.resizing import ResizeMixin


class ResizableDDPStrategy(ResizeMixin, DDPStrategy):
    """Distributed data parallel training, one process a device; registered as ``resizable_ddp``.

    Takes the arguments of :class:`~lightning.pytorch.strategies.DDPStrategy`, those that it passes on to
    :class:`torch.nn.parallel.DistributedDataParallel` included. A resize makes a new wrapper: its constructor
    broadcasts rank 0's weights, so replicas are equal after it whatever each rank built.

    Raises:
        MisconfigurationException: If it is given a ``ddp_comm_state``.

    Example::

        Trainer(strategy="resizable_ddp", devices=2)
    """

    strategy_name = "resizable_ddp"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._ddp_comm_state is not None:
            raise MisconfigurationException(
                f"{type(self._ddp_comm_state).__name__} keeps buffers of the gradients' shapes, which change "
                "with the size of the model. Leave out ddp_comm_state; hooks without a state, such as "
                "fp16_compress_hook, can stay."
            )
