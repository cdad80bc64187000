"""One device, with a model that can change its size."""

from __future__ import annotations

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.strategies.resizing import ResizeMixin


class ResizableSingleDeviceStrategy(ResizeMixin, SingleDeviceStrategy):
    """Trains on the one device that the Trainer chose; registered as ``resizable``.

    Args:
        accelerator: Set by the Trainer.
        checkpoint_io: Reads and writes checkpoints.
        precision_plugin: Set by the Trainer.

    Raises:
        MisconfigurationException: If the Trainer was given more than one device or machine.

    Example::

        Trainer(strategy="resizable", devices=1)
    """

    strategy_name = "resizable"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            device="cpu",
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )

    @property
    def num_nodes(self) -> int:
        """The number of machines: one. Lightning sets this attribute too, on any strategy that has it."""
        return 1

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        if num_nodes > 1:
            raise MisconfigurationException(
                f"The strategy 'resizable' runs on one machine, but the Trainer was given num_nodes={num_nodes}: they "
                'would train apart. Use strategy="resizable_ddp".'
            )

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The devices that the Trainer chose.

        Lightning sets this attribute on any strategy that has it; a registered single-device strategy would learn
        in no other way that it is meant to run on a GPU.
        """
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise MisconfigurationException(
                f"The strategy 'resizable' runs on one device, but the Trainer was given {len(devices)}. Use "
                'strategy="resizable_ddp", or devices=1.'
            )
        self._root_device = torch.device(devices[0])
