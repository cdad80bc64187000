"""What all tasks have in common: an optimizer that is made anew after a resize, its schedule, compiled blocks."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lit_accel.arguments import require_number
from lit_accel.resizing import ResizableMixin
from lit_accel.run_length import length_of_run
from lit_accel.schedules import num_steps_of
from lit_accel.tasks.optimization import weight_decay_groups
from lit_accel.warmup_decay import WarmupDecay


class TransformerTask(ResizableMixin, LightningModule):
    """A LightningModule with one transformer, the attribute ``model``, that may change its size in mid-training.

    Args:
        optimizer: Makes the optimizer from parameter groups.
        lr_scheduler: Makes a scheduler from the optimizer, stepped every optimizer step (Lightning's
            ``ReduceLROnPlateau``: at the end of each epoch). ``None`` keeps the learning rate constant.
        weight_decay: Decay of the parameters that decay, see :func:`~lit_accel.tasks.weight_decay_groups`; ``None``
            leaves it to the optimizer's own argument.
        compile_blocks: Whether to ``torch.compile`` each block of the transformer. Needs a registered anatomy.

    Raises:
        ValueError: If ``weight_decay`` is negative.
    """

    model: nn.Module

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        weight_decay: float | None,
        compile_blocks: bool,
    ) -> None:
        super().__init__()
        if weight_decay is not None:
            require_number("weight_decay", weight_decay, 0, what="a number, at least 0, or None")
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._weight_decay = weight_decay
        self._compile_blocks = compile_blocks

    @abstractmethod
    def check_batch(self, batch: Any) -> None:
        """Refuse a batch that the task cannot learn from.

        Raises:
            TypeError: If it is one.
        """

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check the batch."""
        self.check_batch(batch)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the batch: the first that a run sees is one of validation."""
        self.check_batch(batch)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the batch."""
        self.check_batch(batch)

    def configure_model(self) -> None:
        """Compile the blocks, if that was asked for."""
        if self._compile_blocks:
            from lit_accel.anatomy import compile_blocks

            compile_blocks(self.model)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer over the present parameters, and its scheduler.

        It keeps nothing: after the model was resized, it is called again for the new parameters.
        """
        with _explained("optimizer"):
            optimizer = self._optimizer(weight_decay_groups(self, self._weight_decay))
        for group in optimizer.param_groups:
            if not math.isfinite(group["lr"]):
                raise ValueError(f"The learning rate is {float(group['lr'])}; it is a number, at least 0.")
        if self._lr_scheduler is None:
            return optimizer
        with _explained("lr_scheduler"):
            scheduler = self._lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor},
            }
        if isinstance(scheduler, WarmupDecay) and scheduler.needs_total:
            num_steps = length_of_run(self.trainer, type(scheduler).__name__, ", or give it num_total_steps")
            if num_steps_of(scheduler.num_warmup_steps, num_steps) > num_steps:
                rank_zero_warn(
                    f"The learning rate warms up for {scheduler.num_warmup_steps} optimizer steps, and the run has "
                    f"{num_steps}: it never reaches its peak. Shorten num_warmup_steps, or give a share of the run "
                    "such as 0.05."
                )
            scheduler.bind(num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@contextmanager
def _explained(argument: str) -> Iterator[None]:
    """Say which argument it is that torch refuses."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{argument} cannot be made from its settings: {error}. Change them.") from error
