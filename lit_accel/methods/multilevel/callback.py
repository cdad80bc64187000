"""Multi-level training as a Lightning callback: the model shrinks, trains small and grows back within one run."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lit_accel.anatomy import (
    Size,
    anatomy_of,
    find_transformer,
)
from lit_accel.methods.multilevel.arguments import as_parts, check_choices, check_levels, check_numbers
from lit_accel.methods.multilevel.learning_rate import LearningRateFactor, restore_scheduled_lr
from lit_accel.methods.multilevel.maps import DepthGrouping, DepthMode, LevelMap, WidthGrouping
from lit_accel.methods.multilevel.micro_batches import MicroBatchMerger
from lit_accel.methods.multilevel.moments import OptimizerStatePolicy
from lit_accel.methods.multilevel.phases import (
    LearningRatePolicy,
    Level,
    Phase,
    ResolvedPhase,
    lr_factor,
    phase_at,
    v_cycle,
)
from lit_accel.methods.multilevel.prepared import PreparedLevels
from lit_accel.methods.multilevel.presets import PRESETS, PresetName, override_interpolation
from lit_accel.methods.multilevel.rehearsal import rehearse_training_step
from lit_accel.methods.multilevel.replaced import ReplacedModel
from lit_accel.methods.multilevel.stored import StoredLevels
from lit_accel.methods.requirements import check_rules, fetches_itself
from lit_accel.methods.strategy_checks import check_strategy
from lit_accel.resizing import (
    OptimizerState,
    ResizableStrategy,
    replace_transformer,
)
from lit_accel.stored_state import primitives, require_readable

_STATE_VERSION = 1


class MultiLevelTraining(PreparedLevels):
    """Trains part of the run on smaller versions of the model (V-cycle; arXiv 2404.07999).

    On the way down the present model is stored and coalesced into the next smaller level; on the way up the
    trained small model is de-coalesced and merged into the stored one. The level is a function of the optimizer
    step alone, so a resumed run is where it was. Needs a strategy that can resize: ``resizable``, ``resizable_ddp`` or
    ``resizable_model_parallel``.

    Args:
        levels: The smaller levels, each in relation to the one above; default is one of half width and depth.
        phases: Parts of the run, each at one level. Default is a V-cycle: 5 % of the steps in each level on the
            way down, 50 % shared by the small levels on the way up, and the rest in the full model.
        preset: ``correction``: the coarse-grid correction, averaged blocks, moments projected. ``paper``: the
            published rule with alpha 0.25, a fresh optimizer and an own schedule in each phase. ``exact``: growth
            that preserves the function, moments projected. The arguments below override it.
        alpha: The paper's interpolation, the weight of the small model in [0, 1].
        coarse: With ``fine``, instead of ``alpha``: the two-coefficient rule of
            :class:`~lit_accel.methods.multilevel.Interpolation`.
        fine: See ``coarse``.
        depth_mode: What becomes of the outputs of merged blocks: ``avg``, ``ode`` or ``zero``; see
            :class:`~lit_accel.methods.multilevel.LevelMap`.
        width_grouping: ``block`` (the paper's) or ``adjacent``.
        depth_grouping: ``adjacent`` (the paper's) or ``stack``.
        optimizer_state: What becomes of Adam's moments: ``reset``, ``project`` or ``second_moment``.
        learning_rate: ``continue``: the run's schedule goes on. ``rewarm``: besides, a ramp after each
            transition. ``paper``: a ramp in the first phase, a decay to zero in every later one, and in the first
            where ``start_level`` is above 0 and it begins with growth; needs a module without a scheduler. Each
            phase's ``lr_scale`` multiplies it.
        num_rewarm_steps: Length of the ramp of ``rewarm``, in optimizer steps; default is 100.
        start_level: The level of the model that the module comes with. Above 0 the run grows a small, trained model
            into one that never existed: by default at its first step, later if ``phases`` say so. The arguments above
            mean the same; only the stored model is a fresh one.
        fresh_std: Standard deviation of the weights of that fresh model, of which the part remains that the small
            model cannot express. It tells the copies of a grown model apart; frozen parameters have none of it. Default
            is 0.02, with which GPT-2, BERT, LLaMA and ViT are initialised.

    Raises:
        ValueError: If an argument is none of the allowed values.

    Example::

        Trainer(strategy="resizable", max_steps=10_000, callbacks=[MultiLevelTraining()])
    """

    def __init__(
        self,
        levels: list[Level] | None = None,
        phases: list[Phase] | None = None,
        preset: PresetName = "correction",
        alpha: float | None = None,
        coarse: float | None = None,
        fine: float | None = None,
        depth_mode: DepthMode | None = None,
        width_grouping: WidthGrouping = "block",
        depth_grouping: DepthGrouping = "adjacent",
        optimizer_state: OptimizerStatePolicy | None = None,
        learning_rate: LearningRatePolicy | None = None,
        num_rewarm_steps: int | None = None,
        start_level: int = 0,
        fresh_std: float | None = None,
    ) -> None:
        check_choices(preset, width_grouping, depth_grouping, depth_mode, optimizer_state, learning_rate)
        check_numbers({"alpha": alpha, "coarse": coarse, "fine": fine}, start_level, num_rewarm_steps, fresh_std)
        chosen = PRESETS[preset]
        # Mappings, as YAML writes them, will do in Python too.
        self.levels = [Level()] if levels is None else as_parts("levels", Level, levels)
        check_levels(self.levels, start_level)
        self.start_level = start_level
        if phases is None and start_level:
            phases = [Phase(0)]
        self.phases = v_cycle(len(self.levels)) if phases is None else as_parts("phases", Phase, phases)
        self.interpolation = override_interpolation(chosen.interpolation, alpha, coarse, fine)
        if start_level and self.interpolation.coarse < 1:
            raise ValueError(
                f"coarse (or alpha) is {self.interpolation.coarse}, but with start_level {start_level} there is no "
                "trained larger model to mix the small one with: what it has learned must be kept whole. Use preset "
                '"correction" or "exact", without alpha and coarse.'
            )
        self.depth_mode = depth_mode or chosen.depth_mode
        self.width_grouping = width_grouping
        self.depth_grouping = depth_grouping
        self.optimizer_state = optimizer_state or chosen.optimizer_state
        self.learning_rate = learning_rate or chosen.learning_rate
        if num_rewarm_steps is not None and self.learning_rate != "rewarm":
            rank_zero_warn(f'num_rewarm_steps is ignored: it is for "rewarm", learning_rate is {self.learning_rate!r}.')
        self.num_rewarm_steps = num_rewarm_steps or 100

        self.schedule: tuple[ResolvedPhase, ...] = ()
        self.maps: list[LevelMap] = []
        self._path = ""
        self._level = 0
        self._replaced = ReplacedModel()
        self._dependent: list[str] = []
        self._given_size: Size | None = None
        self._loaded_rules: dict[str, Any] = {}
        self._start_size: Size | None = None
        self._stored = StoredLevels(self.interpolation, self.optimizer_state, 0.02 if fresh_std is None else fresh_std)
        self._merger: MicroBatchMerger | None = None
        self._lr: LearningRateFactor | None = None

    # Before training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the level that a checkpoint was written at, and the learning rate of the first step."""
        self._retake_sizes(trainer, pl_module)
        maps, loaded, self._loaded_rules = self._map_settings(), self._loaded_rules, {}
        check_rules(
            trainer,
            {**maps, **self._rules(), "phases": self._phases()},
            loaded,
            "multi-level training",
            fixed=maps if self._stored.levels else (),
            why="The small model could not grow back into the weights that are stored with it.",
        )
        self._level = self._present_level(pl_module)
        missing = [level for level in range(self.start_level, self._level) if level not in self._stored]
        if missing:
            raise MisconfigurationException(
                f"The model is at level {self._level}, but the stored weights of level {missing[0]}, which it must "
                "grow back into, are not in the checkpoint. Resume from a checkpoint that MultiLevelTraining wrote "
                "(not a weights-only one). To train the small model for itself, load it with load_from_checkpoint, and "
                "call fit without ckpt_path."
            )
        if self._level != self.schedule[phase_at(self.schedule, trainer.global_step)].level:
            # Not looked at before, where it was thought that the phases keep the size: a checkpoint has another.
            check_strategy(trainer, self)
        if any(level.merge_batches > 1 for level in self.levels):
            self._merger = MicroBatchMerger(trainer)
            self._merger.num_merged = self._num_merged
        if self._changes_lr:
            self._lr = LearningRateFactor(trainer, pl_module)
        else:
            # A checkpoint brings the factor that it was trained with, which nobody would take out again.
            restore_scheduled_lr(trainer.optimizers)
        self._apply_lr(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing behind on the module or the strategy."""
        for change in (self._lr, self._merger):
            if change is not None:
                change.close()
        self._lr = self._merger = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind either; Lightning does not call ``teardown`` then."""
        if isinstance(exception, KeyboardInterrupt):
            self._warn_of_small(trainer)
        self.teardown(trainer, pl_module, "fit")

    # During training

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Go to the level that the schedule wants for the coming optimizer step."""
        if self._dependent:
            self._dependent = []
            self._rehearse_step(trainer, pl_module, batch, batch_idx)
        wanted = self.schedule[phase_at(self.schedule, trainer.global_step)].level
        while self._level != wanted:
            self._change_level(trainer, pl_module, self._level + (1 if wanted > self._level else -1))
        pl_module.log("multilevel/level", float(self._level), batch_size=1)

    def _rehearse_step(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Try the first batch on a model of another width, where what lies outside of it may not fit that."""
        steps_itself = not pl_module.automatic_optimization
        if self.is_neutral or steps_itself or fetches_itself(pl_module):
            return
        if trainer.strategy.restore_checkpoint_after_setup:
            return
        smallest = self.maps[-1].small.size
        is_smallest = anatomy_of(find_transformer(pl_module)[1]).size == smallest
        size = self.maps[0].large.size if is_smallest else smallest
        rehearse_training_step(trainer, pl_module, self._path, size, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set the learning rate of the next step."""
        self._apply_lr(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if the run was stopped while the model was small."""
        self._warn_of_small(trainer)

    def _warn_of_small(self, trainer: L.Trainer) -> None:
        if self._level == 0:
            return
        last = self.schedule[-1]
        # One that was to end small has been warned of before it began.
        if trainer.global_step < last.end or last.level != self._level:
            rank_zero_warn(
                f"Training ended at step {trainer.global_step} of {last.end} at level {self._level}, with a smaller "
                "model than the full one. To let it grow, take away what stopped it (EarlyStopping, max_time, fewer "
                "epochs) and resume from its last checkpoint; without one, train anew with a max_steps that it reaches."
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if it is not the full model that is evaluated."""
        self._announce_small(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if it is not the full model that is evaluated."""
        self._announce_small(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if it is not the full model that predicts."""
        self._announce_small(trainer, pl_module)

    def _announce_small(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING or not self.maps:
            return
        level = self._present_level(pl_module)
        if level:
            anatomy = self.maps[level - 1].small
            rank_zero_info(
                f"MultiLevelTraining: this is the model of level {level}, with {anatomy.num_parameters:,} parameters "
                f"instead of {self.maps[0].large.num_parameters:,}."
            )

    # Transitions

    def decision(self) -> object:
        """Return the level."""
        return self._level

    def _change_level(self, trainer: L.Trainer, pl_module: L.LightningModule, level: int) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, ResizableStrategy)
        goes_down = level > self._level
        step = self.maps[min(level, self._level)]
        before, started = self._level, time.perf_counter()

        def rebuild() -> None:
            transformer = find_transformer(pl_module)[1]
            new = (
                self._stored.shrink(transformer, step, before)
                if goes_down
                else self._stored.grow(transformer, step, level)
            )
            replace_transformer(pl_module, self._path, new)

        def carry(state: OptimizerState) -> OptimizerState:
            prefix = f"{self._path}."
            old = {name.removeprefix(prefix): entry for name, entry in state.items() if name.startswith(prefix)}
            # What lies outside of the transformer keeps its size, and so its state.
            kept = {name: entry for name, entry in state.items() if not name.startswith(prefix)}
            new = self._stored.carry(old, step, before=before, after=level)
            return {**kept, **{prefix + name: entry for name, entry in new.items()}}

        strategy.resize(rebuild, carry if self.optimizer_state != "reset" else None)
        self._level = level
        self._replaced.begin()
        if not goes_down:
            # Only now: a growth that fails, for want of memory say, must be able to be resumed.
            self._stored.drop(level)
        if self._merger is not None:
            self._merger.num_merged = self._num_merged
        self._apply_lr(trainer)
        anatomy = step.small if goes_down else step.large
        rank_zero_info(
            f"MultiLevelTraining: step {trainer.global_step}: level {before} -> {level}, "
            f"{anatomy.num_parameters:,} parameters, {time.perf_counter() - started:.2f} s"
        )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """See that the model of the present size is what is trained, by an optimizer of its own."""
        if not any(optimizer is own for own in trainer.optimizers):
            raise MisconfigurationException(
                f"The {type(optimizer).__name__} that is about to step was made before the model changed its size, and "
                "has none of its parameters. In manual optimization call self.optimizers(), and self.lr_schedulers(), "
                "in each training step; do not keep what they return."
            )
        if self._replaced.is_unproven:
            self._replaced.look(find_transformer(pl_module)[1], self._path, optimizer)

    @property
    def _num_merged(self) -> int:
        return self.levels[self._level - 1].merge_batches if self._level else 1

    # Learning rate

    def _apply_lr(self, trainer: L.Trainer) -> None:
        if self._lr is not None:
            step, policy = trainer.global_step, self.learning_rate
            self._lr.apply(lr_factor(self.schedule, step, policy, self.num_rewarm_steps, self.start_level))

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what the way up needs: stored weights, and moments where they are merged."""
        return primitives(
            {
                "version": _STATE_VERSION,
                "maps": self._map_settings(),
                "rules": self._rules(),
                "schedule": self._phases(),
                **self._stored.state_dict(),
            }
        )

    def _phases(self) -> list[list[int]]:
        return [[phase.level, phase.start, phase.end] for phase in self.schedule]

    def _rules(self) -> dict[str, Any]:
        rules = {
            "coarse": self.interpolation.coarse,
            "fine": self.interpolation.fine,
            "optimizer_state": self.optimizer_state,
            "learning_rate": self.learning_rate,
            # Beside the phases and levels, not in them: older checkpoints, which lack them, still compare equal.
            "lr_scale": [phase.lr_scale for phase in self.schedule],
            "merge_batches": [level.merge_batches for level in self.levels],
            "start_level": self.start_level,
        }
        # Elsewhere these say nothing, and would only be in the way of the message of what has changed.
        if self.learning_rate == "rewarm":
            rules["num_rewarm_steps"] = self.num_rewarm_steps
        if self.start_level:
            rules["fresh_std"] = self._stored.fresh_std
        return rules

    def _map_settings(self) -> dict[str, Any]:
        return {
            "levels": [[level.width, level.depth] for level in self.levels],
            "width_grouping": self.width_grouping,
            "depth_grouping": self.depth_grouping,
            "depth_mode": self.depth_mode,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up stored weights, and the rules for comparison.

        Raises:
            MisconfigurationException: If a newer version wrote the checkpoint, or it is damaged.
        """
        require_readable(state_dict, self.state_dict(), "multi-level training")
        self._stored.load_state_dict(state_dict)
        rules = {**state_dict["maps"], **state_dict["rules"], "phases": state_dict["schedule"]}
        # One that was written before the phases had been placed, as a tuner's is, says nothing of them.
        placed = rules if state_dict["schedule"] else rules.keys() - {"phases", "lr_scale"}
        self._loaded_rules = {name: rules[name] for name in placed}
