"""Dynamic sparse training of one model, step by step; works in any training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_accel.compute.active import set_active
from lit_accel.draws import generator
from lit_accel.methods.mixed_sparsity.sparse_model import Execution, Masks, SparseModel
from lit_accel.methods.mixed_sparsity.targets import Counts, Targets
from lit_accel.methods.mixed_sparsity.topology import Change, updated

_STREAM = 8  # of the draws, beside those of data and other methods


class DynamicSparsity:
    """Switches the units of a model on and off as a schedule says.

    In each optimizer step call :meth:`begin_step` before the first forward pass, :meth:`after_backward` before
    gradients are clipped and used, and :meth:`after_step` after the optimizer's step; :meth:`close` at the end.

    Args:
        transformer: The model, whole.
        targets: The schedule on its units.
        execution: Whether units that are off are taken out of the model or masked.
        seed: Seed of the draws.
        state: What :meth:`to_state` returned, to go on from there.
    """

    def __init__(
        self,
        transformer: nn.Module,
        targets: Targets,
        execution: Execution = "compact",
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.targets, self.seed = targets, seed
        masks = None if state is None else state["masks"]
        self.model = SparseModel(transformer, targets.anatomy, targets.spaces, execution, masks)
        self.num_replaced = 0 if state is None else int(state["num_replaced"])
        """Units that updates have dropped and others that they have grown in their place, so far."""
        self._last_event = -1 if state is None else int(state["last_event"])
        self._changes: dict[str, Change] | None = None
        self._step = 0
        self._undo_pattern: Callable[[], None] | None = None
        self._told: tuple[Any, ...] | None = None

    @property
    def masks(self) -> Masks:
        """Which units are on, by the name of their space; each of shape (groups, units)."""
        return self.model.masks

    @property
    def counts(self) -> Counts:
        """How many units of a group are on, by the name of their space."""
        return self.model.counts

    @property
    def digest(self) -> int:
        """A number of 62 bits that stands for the masks: the same on all ranks and in every repetition of a run."""
        return digest_of(self.masks)

    @property
    def follows_pattern(self) -> bool:
        """Whether attention follows the pattern."""
        return self._undo_pattern is not None

    def begin_step(self, step: int, optimizers: Sequence[Optimizer]) -> bool:
        """Make the model what it is to be in this step's forward and backward passes.

        Where units are to be chosen by gradient, it is whole in this step. Calling it again for the same step, for
        another micro-batch, changes nothing.

        Args:
            step: Optimizer steps done before.
            optimizers: The model's optimizers.

        Returns:
            Whether the topology has changed.
        """
        if not self.model.is_compact:
            self.model.optimizers = list(optimizers)
        self._step, self._changes = step, None
        has_changed = False
        before = self.counts
        # Where nothing was loaded, a run may be in mid-schedule with all its units on.
        if self._last_event != step and (self.targets.schedule.is_event(step) or before != self.targets.counts(step)):
            changes = self.targets.changes(step, before)
            self.model.expand()
            if self.targets.needs_gradient(changes):
                self._changes = changes
            else:
                self._change(changes, None)
                has_changed = True
        if self._changes is None:
            self.model.compact()
        self._attend(step)
        self._tell()
        return has_changed

    def after_backward(self) -> bool:
        """Choose units by the gradients, if it is time, and clear the gradients of what is off.

        Returns:
            Whether the topology has changed.
        """
        has_changed = self._changes is not None
        if self._changes is not None:
            self._change(self._changes, self.model.gradients())
            self._changes = None
            # Now and not before the next step: what is off must not see the optimizer.
            self.model.compact()
            self._tell()
        self.model.mask_gradients()
        return has_changed

    def after_step(self) -> None:
        """Hold what is off where it was."""
        self.model.hold_off()

    def close(self) -> None:
        """Leave the whole model behind."""
        self._attend_densely()
        self.model.expand()
        set_active(self.model.transformer, None)
        self._told = None

    def to_state(self) -> dict[str, Any]:
        """Return the masks, and what else a resumed run must know, as tensors and primitives."""
        return {
            "masks": {name: mask.cpu() for name, mask in self.masks.items()},
            "last_event": self._last_event,
            "num_replaced": self.num_replaced,
        }

    def _tell(self) -> None:
        """Say what of the model its calls are charged for."""
        if not self.targets.ever_sparse and self.targets.pattern is None:
            return
        key = (self.targets.schedule.stage(self._step), self.follows_pattern, self._changes is None, self._last_event)
        if key != self._told:
            self._told = key
            active = self.targets.active(self._step, self.counts, with_dense_gradients=self._changes is not None)
            set_active(self.model.transformer, active)

    def _change(self, changes: Mapping[str, Change], gradients: Mapping[str, Tensor | None] | None) -> None:
        magnitudes = self.model.magnitudes()
        masks = {}
        for index, (name, change) in enumerate(changes.items()):
            old = self.masks[name]
            draws = generator(self.seed, self._step, index, _STREAM)
            gradient = None if gradients is None else gradients[name]
            masks[name] = updated(old, change, magnitudes[name], gradient, self.targets.gradient_share, draws)
            self.num_replaced += min(change.num_dropped, change.num_grown) * len(old)
        self.model.set_masks(masks)
        self._last_event = self._step

    def _attend(self, step: int) -> None:
        if not self.targets.attends_by_pattern(step):
            self._attend_densely()
        elif self._undo_pattern is None:
            assert self.targets.pattern is not None
            assert self.targets.anatomy.attend is not None
            self._undo_pattern = self.targets.anatomy.attend(self.model.transformer, self.targets.pattern)

    def _attend_densely(self) -> None:
        if self._undo_pattern is not None:
            self._undo_pattern()
            self._undo_pattern = None


def digest_of(masks: Mapping[str, Tensor]) -> int:
    """Return a number of 62 bits that stands for masks.

    Args:
        masks: Which units are on, by the name of their space.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, mask in masks.items():
        digest.update(name.encode())
        digest.update(mask.cpu().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 2
