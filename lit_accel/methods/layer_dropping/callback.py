"""What both kinds of layer dropping share as Lightning callbacks: who runs this step, and the books about it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, get_args

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lit_accel.anatomy import Anatomy, TransformerFollower, anatomy_of, find_transformer
from lit_accel.arguments import require_indices, require_one_of, require_whole
from lit_accel.compute.flops import training_flops
from lit_accel.compute.observer import TransformerObserver
from lit_accel.methods.layer_dropping.books import Tally
from lit_accel.methods.layer_dropping.dropper import BlockDropper, Scale
from lit_accel.methods.layer_dropping.refusals import (
    check_optimizers,
    check_scale,
    check_sublayers,
    droppable_blocks,
    why_calls_are_not_seen,
)
from lit_accel.methods.layer_dropping.sampling import Sampler, sample_blocks
from lit_accel.methods.method import Method
from lit_accel.methods.preparation import prepare_run
from lit_accel.methods.requirements import (
    DROP_LESS,
    check_compilation,
    check_levels,
    check_rules,
    digest_of,
    require_counted_steps,
    require_equal_on_ranks,
    require_training_mode,
)
from lit_accel.methods.strategy_checks import check_strategy
from lit_accel.resizing import begin_anew, ensure_built, full_size
from lit_accel.routing import routing_of
from lit_accel.run_length import length_of_run
from lit_accel.stored_state import primitives, require_readable

_STATE_VERSION = 1


class LayerDropping(Method):
    """Base of the callbacks that skip blocks in training: subclasses say with which probability each is kept.

    One mask holds for a whole optimizer step, on all micro-batches and ranks. It is drawn from the seed, the
    step and the probabilities so far.

    Args:
        pinned: Indices of blocks that always run; negative ones count from the last.
        sampler: See :func:`~lit_accel.methods.layer_dropping.sample_blocks`.
        scale: See :class:`~lit_accel.methods.layer_dropping.BlockDropper`.
        seed: Seed of the draws.
        check_ranks_every: With several processes, after how many optimizer steps they compare their masks.

    Raises:
        ValueError: If an argument is none of the allowed values.
    """

    decides = "layers"
    leaves_parameters_unused = True

    def __init__(
        self, *, pinned: Sequence[int], sampler: Sampler, scale: Scale, seed: int, check_ranks_every: int
    ) -> None:
        require_one_of("sampler", sampler, get_args(Sampler))
        require_one_of("scale", scale, get_args(Scale))
        require_whole("check_ranks_every", check_ranks_every, 1, of="steps")
        require_whole("seed", seed)
        require_indices("pinned", pinned)
        self.pinned = list(pinned)
        self.sampler: Sampler = sampler
        self.scale: Scale = scale
        self.seed = seed
        self.check_ranks_every = check_ranks_every
        self.anatomy: Anatomy | None = None
        self._full: Anatomy | None = None
        self.units: list[int] = []
        """Indices of the blocks that may be dropped."""
        self.keep: list[bool] = []
        """Whether each block runs in the present step."""
        self.keep_probabilities: list[float] = []
        """With which probability each block was to run in it."""
        self.num_steps: int | None = None
        self._clear()

    def _clear(self) -> None:
        self.total = Tally()
        self._window = Tally()
        self._step: int | None = None
        self._num_expected = 0.0
        self._num_tokens: int | None = None
        self._dropper: BlockDropper | None = None
        self._follower: TransformerFollower | None = None
        self._observer: TransformerObserver | None = None
        self._has_compared = False
        self._was_called = False
        self._has_warned_of_calls = False
        self._had_cache = False
        self._costs: tuple[int, ...] | None = None
        self._num_loaded_blocks = 0
        self._loaded_rules: dict[str, Any] = {}

    # What subclasses say

    @property
    @abstractmethod
    def drops(self) -> bool:
        """Whether any block is ever dropped."""

    @property
    @abstractmethod
    def needs_length(self) -> bool:
        """Whether the schedule depends on the length of the run."""

    @abstractmethod
    def probabilities(self, step: int) -> list[float]:
        """Return the keep probability of each block at an optimizer step."""

    def check_level(self, anatomy: Anatomy) -> None:
        """Check that blocks of a model of some size can be dropped.

        Raises:
            MisconfigurationException: If not.
        """
        droppable_blocks(anatomy, self.pinned, type(self).__name__)

    @abstractmethod
    def plan_blocks(self, anatomy: Anatomy, num_tokens: int) -> Callable[[int], Sequence[float]]:
        """Return what says the same for a model of any size, as far as it can be known before training.

        Args:
            anatomy: The model.
            num_tokens: Tokens of a sequence.
        """

    def planned_draws(self) -> Callable[[int, Sequence[float]], tuple[bool, ...]] | None:
        """Return what draws the blocks that will run, called with each step in order and its keep probabilities.

        ``None`` where that cannot be known before training.
        """
        if self.measures_blocks:
            return None
        num_expected = 0.0

        def draw(step: int, keep_probabilities: Sequence[float]) -> tuple[bool, ...]:
            nonlocal num_expected
            keep = sample_blocks(
                keep_probabilities, seed=self.seed, step=step, sampler=self.sampler, num_expected=num_expected
            )
            num_expected += math.fsum(keep_probabilities)
            return tuple(keep)

        return draw

    @property
    def is_neutral(self) -> bool:
        """Whether no block is ever dropped."""
        return not self.drops

    @property
    def is_planned(self) -> bool:
        """Whether the length of the run is known, where it matters."""
        return self.num_steps is not None or not self.needs_length

    def plan(self, trainer: L.Trainer) -> None:
        """Take up the length of the run, ``self.num_steps``, and refuse a schedule that does not fit it."""

    def metrics(self) -> dict[str, float]:
        """Return what else is to be logged."""
        return {}

    # Before training

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse whatever could not work, before anything is trained."""
        if stage != "fit":
            return
        name = type(self).__name__
        if not self.is_neutral:
            # Before the model is built under a strategy that would hide it.
            check_strategy(trainer, self)
        ensure_built(trainer, pl_module)
        transformer = find_transformer(pl_module)[1]
        anatomy = anatomy_of(transformer)
        if trainer.global_step == 0:
            self._clear()
        # First: a model that is to grow is only now known to be a small one.
        self._coordinator = prepare_run(trainer)
        self._full = full = anatomy.at(full_size(pl_module))
        self._take(anatomy)
        if self.drops:
            check_scale(anatomy, self.scale, name)
            check_compilation(pl_module, transformer, anatomy, name)
            check_sublayers(transformer, anatomy, self.scale, name)
            check_levels(trainer, full, self.check_level, DROP_LESS, self._coordinator.drops_at)
        self.num_steps = None
        # A module that makes its data in its own setup has none yet.
        if not self.needs_length or trainer.max_epochs == -1 or not trainer.fit_loop._data_source.is_module():
            self.resolve(trainer, pl_module)

    def _take(self, anatomy: Anatomy) -> None:
        self.anatomy, self._costs = anatomy, None
        self.units = self._units_of(anatomy)

    def _units_of(self, anatomy: Anatomy) -> list[int]:
        drops = self.drops and self._coordinator.drops_from(anatomy)
        return droppable_blocks(anatomy, self.pinned, type(self).__name__) if drops else []

    def resolve(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the length of the run, and refuse what does not fit it."""
        if self.needs_length:
            self.num_steps = length_of_run(trainer, type(self).__name__)
        self.plan(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plan for data that the module has made by now."""
        if self.needs_length and self.num_steps is None:
            self.resolve(trainer, pl_module)
        if self.needs_length and self.drops:
            require_counted_steps(trainer, type(self).__name__)
        if self.drops:
            check_optimizers(trainer.optimizers, type(self).__name__)
        self._coordinator.check_run(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Intercept the blocks; warn if rules have changed since the checkpoint was written."""
        check_rules(trainer, self._rules(), self._loaded_rules, "layer dropping")
        self._loaded_rules = {}
        if not self.drops:
            return
        transformer = find_transformer(pl_module)[1]
        anatomy = anatomy_of(transformer)
        begin_anew(trainer, pl_module)
        self._full = anatomy.at(full_size(pl_module))
        # Only now: a model that changes its size has the size that the checkpoint was written at.
        if self._num_loaded_blocks not in (0, len(anatomy.blocks)):
            raise MisconfigurationException(
                f"The checkpoint dropped layers of a model with {self._num_loaded_blocks} blocks; this one has "
                f"{len(anatomy.blocks)}. Resume with the model that was trained."
            )
        self._num_loaded_blocks = 0
        require_training_mode(transformer, anatomy, type(self).__name__)
        self._follower = TransformerFollower(pl_module, self._follow)
        self._observer = TransformerObserver(pl_module, self._on_forward)

    def _follow(self, transformer: nn.Module) -> None:
        was_active = self._dropper is not None and self._dropper.is_active
        if self._dropper is not None:
            self._dropper.close()
        anatomy = anatomy_of(transformer)
        before = self.anatomy
        if before is None or anatomy.size != before.size:
            self._take(anatomy)
            if before is not None and self._dropper is not None:
                self._on_resized(before, anatomy)
        self._dropper = BlockDropper(routing_of(transformer), self.scale)
        if self._step is not None and was_active:
            # Replaced after this step's mask was drawn.
            self._draw(self._step)
            self._dropper.is_active = True
        elif len(self.keep) == len(anatomy.blocks):
            # Resumed in the middle of a step: what was measured since it began is for the next one.
            self._dropper.set(self.keep, self.keep_probabilities)

    def _on_resized(self, before: Anatomy, after: Anatomy) -> None:
        """Carry what is known of blocks over to a model of another size."""

    def _on_forward(self, anatomy: Anatomy, transformer: nn.Module, num_sequences: int, num_tokens: int) -> None:
        self._was_called = True
        if num_tokens != self._num_tokens:
            self._num_tokens, self._costs = num_tokens, None
        if self._full is not None and torch.is_grad_enabled():
            self._coordinator.on_first_call(self._full, num_sequences, num_tokens)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the model as it was; Lightning does not call ``teardown`` then."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        for part in (self._dropper, self._follower, self._observer):
            if part is not None:
                part.close()
        self._dropper = self._follower = self._observer = None

    # During training

    def decision(self) -> object:
        """Return which blocks run."""
        return self.keep

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw the blocks of a new optimizer step."""
        if self._dropper is None or self._follower is None:
            return
        self._follower.refresh()
        step = trainer.global_step
        if step != self._step or not self.keep:
            if self._step is not None and step > self._step:
                self._num_expected += math.fsum(self.keep_probabilities)
            self._step = step
            self._draw(step)
            self._compare(trainer)
            self._had_cache = False
        self._was_called = self._dropper.was_called = self._dropper.routing.has_seen_cache = False
        self._dropper.is_active = True

    def _draw(self, step: int) -> None:
        assert self._dropper is not None
        runs_all = self._coordinator.runs_all_blocks(step)
        self.keep_probabilities = [1.0] * len(self._dropper.routing.blocks) if runs_all else self.probabilities(step)
        self.keep = sample_blocks(
            self.keep_probabilities, seed=self.seed, step=step, sampler=self.sampler, num_expected=self._num_expected
        )
        self._dropper.set(self.keep, self.keep_probabilities)

    def _compare(self, trainer: L.Trainer) -> None:
        # Equal probabilities on every rank: so all come here or none.
        drops_now = any(p < 1 for p in self.keep_probabilities)
        if trainer.global_step % self.check_ranks_every == 0 or (drops_now and not self._has_compared):
            self._has_compared |= drops_now
            # With the rules: with different seeds, masks are often equal while little is dropped.
            require_equal_on_ranks(trainer, digest_of((self.keep, self._rules())), "the dropped layers")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """See that what was dropped has no gradient: it has run, or one of an earlier step is still there."""
        if self._dropper is None or all(self.keep):
            return
        for keep, module in zip(self.keep, self._dropper.routing.modules, strict=True):
            for name, parameter in () if keep else module.named_parameters():
                if parameter.grad is not None:
                    if self._had_cache or self._dropper.routing.has_seen_cache:
                        raise MisconfigurationException(
                            f"{type(self).__name__}: the model was called with a cache (use_cache=True or "
                            f"past_key_values) in training step {trainer.global_step}. A dropped block would leave a "
                            "hole in it, so all blocks ran, and nothing was saved. Leave both arguments out: in "
                            "training no cache is filled then."
                        )
                    raise RuntimeError(
                        f"{name} of a block that was dropped in step {trainer.global_step} has a gradient, which the "
                        "optimizer would apply. Clear gradients with zero_grad(set_to_none=True), the default; call "
                        "blocks as block(...) and not as block.forward(...), which cannot be intercepted; and let the "
                        "loss depend on parameters through the model only."
                    )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let everything run again, for what is not training; where a step is complete, keep the books."""
        if self._dropper is None:
            return
        self._dropper.is_active = False
        # Decoders fill one while nothing is dropped; with it no handler sees the blocks.
        has_cache = self._dropper.routing.has_seen_cache
        self._had_cache |= has_cache
        have_run = self._dropper.was_called or has_cache
        if have_run and not self._was_called:
            self._on_unseen_call()
        if self._step is None or trainer.global_step == self._step:
            return
        costs = self.costs()
        for tally in (self.total, self._window):
            tally.add(costs, self.keep, self.keep_probabilities)
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and trainer.global_step // interval > self._step // interval:
            self._log(trainer)
            self._window = Tally()

    def _on_unseen_call(self) -> None:
        """Say that blocks ran in a batch in which the model was not called."""
        if not self._has_warned_of_calls:
            self._has_warned_of_calls = True
            rank_zero_warn(
                why_calls_are_not_seen(
                    type(self).__name__, "Blocks are dropped, but the FLOPs of such calls are not counted."
                )
            )

    def costs(self) -> tuple[int, ...]:
        """Return the training FLOPs of each block, on one sequence of the last batch's length."""
        assert self.anatomy is not None
        if self._num_tokens is None:
            return (1,) * len(self.anatomy.blocks)
        if self._costs is None:
            self._costs = training_flops(self.anatomy, 1, self._num_tokens).blocks
        return self._costs

    def _log(self, trainer: L.Trainer) -> None:
        metrics = {
            "layer_dropping/kept_blocks": self._window.kept_blocks / self._window.steps,
            "layer_dropping/kept_flops": self._window.kept_share,
            "layer_dropping/planned_flops": self._window.planned_share,
            **{f"layer_dropping/keep_probability/{index:02d}": p for index, p in enumerate(self.keep_probabilities)},
            **self.metrics(),
        }
        # Not self.log: so many metrics of each step would cost time, and none is to be averaged.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return where the draws stand, and the books."""
        return primitives(
            {
                "version": _STATE_VERSION,
                "num_blocks": 0 if self.anatomy is None else len(self.anatomy.blocks),
                "step": self._step,
                "num_expected": self._num_expected,
                "keep": list(self.keep),
                "keep_probabilities": list(self.keep_probabilities),
                "num_tokens": self._num_tokens,
                "rules": self._rules(),
                "total": self.total.to_state(),
                "window": self._window.to_state(),
            }
        )

    def _rules(self) -> dict[str, Any]:
        rules = {"sampler": self.sampler, "scale": self.scale, "seed": self.seed, "pinned": self.pinned}
        # Shares of the run and rates by its length are other ones in a run of another length. Checkpoints of earlier
        # versions do not say it, and nothing is compared.
        return {**rules, "num_steps": self.num_steps} if self.needs_length and self.num_steps is not None else rules

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the draws stood, and the rules for comparison.

        Raises:
            MisconfigurationException: If a newer version wrote the checkpoint, or it is damaged.
        """
        require_readable(state_dict, self.state_dict(), "layer dropping")
        self._loaded_rules = dict(state_dict["rules"])
        self._num_loaded_blocks = state_dict["num_blocks"]
        self._step = state_dict["step"]
        self._num_expected = state_dict["num_expected"]
        self._num_tokens = state_dict["num_tokens"]
        self.keep_probabilities = list(state_dict["keep_probabilities"])
        self.keep = list(state_dict["keep"])
        self.total, self._window = Tally(**state_dict["total"]), Tally(**state_dict["window"])
