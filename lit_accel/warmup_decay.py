"""A learning-rate scheduler that can be written in YAML before the length of the run is known."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_accel.schedules import Decay, decay_factor, num_steps_of, warmup_decay_factor

# A name of our own: Schedule-Free optimizers have a scheduled_lr.
SCHEDULED_LR = "lit_accel_scheduled_lr"
"""Where a parameter group holds the schedule's own learning rate while what it trains with is a multiple of that."""


class WarmupDecay(LRScheduler):
    """Linear warm-up, then decay to zero at the end of the run.

    The learning rate is a closed form of the number of steps taken, so it is exact after a resume. Step it
    once an optimizer step. The curve itself is configuration and not state: a checkpoint restores how far the
    run is, and a run resumed with another length follows the curve of its new length.

    Args:
        optimizer: The optimizer whose groups' learning rates are the peak.
        num_warmup_steps: Optimizer steps (``int``) or share of the run (``float`` in [0, 1]) until the peak.
            Default: none.
        decay: ``"linear"`` or ``"cosine"`` to zero at ``num_total_steps``, or ``"constant"``. Default:
            ``"linear"``.
        num_total_steps: Length of the run in optimizer steps. ``None``, the default, leaves it open: the
            tasks of this package then :meth:`bind` it to the Trainer's.

    Raises:
        ValueError: If ``num_warmup_steps`` is negative or a share above 1, or ``decay`` is unknown.
        RuntimeError: If it is stepped while the length of the run is needed and still open.

    Example::

        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = WarmupDecay(optimizer, num_warmup_steps=0.5, num_total_steps=4)
        >>> scheduler.get_last_lr()
        [0.5]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_warmup_steps: int | float = 0,
        decay: Decay = "linear",
        num_total_steps: int | None = None,
    ) -> None:
        # Refuse bad arguments here, not when the warm-up ends.
        num_steps_of(num_warmup_steps, num_total_steps=1)
        decay_factor(1.0, decay)
        self.num_warmup_steps = num_warmup_steps
        self.decay = decay
        self.num_total_steps = num_total_steps
        super().__init__(optimizer)

    @property
    def needs_total(self) -> bool:
        """Whether the curve depends on a length of the run that is not known yet."""
        ends = self.decay != "constant" or isinstance(self.num_warmup_steps, float)
        return ends and self.num_total_steps is None

    def bind(self, num_total_steps: int) -> None:
        """Tell the length of the run, and set the learning rate of the present step by it.

        Args:
            num_total_steps: Length of the run in optimizer steps.
        """
        self.num_total_steps = num_total_steps
        self._set_closed_form()

    def get_lr(self) -> list[float | Tensor]:
        """Compute the learning rate of each parameter group at the present step."""
        if self.needs_total:
            if self.last_epoch > 0:
                raise RuntimeError(
                    f"{type(self).__name__} does not know the length of the run: pass num_total_steps=..., or call "
                    "scheduler.bind(trainer.estimated_stepping_batches) before training, as the tasks of lit_accel do "
                    "(and RandomLTD, for a LayerTokenLR)."
                )
            # Until it is bound, nothing must be learnt at a wrong rate.
            return [0.0 * base_lr for base_lr in self.base_lrs]
        return self._closed_form()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the run, as primitives; the curve is configuration and left out."""
        configuration = ("num_warmup_steps", "decay", "num_total_steps")
        return {key: value for key, value in super().state_dict().items() if key not in configuration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a position in the run, and set the learning rate that the curve of now has there."""
        super().load_state_dict(state_dict)
        if not self.needs_total:
            self._set_closed_form()

    def _set_closed_form(self) -> None:
        learning_rates = self._closed_form()
        for group, learning_rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            name = SCHEDULED_LR if SCHEDULED_LR in group else "lr"
            if isinstance(group[name], Tensor):
                group[name].fill_(learning_rate)
            else:
                group[name] = learning_rate
        self._last_lr = learning_rates

    def _closed_form(self) -> list[float | Tensor]:
        num_total_steps = self.num_total_steps or 0
        factor = warmup_decay_factor(
            self.last_epoch,
            num_warmup_steps=num_steps_of(self.num_warmup_steps, num_total_steps),
            num_total_steps=num_total_steps,
            decay=self.decay,
        )
        return [base_lr * factor for base_lr in self.base_lrs]
