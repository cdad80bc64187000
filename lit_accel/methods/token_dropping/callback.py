"""Random layerwise token dropping as a Lightning callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import is_grad_enabled, nn
from torch.optim import Optimizer

from lit_accel.anatomy import (
    Anatomy,
    TransformerFollower,
    anatomy_of,
    find_transformer,
    uses_activation_checkpointing,
)
from lit_accel.arguments import require_whole
from lit_accel.compute.observer import TransformerObserver
from lit_accel.compute.phases import sum_over_ranks
from lit_accel.data_parallel import data_rank
from lit_accel.methods.preparation import prepare_run
from lit_accel.methods.requirements import (
    DROP_LESS,
    check_compilation,
    check_levels,
    check_rules,
    require_counted_steps,
    require_training_mode,
)
from lit_accel.methods.strategy_checks import check_strategy
from lit_accel.methods.token_dropping.books import TokenBooks, TokenCount
from lit_accel.methods.token_dropping.deepspeed import translate
from lit_accel.methods.token_dropping.dropper import Scope, TokenDropper
from lit_accel.methods.token_dropping.learning_rate import LayerTokenLR
from lit_accel.methods.token_dropping.planned import PlannedTokens
from lit_accel.methods.token_dropping.refusals import (
    check_arguments,
    check_chunks,
    check_first_batch,
    check_graphs,
    check_interval,
    check_start,
    check_windows,
    dropping_blocks,
    input_prefix,
    why_nothing_was_dropped,
)
from lit_accel.methods.token_dropping.schedule import Compat, TokenSchedule
from lit_accel.resizing import begin_anew, ensure_built, full_size
from lit_accel.routing import routing_of
from lit_accel.run_length import estimated_steps, length_of_run
from lit_accel.schedules import num_steps_of
from lit_accel.stored_state import primitives, require_readable

_STATE_VERSION = 1
_LEAST_SAVING = 0.03


class RandomLTD(PlannedTokens):
    """Runs the middle blocks on a random part of the tokens, ever more of them as training goes on (random-LTD).

    Random layerwise token dropping (Yao et al., arXiv 2211.11586): each block but the first and the last runs on tokens
    of its own, drawn anew for each sequence; the others pass it unchanged. The number kept grows linearly to the whole
    sequence. Losses see every token; evaluation and generation drop nothing. SwinV2 keeps whole windows.

    Deviations from the paper's code: kept tokens never round below ``start_tokens`` and reach the whole sequence when
    they should (``compat="deepspeed"`` is its formula); masks, rotary tables and positions are restricted to the same
    tokens; draws depend on the seed, the epoch, the batch and the rank alone, and touch no global generator.

    Logged every ``Trainer.log_every_n_steps`` steps: ``token_dropping/kept_tokens`` (of a sequence, in a block that
    drops, since the last time), ``token_dropping/layer_tokens`` (that blocks ran on, summed over the blocks; so far)
    and ``token_dropping/effective_tokens`` (of a dense run with as many layer tokens; so far).

    Args:
        start_tokens: Tokens kept at first: a number (int) or a share of the sequence in (0, 1] (float). 1.0 drops
            nothing. SwinV2 needs a share.
        growth: When nothing is dropped any more: after so many optimizer steps (int) or in a share of the run (float).
        quantum: The number of kept tokens is a multiple of it while it grows; on windows it has no meaning.
        pinned: Indices of blocks that always run on every token; negative ones count from the last. Default: the first
            and the last.
        scope: ``"layer"``: a draw for each block, as published; ``"route"``: one for all blocks but the pinned ones;
            ``"input"``: patches of an image classifier, before the first block, which never come back. See
            :class:`~lit_accel.methods.token_dropping.TokenDropper`.
        keep_prefix: The first tokens of a sequence, which are always kept, such as those for class and distillation.
            Default: none, as published; with ``scope="input"`` those that the model puts in front.
        max_lengths: At most so many distinct lengths over the run, by a coarser quantum: where each length is compiled
            by itself. Default: no limit.
        num_tokens: Tokens of a sequence, for what is planned before training: the predicted saving and
            :class:`~lit_accel.LayerTokenLR`. Default: those of the model's images, or the data module's ``block_size``.
        compat: ``"deepspeed"`` for the formula of DeepSpeed's scheduler.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is none of the allowed values.

    Example::

        Trainer(max_steps=10_000, callbacks=[RandomLTD(start_tokens=0.25, growth=0.7)])
    """

    def __init__(
        self,
        start_tokens: int | float = 0.25,
        growth: int | float = 0.7,
        quantum: int = 8,
        pinned: Sequence[int] | None = None,
        scope: Scope = "layer",
        keep_prefix: int | None = None,
        max_lengths: int | None = None,
        num_tokens: int | None = None,
        compat: Compat | None = None,
        seed: int = 0,
    ) -> None:
        check_arguments(scope, pinned, growth, {"keep_prefix": (keep_prefix, 0), "num_tokens": (num_tokens, 1)})
        self.start_tokens = start_tokens
        self.growth = growth
        self.quantum = quantum
        self.pinned = list(pinned) if pinned is not None else [] if scope == "input" else [0, -1]
        self.scope: Scope = scope
        self.keep_prefix = keep_prefix
        self.max_lengths = max_lengths
        self.num_tokens = num_tokens
        self.compat: Compat | None = compat
        self.seed = seed
        require_whole("seed", seed)
        self._schedule_of(1)  # raises where a value is not allowed
        self.schedule: TokenSchedule | None = None
        """How many tokens are kept; known once the length of the run is."""
        self.blocks: tuple[int, ...] = ()
        """Indices of the blocks that drop tokens."""
        self.anatomy: Anatomy | None = None
        self.num_steps: int | None = None
        self._clear()

    @classmethod
    def from_deepspeed(cls, config: Mapping[str, Any] | str | Path, **options: Any) -> RandomLTD:
        """Translate the ``random_ltd`` section of a DeepSpeed configuration.

        Args:
            config: The configuration, that section of it, or a JSON file with one of them.
            **options: Further arguments of this class, which override what is translated.

        Raises:
            ValueError: If there is no such section, it is not enabled, or a value is missing or cannot be translated.
        """
        return cls(**{**translate(config), **options})

    def _clear(self) -> None:
        self._books = TokenBooks()
        self._dropper: TokenDropper | None = None
        self._follower: TransformerFollower | None = None
        self._observer: TransformerObserver | None = None
        self._loaded_rules: dict[str, Any] = {}
        self._position: tuple[int, tuple[int, ...]] | None = None
        self._was_called = self._in_batch = False
        self._step = 0

    @property
    def total(self) -> TokenCount:
        """What was counted so far; of several ranks, as of the last time that it was logged or saved."""
        return self._books.total

    # Before training

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse whatever could not work, before anything is trained."""
        if stage != "fit":
            return
        if not self.is_neutral:
            # Before the model is built under a strategy that would hide it.
            check_strategy(trainer, self)
        ensure_built(trainer, pl_module)
        transformer = find_transformer(pl_module)[1]
        anatomy = anatomy_of(transformer)
        if trainer.global_step == 0:
            self._clear()
        self._num_prefix = 0
        self._progress: list[float] | None = None
        self._has_predicted = self._has_warned = False
        self._coordinator = prepare_run(trainer)
        self._full = anatomy.at(full_size(pl_module))
        self._take(anatomy)
        if self.drops:
            self._num_prefix = self.keep_prefix or 0
            if self.scope == "input":
                self._num_prefix = input_prefix(anatomy, self.keep_prefix)
            check_windows(anatomy, self._schedule_of(1), self._num_prefix)
            check_start(anatomy, self.start_tokens, self._known_tokens(trainer))
            check_compilation(pl_module, transformer, anatomy, type(self).__name__)
            check_chunks(transformer, self.quantum)
            check_levels(
                trainer,
                self._full,
                lambda level: dropping_blocks(level, self.pinned, self.scope),
                DROP_LESS,
                self._coordinator.drops_at,
            )
        self.num_steps, self.schedule = None, None
        # A module that makes its data in its own setup has none yet.
        if trainer.max_epochs == -1 or not trainer.fit_loop._data_source.is_module():
            self.resolve(trainer, pl_module)

    def _take(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        drops = self.drops and self._coordinator.drops_from(anatomy)
        self.blocks = dropping_blocks(anatomy, self.pinned, self.scope) if drops else ()

    def resolve(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the length of the run, and refuse what does not fit it."""
        if isinstance(self.growth, float):
            otherwise = ", or give growth as a number of optimizer steps"
            self.num_steps = length_of_run(trainer, type(self).__name__, otherwise)
        else:
            self.num_steps = estimated_steps(trainer)
        self.schedule = self._schedule_of(num_steps_of(self.growth, self.num_steps or 0) if self.drops else 0)
        if not self.drops:
            return
        is_rehearsal = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self.num_steps is not None and self.schedule.growth_steps > self.num_steps and not is_rehearsal:
            rank_zero_warn(
                f"growth takes {self.schedule.growth_steps} optimizer steps, and the run has {self.num_steps}: it ends "
                "before its blocks have seen whole sequences, which is how the model will be used. Make growth "
                "shorter, or a share of the run such as 0.7."
            )

    def _predict(self, pl_module: L.LightningModule, num_tokens: int) -> None:
        self._has_predicted = True
        # Of the full model, which is left alone where the rules say so.
        if not self.num_steps or not self._coordinator.drops_at(0):
            return
        plan = self._plan_for(pl_module, num_tokens)
        transformer = find_transformer(pl_module)[1]
        check_graphs(transformer, plan)
        if len(self._coordinator.methods) > 1:
            # What it saves beside others is not what it would save alone; the coordinator says what all come to.
            return
        saved = plan.saved_flops(activation_checkpointing=uses_activation_checkpointing(transformer))
        if saved < _LEAST_SAVING:
            rank_zero_warn(
                f"RandomLTD would save {saved:.1%} of the FLOPs of this run, which hardly pays. Let it start with "
                "fewer tokens, grow for longer, use a smaller quantum or pin fewer blocks; or train without it."
            )
        else:
            rank_zero_info(
                f"RandomLTD alone will save {saved:.1%} of the FLOPs of a dense run: {len(plan.blocks)} of its "
                f"{len(plan.anatomy.blocks)} blocks do not see every token before step {plan.schedule.growth_steps}."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plan for data that the module has made by now, say what is saved, and tell the learning-rate schedule."""
        if self.schedule is None:
            self.resolve(trainer, pl_module)
        if self.drops and isinstance(self.growth, float):
            require_counted_steps(trainer, type(self).__name__)
        num_tokens = self._known_tokens(trainer)
        if self.drops and num_tokens is not None:
            self._predict(pl_module, num_tokens)
        self._coordinator.check_run(pl_module)
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if not isinstance(scheduler, LayerTokenLR):
                continue
            check_interval(config.interval, config.frequency)
            self._progress = self._make_progress(trainer, pl_module)
            if scheduler.num_total_steps not in (None, self.num_steps):
                rank_zero_warn(
                    f"LayerTokenLR was given num_total_steps={scheduler.num_total_steps}, which is ignored beside "
                    f"RandomLTD: the run has {self.num_steps} optimizer steps."
                )
            scheduler.follow(self._progress)

    def _make_progress(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[float]:
        num_steps = length_of_run(trainer, "LayerTokenLR")
        if not self.drops:
            return [float(step) for step in range(num_steps + 1)]
        num_tokens = self._known_tokens(trainer)
        if num_tokens is None:
            raise MisconfigurationException(
                "LayerTokenLR counts the tokens of a whole run in advance, and neither the model nor the data module "
                "says how long its sequences are. Give RandomLTD num_tokens."
            )
        return self._plan_for(pl_module, num_tokens).progress()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Intercept the blocks; warn if rules have changed since the checkpoint was written."""
        check_rules(trainer, self._rules(), self._loaded_rules, "token dropping")
        self._loaded_rules = {}
        if not self.drops:
            return
        transformer = find_transformer(pl_module)[1]
        anatomy = anatomy_of(transformer)
        begin_anew(trainer, pl_module)
        self._full = anatomy.at(full_size(pl_module))
        require_training_mode(transformer, anatomy, type(self).__name__)
        self._follower = TransformerFollower(pl_module, self._follow)
        self._observer = TransformerObserver(pl_module, self._on_forward, self._books.count_part, self._books.end_call)

    def _follow(self, transformer: nn.Module) -> None:
        was_active = self._dropper is not None and self._dropper.is_active
        if self._dropper is not None:
            self._dropper.close()
        anatomy = anatomy_of(transformer)
        if self.anatomy is None or anatomy.size != self.anatomy.size:
            self._take(anatomy)
        assert self.schedule is not None
        routing, prefix = routing_of(transformer), self._num_prefix
        # Calls of parts are not observed, and what is not counted is not dropped.
        self._dropper = TokenDropper(routing, self.blocks, self.schedule, self.scope, prefix, self.seed, in_parts=False)
        if self._position is not None and was_active:
            # Replaced after this batch has begun.
            self._dropper.set(*self._position)
            self._dropper.is_active = self._coordinator.may_drop(self._step)

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
        """Return where the schedule of kept tokens is, and the blocks that follow it."""
        return None if self._position is None else (self._position[0], self.blocks)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw the tokens of a new batch."""
        self._step = trainer.global_step
        if self._dropper is None or self._follower is None:
            return
        self._follower.refresh()
        # The batch and not the step: micro-batches of one step are different sequences.
        keys = (trainer.current_epoch, batch_idx, data_rank(trainer))
        self._position = (self._coordinator.schedule_step(self._step), keys)
        self._dropper.set(*self._position)
        self._dropper.is_active = self._coordinator.may_drop(self._step)
        self._books.begin_batch()
        self._was_called, self._in_batch = False, True

    def _on_forward(self, anatomy: Anatomy, transformer: nn.Module, num_sequences: int, num_tokens: int) -> None:
        self._books.end_call()
        if self._dropper is None or not self._in_batch or self._observer is None or self._observer.is_probing:
            return
        self._was_called = True
        # What a teacher or a target network sees is not trained on.
        if not (is_grad_enabled() and self._dropper.routing.modules[self.blocks[0] if self.blocks else 0].training):
            return
        if not self._has_predicted:
            if self._step == 0:
                # A run that goes on was not refused when it began.
                check_first_batch(self.start_tokens, num_tokens)
            self._predict(self._observer.module, num_tokens)
        self._coordinator.on_first_call(self._full, num_sequences, num_tokens)
        self._books.begin_call(anatomy, self.blocks, num_sequences, num_tokens)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Tell a learning-rate schedule that was made anew, for a model of another size."""
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, LayerTokenLR) and scheduler.progress is None and self._progress is not None:
                # Not by follow: whoever made it anew has carried the rate of this step over, with factors of its own.
                scheduler.progress, scheduler.num_total_steps = self._progress, self.num_steps

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let every block see all tokens again, for what is not training; where it is due, log."""
        if self._dropper is None or self.schedule is None:
            return
        if self._dropper.is_active:
            self._warn_if_nothing_was_dropped()
        self._dropper.is_active = self._in_batch = False
        previous, self._step = self._step, trainer.global_step
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and self._step // interval > previous // interval:
            self._collect(trainer)
            self._log(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add up what was counted since the last time."""
        self._collect(trainer)

    def _warn_if_nothing_was_dropped(self) -> None:
        assert self._dropper is not None
        assert self.schedule is not None
        assert self._position is not None
        step = self._position[0]
        if self._has_warned or self.schedule.is_over(step):
            return
        num_kept = max(self.schedule.kept_tokens(step, self._books.longest), self._num_prefix)
        has_windows = any(block.windows is not None for block in self._dropper.routing.blocks)
        is_due = num_kept < self._books.longest and not has_windows and not self._books.was_partial
        if is_due or self._dropper.was_spared or not self._was_called:
            self._has_warned = True
            rank_zero_warn(why_nothing_was_dropped(self._was_called, self._dropper.was_spared))

    def _collect(self, trainer: L.Trainer) -> None:
        books = self._books
        books.total = books.total.plus(
            sum_over_ranks(books.uncollected.amounts(), trainer.strategy, trainer.world_size)
        )
        books.uncollected = TokenCount()

    def _log(self, trainer: L.Trainer) -> None:
        books = self._books
        window, books.logged = books.total.minus(books.logged), books.total
        metrics = {
            "token_dropping/kept_tokens": window.kept_tokens,
            "token_dropping/layer_tokens": float(self.total.layer_tokens),
            "token_dropping/effective_tokens": self.total.effective_tokens,
        }
        # Not self.log: it would round to float32.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the rules that they were made by."""
        return primitives(
            {
                "version": _STATE_VERSION,
                "rules": self._rules(),
                "total": self.total.to_state(),
                "logged": self._books.logged.to_state(),
            }
        )

    def _rules(self) -> dict[str, Any]:
        names = ("start_tokens", "quantum", "pinned", "scope", "keep_prefix", "max_lengths", "compat", "seed")
        rules = {name: getattr(self, name) for name in names}
        # Of a checkpoint that was written before it was known, as a tuner's is, nothing is compared.
        return rules if self.schedule is None else {**rules, "growth_steps": self.schedule.growth_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the counts, and the rules for comparison.

        Raises:
            MisconfigurationException: If a newer version wrote the checkpoint, or it is damaged.
        """
        require_readable(state_dict, self.state_dict(), "token dropping")
        self._loaded_rules = dict(state_dict["rules"])
        self._books.total = TokenCount(**state_dict["total"])
        self._books.logged = TokenCount(**state_dict["logged"])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the saved counts up to date on all ranks: Lightning has asked for the state without a trainer."""
        self._collect(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()
