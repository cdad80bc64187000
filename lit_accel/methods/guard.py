"""Watches a run whose model is changed: its numbers stay finite, and its ranks decide alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_accel.checkpoints import local_path, resume_after_saved_step
from lit_accel.methods.coordinator import coordinator_of
from lit_accel.methods.requirements import digest_of, require_equal_on_ranks
from lit_accel.resizing import rebuild_recorded_size
from lit_accel.run_folder import run_folder
from lit_accel.stored_state import chosen_options, say_what_is_ignored

CHECKPOINT_NAME = "before_transition.ckpt"


class NonFiniteError(RuntimeError):
    """A loss or a gradient that is not finite, right after the model was changed."""


class TrainingGuard(L.Callback):
    """Stops a run whose loss or gradients are no longer finite right after a method has changed the model.

    A *transition* is what methods themselves call one: a change of size, other units switched on, the first step in
    which blocks or tokens may be dropped again, where :class:`~lit_accel.Composition` has held that back. In the steps
    after it, losses and gradients are looked at before the optimizer applies them; where one is not finite on any rank,
    all ranks stop with a :class:`NonFiniteError` that says what the transition was. The weights are those before the
    step.

    With several processes, they also compare from time to time what their methods have decided, so that ranks that have
    come apart stop with an error and do not wait for each other.

    A run with a method has one by itself, with the defaults. Under fp16 with a gradient scaler gradients are left to
    the scaler, which skips steps that overflow.

    Args:
        num_steps: Optimizer steps after a transition in which losses and gradients are looked at; 0 for none.
        roll_back: Whether to write a checkpoint before each transition but one at the first step of a fit, in the place
            of the one before, and to put its weights back into the module when the run is stopped. Resume from it with
            other settings.
        folder: Where that checkpoint goes, ``before_transition.ckpt``. Default: the logger's folder, or
            ``Trainer.default_root_dir``.
        check_ranks_every: With several processes, after how many optimizer steps they compare what was decided.

    Raises:
        ValueError: If an argument is none of the allowed values.

    Example::

        Trainer(strategy="resizable", callbacks=[MultiLevelTraining(), TrainingGuard(roll_back=True)])
    """

    def __init__(
        self, num_steps: int = 10, roll_back: bool = False, folder: str | None = None, check_ranks_every: int = 100
    ) -> None:
        for name, value, least in (("num_steps", num_steps, 0), ("check_ranks_every", check_ranks_every, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it is a number of optimizer steps, at least {least}.")
        if folder is not None and not roll_back:
            rank_zero_warn("folder is ignored: it is for the checkpoints of roll_back, which is False.")
        self.num_steps = num_steps
        self.roll_back = roll_back
        self.folder = folder
        self.check_ranks_every = check_ranks_every
        self._clear()

    def _clear(self) -> None:
        self._step = -1
        self._transition: tuple[int, str] | None = None
        self._losses: list[Tensor] = []
        self._last_losses: list[Tensor] = []
        self._losses_before: list[Tensor] = []
        self._saved: Path | None = None
        self._options: list[dict[str, Any]] = []

    @property
    def _is_watching(self) -> bool:
        return self._transition is not None and self._step < self._transition[0] + self.num_steps

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take note of how the optimizers were configured, before a checkpoint's state takes the place of that."""
        self._clear()
        if self.roll_back:
            local_path(self.folder or run_folder(trainer))
        self._options = chosen_options(trainer.optimizers)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what a checkpoint has changed without a word, and what of an unfinished step is not in it."""
        resume_after_saved_step(trainer)
        say_what_is_ignored(self._options, chosen_options(trainer.optimizers))
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress
        partial = batches.current.processed % trainer.accumulate_grad_batches
        if partial and not batches.is_last_batch:
            rank_zero_warn(
                f"The checkpoint was written in the middle of optimizer step {trainer.global_step}: the gradients of "
                f"{partial} of its {trainer.accumulate_grad_batches} micro-batches are lost, and this step will not be "
                "what it would have been. Write checkpoints every n steps (every_n_train_steps) to resume exactly."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take note of a transition; compare ranks."""
        step = trainer.global_step
        if step == self._step:
            return
        self._step, self._losses = step, []
        coordinator = coordinator_of(trainer)
        if changes := coordinator.transitions(step):
            self._transition = step, "; ".join(changes)
            self._losses_before = self._last_losses
        if step % self.check_ranks_every == 0:
            decisions = (step, [(method.title, method.decision()) for method in coordinator.methods])
            require_equal_on_ranks(trainer, digest_of(decisions), "what their methods have decided")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Remember the losses of this step, one a micro-batch."""
        self._losses.append(_as_computed(trainer, loss.detach()))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Look at losses and gradients in the steps after a transition.

        Raises:
            NonFiniteError: If one is not finite, on all ranks.
        """
        if not self._is_watching:
            return
        losses = [loss for loss in self._losses if not loss.isfinite().all()]
        gradients = [] if _scaler(trainer) is not None else _non_finite(pl_module)
        # All ranks ask, each step of these: what is found on one of them stops all.
        if trainer.strategy.reduce_boolean_decision(not losses and not gradients, all=True):
            return
        raise NonFiniteError(self._report(trainer, losses, gradients))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint where the next step begins with a transition."""
        step = trainer.global_step
        if step == self._step:
            return
        if self._losses:
            self._last_losses = self._losses
        if self.roll_back and coordinator_of(trainer).transitions(step):
            folder = self.folder or run_folder(trainer)
            path = trainer.strategy.broadcast(local_path(folder)) / CHECKPOINT_NAME
            trainer.save_checkpoint(path)
            self._saved = path

    def put_back(self, pl_module: L.LightningModule) -> None:
        """Put the weights before the transition back, when everybody else has left the model as it was.

        Args:
            pl_module: The module of the run that was stopped.
        """
        if self._saved is None or any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
            return
        try:
            # This process wrote it, with whatever hyper-parameters the module has.
            checkpoint = torch.load(self._saved, map_location="cpu", weights_only=False)
            device = pl_module.device
            rebuild_recorded_size(pl_module, checkpoint)
            # Beside WeightAveraging the others are the average.
            weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
            pl_module.load_state_dict(weights, strict=pl_module.strict_loading)
        except Exception as error:
            # What has stopped the run is to be told, and not what came of that.
            rank_zero_warn(
                f"The module could not be given the weights of {self._saved} again, and is not to be used as it is: "
                f"{error}"
            )
            return
        pl_module.to(device)
        rank_zero_info(f"The module has the weights of step {checkpoint['global_step']} again.")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Hold no tensor of the run."""
        self._clear()

    def _report(self, trainer: L.Trainer, losses: list[Tensor], gradients: list[str]) -> str:
        assert self._transition is not None
        start, what = self._transition
        found = []
        if losses:
            found.append(f"the loss is {losses[0].flatten()[0].item()}")
        if gradients:
            more = f" and {len(gradients) - 3} more" if len(gradients) > 3 else ""
            found.append(f"gradients are not finite, of {', '.join(gradients[:3])}{more}")
        if not found:
            found.append("another rank has a loss or gradients that are not finite")
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = ", ".join(f"{rate:.3g}" for rate in sorted({float(group["lr"]) for group in groups}))
        before = ""
        if self._losses_before:
            loss = torch.stack([each.float().mean() for each in self._losses_before]).mean()
            before = f" Right before the transition the loss was {loss.item():.4g}"
            is_new = bool(loss.isfinite())
            before += "." if is_new else ": it is not what has caused this; look for the cause in earlier steps."
        saved = ""
        if self._saved is not None:
            saved = f" Resume from {self._saved}, which was written before the transition, with other settings."
        elif not self.roll_back:
            saved = " TrainingGuard(roll_back=True) writes a checkpoint before each transition."
        return (
            f"Step {self._step}: {' and '.join(found)}, after a transition at step {start}: {what}. The learning rate "
            f"is {rates}.{before} The optimizer has not applied this step.{saved}"
        )


class RollBack(L.Callback):
    """Does the roll-back of a :class:`TrainingGuard`, at the end of all callbacks.

    The guard stands before those that save. One that saves on exceptions would write the weights from before the
    transition, with the step, the optimizers and the methods from after it.

    Args:
        guard: The guard.
    """

    def __init__(self, guard: TrainingGuard) -> None:
        self._guard = guard

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Roll back where the guard has stopped the run."""
        if isinstance(exception, NonFiniteError):
            self._guard.put_back(pl_module)


def _scaler(trainer: L.Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _as_computed(trainer: L.Trainer, loss: Tensor) -> Tensor:
    """Undo what Lightning does to a loss before its backward: divided by the micro-batches, and scaled for fp16."""
    if (scaler := _scaler(trainer)) is not None:
        # The scale stays on the device: get_scale would wait for it, each micro-batch.
        loss = loss / scaler.scale(torch.ones((), device=loss.device))
    # In manual optimization Lightning divides nothing, and this is 1.
    return loss * trainer.accumulate_grad_batches


def _non_finite(module: torch.nn.Module) -> list[str]:
    """Return the names of parameters whose gradients are not finite; where all are, with one wait for the device."""
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    local = {name: grad.to_local() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    # The norm of what is finite may overflow: only then each is looked at.
    if torch.nn.utils.get_total_norm(list(local.values())).isfinite():
        return []
    return [name for name, grad in local.items() if not grad.isfinite().all()]
