"""Multi-level training before its first batch: the sizes that the model will have, and what could not work."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.trainer.states import TrainerFn

from lit_accel.anatomy import AnatomyError, Size, anatomy_of, find_transformer
from lit_accel.methods.coordinator import coordinator_of
from lit_accel.methods.multilevel.maps import grown_size
from lit_accel.methods.multilevel.moments import OptimizerStatePolicy
from lit_accel.methods.multilevel.operators import Interpolation
from lit_accel.methods.multilevel.phases import LearningRatePolicy, rehearse_phases, resolve_phases
from lit_accel.methods.multilevel.planned import PlannedLevels
from lit_accel.methods.multilevel.presets import PRESETS
from lit_accel.methods.multilevel.refusals import (
    check_end,
    check_length,
    check_merging,
    check_model,
    check_optimizers,
    check_trainer,
    warn_of_frozen,
)
from lit_accel.methods.multilevel.rehearsal import rehearse_optimizers
from lit_accel.methods.multilevel.stored import StoredLevels
from lit_accel.methods.preparation import prepare_run
from lit_accel.methods.requirements import fetches_itself
from lit_accel.methods.strategy_checks import check_strategy
from lit_accel.resizing import begin_anew, full_size, prepare_module, set_full_size
from lit_accel.run_length import length_of_run
from lit_accel.strategies.resizing import require_plain_schedules


class PreparedLevels(PlannedLevels):
    """Base of :class:`~lit_accel.MultiLevelTraining`: takes up the model and the run, or refuses them."""

    interpolation: Interpolation
    optimizer_state: OptimizerStatePolicy
    learning_rate: LearningRatePolicy
    _path: str
    _dependent: list[str]
    _stored: StoredLevels
    _loaded_rules: dict[str, Any]
    _given_size: Size | None
    _start_size: Size | None
    #: The module that brought the size with which the run began, ``_start_size``.
    _start_of: weakref.ref[L.LightningModule] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Plan the levels and refuse whatever could not work, before anything is trained."""
        if stage != "fit":
            # Somebody may evaluate another module, of whose models nothing is known.
            self.maps = []
            with suppress(AnatomyError):
                self.take_sizes(trainer, pl_module)
            return
        if not self.is_neutral:
            # Before the model is built under a strategy that would hide it.
            check_strategy(trainer, self)
        self.take_sizes(trainer, pl_module)
        if trainer.global_step == 0:
            # What an earlier run of this callback has left; a checkpoint is loaded after this.
            self._stored.clear()
            self._loaded_rules = {}
        self.schedule = ()
        prepare_run(trainer)
        check_trainer(trainer, pl_module, changes_lr=self._changes_lr)
        check_merging(
            trainer,
            pl_module,
            [level.merge_batches for level in self.levels],
            takes_iterator=fetches_itself(pl_module),
        )
        self._check_levels(pl_module)
        # Before a checkpoint is loaded, which is in the workers only.
        self._given_size = anatomy_of(find_transformer(pl_module)[1]).size
        # A module that makes its data in its own setup has none yet.
        if trainer.max_epochs == -1 or not trainer.fit_loop._data_source.is_module():
            self.resolve(trainer, pl_module)

    def take_sizes(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the sizes of the levels from the model that is there; the same again where nothing has changed."""
        prepare_module(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and (self._start_of is None or self._start_of() is not pl_module):
            # What this module brings is small, too, whatever an earlier one brought.
            self._start_of, self._start_size = weakref.ref(pl_module), None
        self._plan_sizes(pl_module)

    def _plan_sizes(self, pl_module: L.LightningModule) -> None:
        self._path, transformer = find_transformer(pl_module)
        anatomy = anatomy_of(transformer)
        if self.start_level and anatomy.size == (self._start_size or full_size(pl_module)):
            self._start_size = anatomy.size
            factors = [(level.width, level.depth) for level in self.levels[: self.start_level]]
            set_full_size(pl_module, grown_size(anatomy, factors))
        self.maps = self.plan_levels(anatomy.at(full_size(pl_module)))

    def _retake_sizes(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plan anew where only now it is known how large the full model is."""
        begin_anew(trainer, pl_module)
        if full_size(pl_module) != self.maps[0].large.size:
            self._plan_sizes(pl_module)
            self._check_levels(pl_module)

    def _check_levels(self, pl_module: L.LightningModule) -> None:
        transformer = find_transformer(pl_module)[1]
        self._dependent = check_model(pl_module, self._path, transformer, anatomy_of(transformer), self.maps)
        # A level that never existed holds no frozen weights to go back to.
        if self.interpolation == PRESETS["exact"].interpolation and not (self.start_level or self.is_neutral):
            warn_of_frozen(transformer, self.maps)

    def resolve(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the length of the run, and refuse what does not fit it."""
        num_steps = length_of_run(trainer, "MultiLevelTraining")
        num_levels = len(self.levels) + 1
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.schedule = rehearse_phases(self.phases, num_levels, num_steps)
            return
        if not self.is_neutral:
            check_length(trainer, pl_module)
        self.schedule = resolve_phases(self.phases, num_levels, num_steps)
        check_end(trainer, self.schedule[-1].level, self._level_given)

    def _level_given(self) -> int:
        return 0 if self._given_size is None else self.level_of(self._given_size)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check what exists only now: the optimizers and their schedulers, and data that the module has made."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._retake_sizes(trainer, pl_module)
        if not self.schedule:
            self.resolve(trainer, pl_module)
        coordinator_of(trainer).check_run(pl_module)
        check_optimizers(
            trainer,
            pl_module,
            optimizer_state=self.optimizer_state,
            learning_rate=self.learning_rate,
            changes_lr=self._changes_lr,
        )
        if not self.is_neutral:
            require_plain_schedules(config.scheduler for config in trainer.lr_scheduler_configs)
        # Where checkpoints are loaded later, the model is sharded by now, and another size could only be built from a
        # gathered copy.
        if not (self.is_neutral or trainer.strategy.restore_checkpoint_after_setup):
            level = self._present_level(pl_module)
            step = self.maps[max(level - 1, 0)]
            rehearse_optimizers(trainer, pl_module, self._path, (step.large if level else step.small).size)

    def _present_level(self, pl_module: L.LightningModule) -> int:
        size = anatomy_of(find_transformer(pl_module)[1]).size
        sizes = [self.maps[0].large.size, *(step.small.size for step in self.maps)]
        if size not in sizes:
            raise AnatomyError(
                f"The model has the size {size.to_state()}, which is none of the configured levels "
                f"{[known.to_state() for known in sizes]}. Use the levels that the checkpoint was trained with."
            )
        return sizes.index(size)

    @property
    def _changes_lr(self) -> bool:
        return self.learning_rate != "continue" or any(phase.lr_scale != 1 for phase in self.phases)
