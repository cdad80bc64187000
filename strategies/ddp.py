"""Data parallel training with a model that can change its size."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from lit_accel.strategies.resizing import ResizeMixin


class ResizableDDPStrategy(ResizeMixin, DDPStrategy):
    """Distributed data parallel training, one process a device; registered as ``resizable_ddp``.

    Takes the arguments of :class:`~lightning.pytorch.strategies.DDPStrategy`, those that it passes on to
    :class:`torch.nn.parallel.DistributedDataParallel` included. A resize makes a new wrapper: its constructor
    broadcasts rank 0's weights, so replicas are equal after it whatever each rank built.

    Example::

        Trainer(strategy="resizable_ddp", devices=2)
    """

    strategy_name = "resizable_ddp"
