"""Sensitivity-based layer dropping (SBLD) as a Lightning callback."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.anatomy import Anatomy, anatomy_of, find_transformer
from lit_accel.arguments import is_number, require_duration, require_one_of, require_whole
from lit_accel.compute.flops import forward_flops, training_flops
from lit_accel.methods.layer_dropping.budget import Allocation, allocate, floor_of, robust
from lit_accel.methods.layer_dropping.budgeted import BudgetedLayerDropping
from lit_accel.methods.layer_dropping.dropper import Scale
from lit_accel.methods.layer_dropping.history import History
from lit_accel.methods.layer_dropping.probing import measuring, training_loss
from lit_accel.methods.layer_dropping.protection import BlockList
from lit_accel.methods.layer_dropping.refusals import (
    droppable_blocks,
    require_gradient,
    require_gradients_of_all,
    why_calls_are_not_seen,
)
from lit_accel.methods.layer_dropping.sampling import Sampler
from lit_accel.methods.layer_dropping.sensitivity import ESTIMATES, Estimator, Meter, ablate, ablation_flops
from lit_accel.methods.requirements import fetches_itself
from lit_accel.run_folder import run_folder
from lit_accel.stored_state import primitives

FILE_NAME = "sensitivities.png"


class SensitivityLayerDropping(BudgetedLayerDropping):
    """Skips blocks at random, those more often that the model can spare (after SBLD, AAAI 2023).

    After a warm-up it is measured what each block is worth. The most sensitive blocks are protected; the others get
    keep probabilities that spend the compute budget where dropping does least harm. Measurements are repeated, at a
    bounded cost. At the end of the run all blocks come back.

    This is a reconstruction: no code was released, and none of the public sources that we could read gives the paper's
    formulas. From these descriptions it has the measurement before dropping begins, the lists of protected and of
    droppable layers, a global schedule, and keep probabilities that combine the two. The estimators, the budget solver
    and the schedule's form are ours.

    Logged every ``Trainer.log_every_n_steps`` steps: ``layer_dropping/kept_blocks``, ``layer_dropping/kept_flops`` and
    ``layer_dropping/planned_flops`` (shares of the blocks' FLOPs, since the last time), and of each block
    ``layer_dropping/keep_probability/<block>`` and ``layer_dropping/sensitivity/<block>``. Written at the end:
    ``sensitivities.png``, layers by time.

    Args:
        kept: Share of the blocks' FLOPs to keep while dropping is strongest, in (0, 1]; 1 drops nothing.
        estimator: ``"ablate"``: the loss without a block minus the loss with it, on coming training batches.
            ``"taylor"``, ``"ratio"`` and ``"cos"``: cheaper estimates, from training steps in which all blocks run; see
            :class:`~lit_accel.methods.layer_dropping.Meter`.
        allocation: ``"sensitivity"``; for comparison at the same budget ``"depth"``, the shape of progressive layer
            dropping, or ``"uniform"``.
        warmup: Before it nothing is dropped, and at its end is the first measurement: optimizer steps (int) or a share
            of the run (float). Not shorter than the learning rate's; 0 for a trained model.
        ramp: How long it takes to do 99 % of the way to ``kept``, exponentially.
        release: The end of the run in which all blocks come back, linearly; 0 for none.
        min_keep: The lowest keep probability, in (0, 1].
        protected: Share of the droppable blocks that is never dropped because of its sensitivity, in [0, 1). The first
            and the last droppable block are never dropped either. A block leaves the list after two measurements.
        measure_every: Time between measurements: optimizer steps (int) or a share of the run (float). Longer where
            ``max_overhead`` demands it.
        num_batches: How many batches a measurement uses; fewer where ``max_overhead`` demands it.
        max_overhead: Share of the run's FLOPs that measurements may cost.
        ema: Weight of the past in the running mean of measurements, in [0, 1).
        pinned: Indices of blocks that always run; negative ones count from the last.
        sampler: ``"systematic"`` or ``"bernoulli"``; see :func:`~lit_accel.methods.layer_dropping.sample_blocks`.
        scale: ``"block"``, ``"sublayer"`` or ``"none"``; see :class:`~lit_accel.methods.layer_dropping.BlockDropper`.
            Where norms stand after the addition, as in BERT, ``"none"`` alone.
        seed: Seed of the draws.
        check_ranks_every: With several processes, after how many optimizer steps they compare their masks.
        folder: Where the picture goes. Default: the logger's folder, or ``Trainer.default_root_dir``.

    Raises:
        ValueError: If an argument is none of the allowed values.

    Example::

        Trainer(max_steps=10_000, callbacks=[SensitivityLayerDropping(kept=0.8)])
    """

    def __init__(
        self,
        kept: float = 0.78,
        estimator: Estimator = "ablate",
        allocation: Allocation = "sensitivity",
        warmup: int | float = 0.1,
        ramp: int | float = 0.1,
        release: int | float = 0.1,
        min_keep: float = 0.4,
        protected: float = 0.15,
        measure_every: int | float = 0.05,
        num_batches: int = 4,
        max_overhead: float = 0.01,
        ema: float = 0.7,
        pinned: Sequence[int] = (),
        sampler: Sampler = "systematic",
        scale: Scale = "none",
        seed: int = 0,
        check_ranks_every: int = 100,
        folder: str | None = None,
    ) -> None:
        super().__init__(pinned=pinned, sampler=sampler, scale=scale, seed=seed, check_ranks_every=check_ranks_every)
        require_one_of("estimator", estimator, get_args(Estimator))
        require_one_of("allocation", allocation, get_args(Allocation))
        for argument, share in (("kept", kept), ("min_keep", min_keep), ("max_overhead", max_overhead)):
            if not is_number(share) or not 0 < share <= 1:
                raise ValueError(f"{argument} is {share!r}; it is a share and must be in (0, 1].")
        for argument, share in (("protected", protected), ("ema", ema)):
            if not is_number(share) or not 0 <= share < 1:
                raise ValueError(f"{argument} is {share!r}; it is a share and must be in [0, 1).")
        require_whole("num_batches", num_batches, 1, of="batches of a measurement")
        for argument, duration in (
            ("warmup", warmup),
            ("ramp", ramp),
            ("release", release),
            ("measure_every", measure_every),
        ):
            require_duration(argument, duration)
        self.kept, self.min_keep, self.max_overhead = kept, min_keep, max_overhead
        self.protected, self.ema = protected, ema
        self.estimator: Estimator = estimator
        self.allocation: Allocation = allocation
        self.warmup, self.ramp, self.release, self.measure_every = warmup, ramp, release, measure_every
        self.num_batches = num_batches
        self.folder = folder

    def _clear(self) -> None:
        super()._clear()
        self.sensitivities: list[float] | None = None
        """Running mean of what each block is worth; ``None`` before the first measurement."""
        self.history = History()
        self._blocks: BlockList | None = None
        self._loaded_block_list: dict[str, Any] | None = None
        self._next: int | None = None
        self._collected: list[list[float]] = []
        self._num_measured_tokens: int | None = None
        self._meter: Meter | None = None
        self._allocated: tuple[float, list[float]] | None = None
        self._has_warned_of_zeros = False
        self._has_warned_of_cost = False
        self._has_warned_of_overflow = False

    # Before training

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse whatever could not work, before anything is trained."""
        name = type(self).__name__
        if stage == "fit" and self.drops and self.estimator == "ablate" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f'{name}: estimator="ablate" calls the training step to measure it, and with manual optimization '
                'that would train. Use "taylor", "ratio" or "cos".'
            )
        if stage == "fit" and self.drops and self.estimator == "ablate" and fetches_itself(pl_module):
            raise MisconfigurationException(
                f'{name}: estimator="ablate" calls the training step with a batch to measure it, and this one takes '
                'batches from a dataloader_iter by itself. Use "taylor", "ratio" or "cos".'
            )
        super().setup(trainer, pl_module, stage)

    def _take(self, anatomy: Anatomy) -> None:
        super()._take(anatomy)
        if not self.units:
            return
        num_blocks = len(anatomy.blocks)
        # A second fit of the same trainer goes on with its members.
        if self._blocks is None or self._blocks.num_blocks != num_blocks:
            self._blocks = BlockList(num_blocks, self.units, self.protected, set(range(num_blocks)) - set(self.units))
        self._load_block_list()
        self.check_level(anatomy)

    def check_level(self, anatomy: Anatomy) -> None:
        """Check that the budget can be met by a model of some size."""
        units = droppable_blocks(anatomy, self.pinned, type(self).__name__)
        num_blocks = len(anatomy.blocks)
        num_protected = len({units[0], units[-1]}) + math.ceil(self.protected * len(units) - 1e-9)
        never = set(range(num_blocks)) - set(units) | set(units[: min(num_protected, len(units))])
        # Blocks are taken as equally expensive, which they are but for stages of Swin, and there nearly.
        floor = floor_of([1.0] * num_blocks, self.min_keep, never)
        if self.kept < floor:
            raise MisconfigurationException(
                f"kept is {self.kept}, but with min_keep {self.min_keep} and up to {len(never)} of the {num_blocks} "
                f"blocks never dropped (pinned, in short stages, first, last, most sensitive) {floor:.2f} is the "
                "least. Raise kept, or lower min_keep or protected."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that no step is left without a gradient, that what is measured is there, and intercept the blocks."""
        transformer = find_transformer(pl_module)[1]
        anatomy = anatomy_of(transformer)
        if units := self._units_of(anatomy):
            # The first and the last of them always run.
            between = units[1:-1]
            num_dropped = math.ceil((1 - self.kept) * len(anatomy.blocks))
            num_dropped = len(between) if self.sampler == "bernoulli" else min(num_dropped, len(between))
            require_gradient(pl_module, transformer, anatomy, between, num_dropped)
            if self.estimator == "taylor":
                require_gradients_of_all(transformer, anatomy, units, type(self).__name__)
        super().on_train_start(trainer, pl_module)

    # Keep probabilities

    def probabilities(self, step: int) -> list[float]:
        """Return the keep probability of each block at an optimizer step."""
        assert self.anatomy is not None
        assert self._blocks is not None
        kept = self._kept_share(self._coordinator.schedule_step(step))
        if kept == 1 or self.sensitivities is None or (self.estimator in ESTIMATES and self._is_due(step)):
            return [1.0] * len(self.anatomy.blocks)
        # Solved anew only where the budget has moved visibly; planned FLOPs are those of the solution.
        kept = round(kept, 4)
        if self._allocated is None or self._allocated[0] != kept:
            assert self._num_measured_tokens is not None
            values = robust(self.sensitivities)
            costs = training_flops(self.anatomy, 1, self._num_measured_tokens).blocks
            always = self._blocks.members
            if floor_of(costs, self.min_keep, always) > self.kept:
                # Those that stay on the list for a while longer would cost more than there is.
                always = self._blocks.most_sensitive
            probabilities = allocate(
                kept,
                costs,
                sensitivities=values,
                min_keep=self.min_keep,
                always=always,
                allocation="uniform" if values is None else self.allocation,
            )
            self._allocated = kept, probabilities
        return self._allocated[1]

    # Measurements

    def _is_due(self, step: int) -> bool:
        assert self.num_steps is not None
        assert self._next is not None
        if not self.units or step >= self._coordinator.dense_steps[1]:
            # Nothing is dropped any more that a measurement could be for.
            return False
        is_released = self._release > 0 and step >= self.num_steps - self._release
        return bool(self._collected) or (step >= self._next and not is_released)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is time, and draw the blocks of a new optimizer step."""
        if self._dropper is not None and self._follower is not None:
            # Now: what is measured is the model of this step.
            self._follower.refresh()
            if trainer.global_step != self._step and self._coordinator.begins_phase(trainer.global_step):
                self._measure_anew(trainer)
        if self._dropper is not None and self._is_due(trainer.global_step):
            routing = self._dropper.routing
            if self.estimator == "ablate":
                with measuring(trainer, pl_module):
                    _, changes = ablate(routing, lambda: training_loss(pl_module, batch, batch_idx), self.units)
                values = [0.0] * len(routing.blocks)
                for unit, change in zip(self.units, changes, strict=True):
                    values[unit] = change
                self._collect(trainer, values)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if (
            self.estimator in ESTIMATES
            and all(self.keep)
            and self._dropper is not None
            and self._is_due(trainer.global_step)
        ):
            self._meter = Meter(self._dropper.routing, self.estimator)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take what was measured in training, and keep the books."""
        if self._meter is not None:
            values = self._meter.close()
            self._meter = None
            self._collect(trainer, [v if i in self.units else 0.0 for i, v in enumerate(values)])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _draw(self, step: int) -> None:
        super()._draw(step)
        assert self.num_steps is not None
        values = self._of_full_model(self.keep_probabilities)
        self.history.add_keep(step, values, every=math.ceil(self.num_steps / 200))

    def _on_resized(self, before: Anatomy, after: Anatomy) -> None:
        """Average sensitivities where blocks were merged, and copy them where blocks were."""
        self._collected, self._allocated = [], None
        assert self._full is not None
        if self.sensitivities is None or not self.units:
            return
        # Not always the model before this one: nothing is dropped or measured at levels that the rules leave out.
        levels = self._coordinator.anatomies(self._full)
        before = next(level for level in levels if len(level.blocks) == len(self.sensitivities))
        measured = set(droppable_blocks(before, self.pinned, type(self).__name__))
        overall = statistics.fmean(self.sensitivities[index] for index in measured)
        values = []
        for sources in self._coordinator.sources_of_blocks(before, after):
            known = [self.sensitivities[index] for index in sources if index in measured]
            values.append(statistics.fmean(known) if known else overall)
        self.sensitivities = [value if index in self.units else 0.0 for index, value in enumerate(values)]
        if robust(self.sensitivities) is not None:
            assert self._blocks is not None
            self._blocks.update(self.sensitivities)

    def _measure_anew(self, trainer: L.Trainer) -> None:
        """Have the model measured that there is from now on, if that can be paid for."""
        if self._next is None or self._num_measured_tokens is None:
            return
        num_left = self._affordable(trainer) - self.num_batches * len(self.history.measured_at)
        if num_left >= self.num_batches:
            self._next = min(self._next, trainer.global_step)

    def _of_full_model(self, values: Sequence[float]) -> list[float]:
        """Return for each block of the full model what holds for the one that stands for it at the present size."""
        assert self.anatomy is not None
        assert self._full is not None
        if self.anatomy.size == self._full.size:
            return list(values)
        sources = self._coordinator.sources_of_blocks(self.anatomy, self._full)
        return [values[index] for (index,) in sources]

    def _collect(self, trainer: L.Trainer, values: list[float]) -> None:
        assert self.num_steps is not None
        assert self._blocks is not None
        # All that decisions depend on is the same on every rank, bit for bit, after each batch: a checkpoint holds rank
        # 0's, and ranks may see sequences of different lengths.
        if trainer.world_size > 1:
            # In single precision, which every device has.
            mine = torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device)
            values = trainer.strategy.reduce(mine, reduce_op="mean").tolist()
        values, self._num_measured_tokens = trainer.strategy.broadcast((values, self._num_tokens))
        if self._num_measured_tokens is None:
            self._refuse_unseen_call()
        if self.estimator == "taylor":
            # Only now: each rank's own total is another one.
            total = sum(values)
            if not math.isfinite(total):
                # A gradient scaler that tries too large a factor: it skips this step, and nothing is learnt from it.
                # The measurement stays due, so the next batch is taken in place of this one.
                self._warn_of_overflow(trainer.global_step)
                return
            if total > 0:
                # The factor of a gradient scaler is in them, and changes.
                values = [value / total for value in values]
        elif not any(math.isfinite(values[index]) for index in self.units):
            # The full model's loss was not finite, or its step took no notice of the batch: nothing was measured.
            self._warn_of_overflow(trainer.global_step)
            self._next = trainer.global_step + max(1, self._interval)
            return
        self._collected.append(values)
        num_affordable = self._affordable(trainer)
        if len(self._collected) < min(self.num_batches, max(1, math.floor(num_affordable))):
            return
        num_batches = len(self._collected)
        mean = torch.tensor(self._collected, dtype=torch.float64).mean(0)
        self._collected = []
        # Without which the loss overflows or is undefined can least of all be dropped.
        worst = 2 * max((abs(value) for value in mean.tolist() if math.isfinite(value)), default=0.0) or 1.0
        fresh = [value if math.isfinite(value) else worst for value in mean.tolist()]
        self.sensitivities = (
            fresh
            if self.sensitivities is None
            else [self.ema * old + (1 - self.ema) * new for old, new in zip(self.sensitivities, fresh, strict=True)]
        )
        self._allocated = None
        step = trainer.global_step
        if robust(self.sensitivities) is None:
            if not self._has_warned_of_zeros:
                self._has_warned_of_zeros = True
                found = "made a difference" if not any(self.sensitivities) else "could be told to lower the loss"
                rank_zero_warn(
                    f"{type(self).__name__}: no block {found} at step {step}, as in a model that is young or whose "
                    "residual branches still end in zeros. Blocks are dropped uniformly until one is. A longer warmup "
                    "helps."
                )
        else:
            self._blocks.update(self.sensitivities)
        self.history.add_sensitivities(step, self._of_full_model(self.sensitivities))
        # As many measurements as can be paid for, spread over what is left before the release.
        num_left = max(0, math.floor((num_affordable - num_batches * len(self.history.measured_at)) / num_batches))
        last = self.num_steps - self._release
        spread = math.ceil((last - step) / num_left) if num_left else self.num_steps
        self._next = step + max(1, self._interval, spread)
        rank_zero_info(
            f"{type(self).__name__}: step {step}: measured on {num_batches} batches; never dropped are blocks "
            f"{', '.join(map(str, sorted(self._blocks.members)))}"
        )

    def _warn_of_overflow(self, step: int) -> None:
        if not self._has_warned_of_overflow:
            self._has_warned_of_overflow = True
            is_gradient = self.estimator == "taylor"
            what = "gradients were" if is_gradient else "the loss was"
            until = "all blocks run" if is_gradient else "nothing new is known"
            rank_zero_warn(
                f"{type(self).__name__}: {what} not finite at step {step}, where sensitivities were measured. That "
                f"batch does not count, another one is measured, and {until} until then. With a gradient scaler this "
                "happens now and then; without one the training has diverged."
            )

    def _on_unseen_call(self) -> None:
        # At the first batch, and not only at the end of the warm-up, when it is measured.
        if self._num_tokens is None:
            self._refuse_unseen_call()
        super()._on_unseen_call()

    def _refuse_unseen_call(self) -> None:
        what_follows = "So the length of its sequences is not known, without which no budget can be kept."
        raise MisconfigurationException(why_calls_are_not_seen(type(self).__name__, what_follows))

    def _affordable(self, trainer: L.Trainer) -> float:
        """Return how many batches may be measured in the whole run."""
        assert self.anatomy is not None
        assert self._num_measured_tokens is not None
        assert self.num_steps is not None
        training = training_flops(self.anatomy, 1, self._num_measured_tokens)
        if self.estimator == "ablate":
            forward = forward_flops(self.anatomy, 1, self._num_measured_tokens)
            cost = ablation_flops(forward.blocks, forward.outside_blocks, self.units)
        else:
            # What running every block costs.
            cost = math.ceil((1 - self.kept) * sum(training.blocks))
        # Less than what the run costs, so that the share of what it does cost is kept in any case.
        run = self.num_steps * trainer.accumulate_grad_batches * self.kept * training.total
        affordable = self.max_overhead * run / cost
        if affordable < 1 and not self._has_warned_of_cost:
            self._has_warned_of_cost = True
            rank_zero_warn(
                f"{type(self).__name__}: measuring a single batch costs {self.max_overhead / affordable:.1%} of so "
                f"short a run, more than max_overhead={self.max_overhead}. It is measured once."
            )
        return affordable

    def metrics(self) -> dict[str, float]:
        """Return the sensitivities."""
        values = self.sensitivities or []
        return {f"layer_dropping/sensitivity/{index:02d}": values[index] for index in self.units if values}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the sensitivities."""
        folder = self.folder or run_folder(trainer)
        if trainer.is_global_zero and self.history.measured_at and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            assert self._full is not None
            # Of the full model, also where a run is stopped while it is small.
            units = droppable_blocks(self._full, self.pinned, type(self).__name__)
            self.history.draw(Path(folder) / FILE_NAME, units, trainer.global_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        if self._meter is not None:
            self._meter.close()
            self._meter = None
        super().teardown(trainer, pl_module, stage)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements too."""
        return primitives(
            {
                **super().state_dict(),
                "sensitivities": self.sensitivities,
                "block_list": None if self._blocks is None else self._blocks.state_dict(),
                "next": self._next,
                "collected": self._collected,
                "num_measured_tokens": self._num_measured_tokens,
                "history": self.history.to_state(),
            }
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the measurements too."""
        super().load_state_dict(state_dict)
        self.sensitivities = state_dict["sensitivities"]
        # A checkpoint of a run that dropped nothing has no measurement planned.
        self._next = self._next if state_dict["next"] is None else state_dict["next"]
        self._collected = [list(values) for values in state_dict["collected"]]
        self._num_measured_tokens = state_dict["num_measured_tokens"]
        self.history = History.from_state(state_dict["history"])
        self._allocated = None
        self._loaded_block_list = state_dict["block_list"]
        self._load_block_list()

    def _load_block_list(self) -> None:
        state = self._loaded_block_list
        # Of a model of another size, it waits until the model has that size.
        if self._blocks is not None and state is not None and state["num_blocks"] == self._blocks.num_blocks:
            self._blocks.load_state_dict(state)
            self._loaded_block_list = None

    def _rules(self) -> dict[str, Any]:
        own = ("kept", "estimator", "allocation", "warmup", "ramp", "release", "min_keep", "protected", "measure_every")
        return {
            **super()._rules(),
            **{name: getattr(self, name) for name in (*own, "num_batches", "max_overhead", "ema")},
        }
