"""What all tasks have in common: an optimizer that is made anew after a resize, its schedule, compiled blocks."""

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lit_accel.resizing import ResizableMixin
from lit_accel.tasks.optimization import weight_decay_groups
from lit_accel.warmup_decay import WarmupDecay


class TransformerTask(ResizableMixin, LightningModule):
    """A LightningModule with one transformer, the attribute ``model``, that may change its size in mid-training.

    Args:
        optimizer: Makes the optimizer from parameter groups.
        lr_scheduler: Makes a scheduler from the optimizer, stepped every optimizer step (Lightning's
            ``ReduceLROnPlateau``: after validation). ``None`` keeps the learning rate constant.
        weight_decay: Decay of the parameters that decay, see :func:`~lit_accel.tasks.weight_decay_groups`; ``None``
            leaves it to the optimizer's own argument.
        compile_blocks: Whether to ``torch.compile`` each block of the transformer. Needs a registered anatomy.
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
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._weight_decay = weight_decay
        self._compile_blocks = compile_blocks

    def configure_model(self) -> None:
        """Compile the blocks, if that was asked for."""
        if self._compile_blocks:
            from lit_accel.anatomy import compile_blocks

            compile_blocks(self.model)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer over the present parameters, and its scheduler.

        It keeps nothing: after the model was resized, it is called again for the new parameters.
        """
        optimizer = self._optimizer(weight_decay_groups(self, self._weight_decay))
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor},
            }
        if isinstance(scheduler, WarmupDecay) and scheduler.needs_total:
            scheduler.bind(self._num_total_steps(type(scheduler).__name__))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _num_total_steps(self, scheduler: str) -> int:
        num_total_steps = self.trainer.estimated_stepping_batches
        if num_total_steps == float("inf"):
            raise ValueError(
                f"{scheduler} has to know when the run ends: set trainer.max_steps or trainer.max_epochs, "
                "or give it num_total_steps."
            )
        return int(num_total_steps)
