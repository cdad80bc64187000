"""Mixed sparsity training as a Lightning callback."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, is_grad_enabled, nn
from torch.optim import Optimizer

from lit_accel.anatomy import (
    Anatomy,
    TransformerFollower,
    anatomy_of,
    find_transformer,
    uses_activation_checkpointing,
)
from lit_accel.compute.observer import TransformerObserver
from lit_accel.methods.coordinator import Coordinator, coordinator_of, num_sequences_of
from lit_accel.methods.mixed_sparsity.arguments import check_choices, check_numbers, check_stages, check_units
from lit_accel.methods.mixed_sparsity.attention import PatternName
from lit_accel.methods.mixed_sparsity.distribution import Distribution
from lit_accel.methods.mixed_sparsity.dynamics import DynamicSparsity, digest_of
from lit_accel.methods.mixed_sparsity.planned import PlannedUnits
from lit_accel.methods.mixed_sparsity.presets import DEFAULTS, PRESETS, PresetName
from lit_accel.methods.mixed_sparsity.refusals import (
    check_counts,
    check_graphs,
    check_masks,
    check_model,
    check_optimizers,
    check_pattern,
    check_phase,
    check_trainer,
    warn_of_no_update,
    warn_of_phase,
)
from lit_accel.methods.mixed_sparsity.schedule import DEFAULT_STAGES
from lit_accel.methods.mixed_sparsity.sparse_model import Execution
from lit_accel.methods.mixed_sparsity.targets import Targets
from lit_accel.methods.preparation import prepare_run
from lit_accel.methods.requirements import (
    check_compilation,
    check_levels,
    check_rules,
    require_equal_on_ranks,
    require_training_mode,
)
from lit_accel.methods.strategy_checks import check_strategy
from lit_accel.resizing import ensure_built, full_size
from lit_accel.run_length import length_of_run
from lit_accel.stored_state import primitives, require_readable

_STATE_VERSION = 1
# What the masks of a checkpoint are masks of.
_FIXED = ("ffn_units", "attention_units", "head_units", "block_size")


class MixedSparsityTraining(PlannedUnits):
    """Trains with most units of the model off: dense at first, then ever sparser, at last dense again (MST).

    Mixed sparsity training (Hu et al., arXiv 2408.11746): dynamic sparse training whose sparsity rises in a warm-up,
    stays at its highest in ultra-sparsification and falls in restoration, beside sparse attention for a part of the
    run. Units that are off are chosen anew every ``update_every`` steps: those of least magnitude are dropped, others
    are grown by gradient and at random. The run ends with an ordinary dense model.

    By default units are neurons and heads, which are taken out of the model: its products become smaller, and a step
    really is faster. Entries of matrices (``"element"``, what the paper masks) are the reference of quality: they save
    FLOPs on paper and no second anywhere.

    Deviations from the published code, whose schedule and results are not in it: every boundary is a setting; stages
    start where they say and not at the next update; what is dropped does not come back at once; optimizer state of
    dropped and grown units is zero; gradients are averaged over ranks before they are compared; random draws are the
    same on all ranks; the step of an update is not skipped.

    Checkpoints always hold the whole model and the whole optimizer state, in every phase. Exact on resume.

    Logged every ``Trainer.log_every_n_steps`` steps: ``mixed_sparsity/sparsity`` (share of the switchable weights that
    are off), ``mixed_sparsity/active_parameters``, ``mixed_sparsity/attention_pattern`` (whether attention follows it),
    ``mixed_sparsity/evaluation_pattern`` (the same for evaluation) and ``mixed_sparsity/replaced_units`` (dropped and
    grown so far).

    Args:
        stages: Pairs of a start and the sparsity from there on; a start in optimizer steps (int) or as a share of the
            run (float). Default: :data:`~lit_accel.methods.mixed_sparsity.DEFAULT_STAGES`, up to 0.9 and back.
        ffn_units: Of feed-forward networks: ``"neuron"``, ``"element"``, ``"block"`` (tiles, as many in each row of
            tiles), ``"N:M"`` such as ``"2:4"`` (N of each M neighbours whenever the sparsity is not 0), or
            ``"dense"``. Default: ``"neuron"``.
        attention_units: Of attention's matrices: ``"head"`` (with grouped queries, a key-value head with its queries),
            or as above. At least one head is on. Default: ``"head"``.
        head_units: Of the model's head, and of the embeddings where these are tied: ``"element"`` or ``"dense"``.
            Default: ``"dense"``.
        update_every: Optimizer steps between updates of the topology.
        drop_fraction: Share of the active units that an update at the start of the run replaces; falls to 0 along a
            cosine until restoration starts, also while the run is dense.
        gradient_share: Share of the grown units that are chosen by gradient; the others are drawn.
        distribution: Over layers: ``"uniform"``, ``"er"`` or ``"erk"``. Default: ``"uniform"``.
        quantum: Numbers of active neurons are multiples of it, and at least it.
        block_size: Side of a tile.
        attention_pattern: ``"window"``, ``"strided"``, ``"fixed"`` or ``"union"`` (window or strided), of causal
            models; ``"dense"`` for dense attention throughout. Default: ``"dense"``.
        attention_window: Window, stride or chunk of the pattern, in tokens.
        attention_phase: First step that follows the pattern, and the first one after; each in optimizer steps (int) or
            as a share of the run (float). 1.0 is the end of the run, and 1 its second step.
        evaluate_pattern: Whether evaluation follows the pattern too, in that phase.
        execution: ``"compact"`` takes neurons, heads and tiles out of the model; ``"masked"`` leaves them in, for
            comparison: as slow as dense.
        preset: ``"paper_4x"``: entries of all matrices, the head's among them, by ``"er"``, and ``"union"``; what is
            given besides holds.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is none of the allowed values.

    Example::

        Trainer(max_steps=20_000, callbacks=[MixedSparsityTraining()])
    """

    def __init__(
        self,
        stages: list[tuple[int | float, float]] | None = None,
        ffn_units: str | None = None,
        attention_units: str | None = None,
        head_units: str | None = None,
        update_every: int = 100,
        drop_fraction: float = 0.3,
        gradient_share: float = 0.75,
        distribution: Distribution | None = None,
        quantum: int = 16,
        block_size: int = 64,
        attention_pattern: PatternName | Literal["dense"] | None = None,
        attention_window: int = 128,
        attention_phase: tuple[int | float, int | float] = (0.06, 0.80),
        evaluate_pattern: bool = True,
        execution: Execution = "compact",
        preset: PresetName | None = None,
        seed: int = 0,
    ) -> None:
        if preset is not None and preset not in list(PRESETS):
            raise ValueError(f"preset is {preset!r}; it is one of {', '.join(map(repr, PRESETS))}, or None.")
        chosen = {**DEFAULTS, **(PRESETS[preset] if preset is not None else {})}
        own = (ffn_units, attention_units, head_units, distribution, attention_pattern)
        if preset is not None and None not in own:
            rank_zero_warn(
                f"preset={preset!r} is ignored: {', '.join(DEFAULTS)} are given, and what is given holds. Leave out "
                "those that the preset is to choose."
            )
        given = DEFAULT_STAGES if stages is None else stages
        check_stages(given)
        self.stages: list[tuple[int | float, float]] = [(start, sparsity) for start, sparsity in given]
        self.ffn_units: str = chosen["ffn_units"] if ffn_units is None else ffn_units
        self.attention_units: str = chosen["attention_units"] if attention_units is None else attention_units
        self.head_units: str = chosen["head_units"] if head_units is None else head_units
        self.update_every = update_every
        self.drop_fraction = drop_fraction
        self.gradient_share = gradient_share
        self.distribution: Distribution = chosen["distribution"] if distribution is None else distribution
        self.quantum = quantum
        self.block_size = block_size
        pattern = chosen["attention_pattern"] if attention_pattern is None else attention_pattern
        self.attention_window = attention_window
        self.evaluate_pattern = evaluate_pattern
        self.execution: Execution = execution
        self.seed = seed
        check_units(self.ffn_units, self.attention_units, self.head_units)
        counts = {
            "update_every": update_every,
            "quantum": quantum,
            "block_size": block_size,
            "attention_window": attention_window,
        }
        check_numbers(drop_fraction, gradient_share, seed, counts)
        check_choices(self.distribution, execution, pattern, attention_phase)
        self.attention_pattern: PatternName | None = None if pattern == "dense" else pattern
        self.attention_phase = (attention_phase[0], attention_phase[1])
        self.targets: Targets | None = None
        """The schedule on the model's units; known once the length of the run is."""
        self._clear()

    def _clear(self) -> None:
        self._sparsity: DynamicSparsity | None = None
        self._state: dict[str, Any] | None = None
        self._follower: TransformerFollower | None = None
        self._observer: TransformerObserver | None = None
        self._loaded_rules: dict[str, Any] = {}
        self._num_reshapings = 0
        self._present_step = 0
        self._step = 0

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which units are on, by the name of their space; each of shape (groups, units)."""
        if self._sparsity is not None:
            return self._sparsity.masks
        return {} if self._state is None else self._state["masks"]

    @property
    def digest(self) -> int:
        """A number that stands for the masks: the same on all ranks, and in every repetition of a run."""
        return digest_of(self.masks)

    def decision(self) -> object:
        """Return what stands for the masks."""
        return self.digest

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
        if trainer.global_step == 0:
            self._clear()
        self.targets = None
        anatomy = anatomy_of(transformer)
        prepare_run(trainer)
        if not self.is_neutral:
            check_trainer(trainer, pl_module, self, reshapes=self._ever_sparse)
        if self._ever_sparse:
            check_compilation(pl_module, transformer, anatomy, type(self).__name__)
        if self.attention_pattern is not None:
            check_pattern(anatomy)
        check_model(transformer, self._targets_of(anatomy))
        self._full = anatomy.at(full_size(pl_module))
        check_levels(
            trainer, self._full, lambda level: check_counts(self._targets_of(level)), "Or reduce its width less."
        )
        # A module that makes its data in its own setup has none yet.
        if trainer.max_epochs == -1 or not trainer.fit_loop._data_source.is_module():
            self.resolve(trainer, pl_module)

    def resolve(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the length of the run, and refuse what does not fit it."""
        num_steps = length_of_run(trainer, type(self).__name__)
        transformer = find_transformer(pl_module)[1]
        self.targets = targets = self._targets_of(anatomy_of(transformer), num_steps)
        check_graphs(transformer, targets, self._evaluates(trainer, pl_module))
        check_phase(targets, self.attention_phase)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        warn_of_no_update(targets)
        warn_of_phase(targets, self.attention_phase)
        if self._ever_sparse and not targets.spaces:
            rank_zero_warn(
                f"{type(self).__name__} switches nothing off, whatever stages say: all of its units are "
                '"dense". Choose ffn_units or attention_units.'
            )
        last = targets.schedule.sparsity(max(num_steps - 1, 0))
        if last > 0:
            rank_zero_warn(
                f"The last steps of the run have the sparsity {last}: it will end with units switched off, in a model "
                "that is as large as a dense one. Let stages end with a sparsity of 0, some steps before the end."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plan for data that the module has made by now, and say what the run will cost."""
        if self.targets is None:
            self.resolve(trainer, pl_module)
        assert self.targets is not None
        coordinator_of(trainer).check_run(pl_module)
        if not self.is_neutral:
            self._check_what_is_trained(trainer, pl_module)
        data = getattr(trainer, "datamodule", None)
        num_tokens = self.targets.anatomy.num_tokens or getattr(data, "block_size", None)
        if num_tokens is None or not self._ever_sparse or len(coordinator_of(trainer).methods) > 1:
            return
        shares = self.targets.shares(
            num_tokens,
            activation_checkpointing=uses_activation_checkpointing(find_transformer(pl_module)[1]),
            num_sequences=num_sequences_of(trainer),
        )
        rank_zero_info(
            f"{type(self).__name__} alone will cost {shares.dense:.1%} of the FLOPs of a dense run; "
            f"{shares.masked:.1%} were the model's head as sparse as its blocks, {shares.excluded:.1%} without it."
        )

    def _check_what_is_trained(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look once more: a module's own ``setup`` and ``configure_model`` come after those of callbacks."""
        transformer = find_transformer(pl_module)[1]
        anatomy = anatomy_of(transformer)
        assert self.targets is not None
        # Of the size that it has here: a run may resume at a smaller one.
        targets = self._targets_of(anatomy, self.targets.schedule.num_steps)
        check_optimizers(trainer, transformer, targets)
        check_graphs(transformer, targets, self._evaluates(trainer, pl_module))
        if self._ever_sparse:
            check_compilation(pl_module, transformer, anatomy, type(self).__name__)
            check_model(transformer, targets)

    def _evaluates(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        return bool(trainer.limit_val_batches) and is_overridden("validation_step", pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the masks of a checkpoint; warn if rules have changed since it was written."""
        assert self.targets is not None
        transformer = find_transformer(pl_module)[1]
        if self.attention_pattern is not None and not self.evaluate_pattern:
            require_training_mode(transformer, self.targets.anatomy, type(self).__name__)
        check_rules(
            trainer,
            self._rules(),
            self._loaded_rules,
            "mixed sparsity",
            fixed=_FIXED if self._state is not None else (),
            why="Its masks say of those units which are on.",
        )
        self._loaded_rules = {}
        self._step = trainer.global_step
        self._follower = TransformerFollower(pl_module, self._follow)
        if len(coordinator_of(trainer).methods) > 1:
            self._full = anatomy_of(transformer).at(full_size(pl_module))
            self._observer = TransformerObserver(pl_module, partial(self._on_forward, coordinator_of(trainer)))
        self._compare_ranks(trainer)

    def _on_forward(
        self, coordinator: Coordinator, anatomy: Anatomy, transformer: nn.Module, num_sequences: int, num_tokens: int
    ) -> None:
        # The data may not have said how long sequences are.
        if is_grad_enabled():
            coordinator.on_first_call(self._full, num_sequences, num_tokens)

    def _follow(self, transformer: nn.Module) -> None:
        """Turn to a transformer: the first one, or, while all units are on, one of another size."""
        assert self.targets is not None
        anatomy = anatomy_of(transformer)
        if anatomy.size != self.targets.anatomy.size:
            self.targets = self._targets_of(anatomy, self.targets.schedule.num_steps)
        state, self._state = self._state, None
        is_replaced = self._sparsity is not None
        if self._sparsity is not None:
            self._sparsity.close()
            state = {**self._sparsity.to_state(), "masks": None}
        elif state is not None:
            check_masks(state["masks"], self.targets)
        self._sparsity = DynamicSparsity(transformer, self.targets, self.execution, self.seed, state)
        self._num_reshapings = 0
        if is_replaced:
            # Perhaps after this step has begun; its optimizers are still to be made.
            self._sparsity.begin_step(self._present_step, [])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave a whole model behind; Lightning does not call ``teardown`` then."""
        if isinstance(exception, KeyboardInterrupt):
            self._warn_of_sparse(trainer)
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave a whole model behind."""
        for part in (self._follower, self._observer):
            if part is not None:
                part.close()
        self._follower = self._observer = None
        if self._sparsity is not None:
            self._sparsity.close()
            self._state = self._sparsity.to_state()
            # Of a Trainer that goes on, where a longer run has its stages elsewhere.
            self._loaded_rules = self._rules()
            self._sparsity = None

    # During training

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switch units that need no gradient to choose; put all back into the model where one is needed."""
        if self._follower is None:
            return
        self._present_step = trainer.global_step
        self._follower.refresh()
        assert self._sparsity is not None
        if self._sparsity.begin_step(trainer.global_step, trainer.optimizers):
            self._compare_ranks(trainer)
        num_reshapings = self._sparsity.model.num_reshapings
        if num_reshapings != self._num_reshapings:
            self._num_reshapings = num_reshapings
            _wrap_anew(trainer)

    def _compare_ranks(self, trainer: L.Trainer) -> None:
        if trainer.world_size > 1:
            require_equal_on_ranks(trainer, self.digest, "the units that are on")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Choose units by the gradients of this step, and clear those of what is off."""
        if self._sparsity is not None and self._sparsity.after_backward():
            self._compare_ranks(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hold what is off where it was; where it is due, log."""
        previous, self._step = self._step, trainer.global_step
        if self._sparsity is None or self._step == previous:
            return
        self._sparsity.after_step()
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and self._step // interval > previous // interval:
            self._log(trainer, previous)

    def _log(self, trainer: L.Trainer, step: int) -> None:
        assert self.targets is not None
        assert self._sparsity is not None
        counts, spaces = self._sparsity.counts, self.targets.spaces.values()
        weights = sum(space.num_groups * space.num_units * space.weights_per_unit for space in spaces)
        on = sum(space.num_groups * counts[space.name] * space.weights_per_unit for space in spaces)
        follows = self._sparsity.follows_pattern
        metrics = {
            "mixed_sparsity/sparsity": 1 - on / weights if weights else 0.0,
            "mixed_sparsity/active_parameters": float(self.targets.active(step, counts).num_parameters),
            "mixed_sparsity/attention_pattern": float(follows),
            "mixed_sparsity/evaluation_pattern": float(follows and self.evaluate_pattern),
            "mixed_sparsity/replaced_units": float(self._sparsity.num_replaced),
        }
        # Not self.log: it would round to float32.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Be whole before others save the final model; say so if it ends with units off that should be on."""
        if self._sparsity is None or self.targets is None:
            return
        self._sparsity.model.expand()
        self._warn_of_sparse(trainer)

    def _warn_of_sparse(self, trainer: L.Trainer) -> None:
        if self._sparsity is None or self.targets is None:
            return
        if not self._sparsity.model.is_dense and trainer.global_step < self.targets.schedule.num_steps:
            rank_zero_warn(
                f"Training has stopped at step {trainer.global_step} of {self.targets.schedule.num_steps}, while units "
                "are off: those of the model that it leaves behind do nothing. Take away what stopped it and resume it "
                "to the end, or shorten the run with max_steps, by which stages are placed."
            )

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, and the rules that they were made by."""
        state = self._state if self._sparsity is None else self._sparsity.to_state()
        return primitives({"version": _STATE_VERSION, "rules": self._rules(), "units": state})

    def _rules(self) -> dict[str, Any]:
        names = (
            "ffn_units",
            "attention_units",
            "head_units",
            "update_every",
            "drop_fraction",
            "gradient_share",
            "distribution",
            "quantum",
            "block_size",
            "execution",
            "seed",
        )
        has_pattern = self.attention_pattern is not None
        rules = {
            **{name: getattr(self, name) for name in names},
            "attention_pattern": self.attention_pattern,
            # Without a pattern they have no meaning.
            "attention_window": self.attention_window if has_pattern else None,
            "evaluate_pattern": self.evaluate_pattern if has_pattern else None,
        }
        targets = self.targets
        if targets is None:
            # Of a checkpoint that was written before they were known, as a tuner's is, nothing is compared.
            return rules
        stages = zip(targets.schedule.starts, targets.schedule.sparsities, strict=True)
        phase = list(targets.pattern_steps) if has_pattern else None
        return {**rules, "stages": list(map(list, stages)), "phase": phase}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the masks, and the rules for comparison.

        Raises:
            MisconfigurationException: If a newer version wrote the checkpoint, or it is damaged.
        """
        require_readable(state_dict, self.state_dict(), "mixed sparsity")
        self._loaded_rules = dict(state_dict["rules"])
        self._state = state_dict["units"]


def _wrap_anew(trainer: L.Trainer) -> None:
    """Have DDP look at the parameters again: it knows them by their shapes."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and strategy.model is not strategy.lightning_module:
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
