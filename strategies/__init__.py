"""Lightning strategies whose model can change its size in mid-training; importing this registers their names."""

from lightning.pytorch.strategies import StrategyRegistry

from lit_accel.strategies.ddp import ResizableDDPStrategy
from lit_accel.strategies.model_parallel import ResizableModelParallelStrategy
from lit_accel.strategies.resizing import ResizeEvent, ResizeMixin
from lit_accel.strategies.single_device import ResizableSingleDeviceStrategy

# Lightning has no entry point for strategies, and asks only its own module for their names.
for _strategy in (ResizableSingleDeviceStrategy, ResizableDDPStrategy, ResizableModelParallelStrategy):
    StrategyRegistry.register(
        _strategy.strategy_name,
        _strategy,
        description=(_strategy.__doc__ or "").partition("\n")[0],
        override=True,
    )

__all__ = [
    "ResizableDDPStrategy",
    "ResizableModelParallelStrategy",
    "ResizableSingleDeviceStrategy",
    "ResizeEvent",
    "ResizeMixin",
]
