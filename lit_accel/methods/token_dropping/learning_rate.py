"""The LayerToken learning rate: warm-up and decay that follow the tokens that blocks have seen, and not the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lit_accel.schedules import decay_factor, num_steps_of
from lit_accel.warmup_decay import WarmupDecay


class LayerTokenLR(WarmupDecay):
    """Linear warm-up, then decay to zero, keyed on layer tokens (Yao et al., arXiv 2211.11586).

    While tokens are dropped, a step advances the schedule by less than a step: by the share of its *layer tokens*, the
    tokens that each block runs on summed over the blocks, in those of a dense step. So the rate is higher for longer
    than by steps, and warm-up takes more of them. A :class:`~lit_accel.RandomLTD` callback tells how far each step
    gets; without one, and where it drops nothing, every step counts the same, and this is
    :class:`~lit_accel.tasks.WarmupDecay`, bit by bit.

    How far the run is follows from the number of steps alone: exact after a resume, and the same on every rank. It is
    what the schedule plans for sequences of one length; batches that are shorter do not change it.

    Deviation from the released scripts (Megatron-DeepSpeed): their count of tokens is rounded down at each step, ours
    is exact.

    Args:
        optimizer: The optimizer whose groups' learning rates are the peak.
        num_warmup_steps: Warm-up, in dense steps of as many layer tokens (``int``), or in a share of the layer tokens
            of the run (``float`` in [0, 1]). Default: none.
        decay: ``"linear"`` or ``"cosine"`` to zero at the end of the run, or ``"constant"``. Default: ``"linear"``.
        num_total_steps: Length of the run in optimizer steps, where no callback says it.

    Raises:
        ValueError: If ``num_warmup_steps`` is negative or a share above 1, or ``decay`` is unknown.
        RuntimeError: If it is stepped while the length of the run is needed and still open.

    Example::

        model:
          init_args:
            lr_scheduler:
              class_path: lit_accel.LayerTokenLR
              init_args: {num_warmup_steps: 0.05, decay: cosine}
    """

    progress: Sequence[float] | None = None
    """How far the run is before each step and at its end, in dense steps; ``None`` until it was told."""

    def follow(self, progress: Sequence[float]) -> None:
        """Tell how far each step gets, and set the learning rate of the present step by it.

        Args:
            progress: One number a step, and one for the end of the run: how many dense steps' layer tokens came before.
        """
        self.progress = progress
        self.bind(len(progress) - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the run, as primitives; the curve is configuration and left out."""
        return {key: value for key, value in super().state_dict().items() if key != "progress"}

    def _closed_form(self) -> list[float | Tensor]:
        if self.progress is None:
            return super()._closed_form()
        factor = self._factor(self.progress)
        return [base_lr * factor for base_lr in self.base_lrs]

    def _factor(self, progress: Sequence[float]) -> float:
        total, num_steps = progress[-1], len(progress) - 1
        if self.last_epoch >= num_steps and self.decay != "constant":
            return 0.0
        # A share is rounded to whole dense steps, as it is in a dense run.
        warmup = num_steps_of(self.num_warmup_steps, round(total))
        step = min(self.last_epoch, num_steps)
        before = progress[step]
        if before < warmup:
            # What this step adds counts: the first one is not wasted on a rate of zero.
            after = progress[min(step + 1, num_steps)]
            return min(1.0, after / warmup)
        if self.decay == "constant":
            return 1.0
        return decay_factor((total - before) / (total - warmup), self.decay)
