"""Owns what is decided about each optimizer step, where several methods decide about the same model."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.anatomy import Anatomy, anatomy_of, find_transformer, uses_activation_checkpointing
from lit_accel.compute.plan import RunPlan, StepDecision, Workload, plan_run
from lit_accel.methods.compatibility import check_clashes, check_pairs, in_order, warn_about
from lit_accel.methods.method import Method
from lit_accel.methods.strategy_checks import check_strategy
from lit_accel.resizing import begin_anew, full_size
from lit_accel.run_length import estimated_steps, length_of_run
from lit_accel.schedules import num_steps_of

# Longer runs are predicted from so many of their steps, evenly spread; for a first look fewer will do.
MOST_STEPS, _FEW_STEPS = 20_000, 2_000


@dataclass(frozen=True)
class Rules:
    """What must hold for all methods of a run together; see :class:`~lit_accel.Composition`."""

    dense_warmup: int | float = 0
    dense_tail: int | float = 0
    drop_levels: tuple[int, ...] | None = None
    schedules: Literal["run", "level"] = "run"
    least_cost: float = 0.3


class Coordinator:
    """Decides about the steps of one Trainer, out of what its methods want and of what must hold for all of them.

    :func:`coordinator_of` returns it. Methods ask it before they leave anything out; a plan asks it for whole runs.
    What it says is a pure function of the optimizer step.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        # Weakly: it is a value in a dictionary that holds its keys weakly.
        self._trainer = weakref.ref(trainer)
        self._warned: list[str] = []
        self.begin()

    def begin(self) -> None:
        """Forget what was known of an earlier fit."""
        self._dense: tuple[int, float] | None = None
        self._is_checked = self._is_cost_checked = False

    @property
    def trainer(self) -> L.Trainer:
        """The Trainer."""
        trainer = self._trainer()
        assert trainer is not None
        return trainer

    @property
    def methods(self) -> list[Method]:
        """The methods of the run that do something, in the order in which they decide."""
        callbacks: Sequence[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return in_order(c for c in callbacks if isinstance(c, Method) and not c.is_neutral)

    @property
    def rules(self) -> Rules:
        """What the user wants to hold for all methods together."""
        callbacks: Sequence[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        given = (getattr(callback, "rules", None) for callback in callbacks)
        return next((rules for rules in given if isinstance(rules, Rules)), Rules())

    @property
    def num_levels(self) -> int:
        """Levels that the model can have, the full model included."""
        return 1 + sum(len(method.levels) for method in self._deciding("size"))

    # Before training

    def check(self) -> None:
        """Check that the methods go together and with the strategy, and have them act in their order.

        Raises:
            MisconfigurationException: If one does not.
        """
        self.begin()
        trainer = self.trainer
        for method in self._deciding("size"):
            # Before others look at the levels, in whatever order they are set up.
            method.take_sizes(trainer, trainer.lightning_module)
        callbacks: list[L.Callback] = list(trainer.callbacks)  # type: ignore[attr-defined]
        warnings = check_pairs([callback for callback in callbacks if isinstance(callback, Method)])
        for method in self.methods:
            check_strategy(trainer, method)
        if warnings != self._warned:
            warn_about(warnings)
            self._warned = warnings
        # Each keeps the places that methods have among the other callbacks.
        sorted_methods = iter(in_order(callback for callback in callbacks if isinstance(callback, Method)))
        trainer.callbacks = [  # type: ignore[attr-defined]
            next(sorted_methods) if isinstance(callback, Method) else callback for callback in callbacks
        ]

    def check_run(self, module: L.LightningModule) -> None:
        """Check what can be checked once the length of the run is known to all, and say what the run will cost.

        Args:
            module: The LightningModule.

        Raises:
            MisconfigurationException: If settings clash, something is left out where all is to be dense, or so much is
                left out that hardly anything remains.
        """
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            begin_anew(self.trainer, module)
        methods = self.methods
        if self._is_checked or not all(method.is_planned for method in methods):
            return
        self._is_checked = True
        check_clashes(methods)
        self._check_rules()
        is_rehearsal = bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
        if not is_rehearsal:
            self._check_dense_steps()
        workload = workload_of(self.trainer, module, methods)
        if workload is not None:
            self.check_cost(anatomy_of(find_transformer(module)[1]).at(full_size(module)), workload)

    def check_cost(self, full: Anatomy, workload: Workload) -> None:
        """Say what a run of several methods will cost, once, and refuse it if hardly anything is left of it.

        Args:
            full: The full model.
            workload: What an optimizer step works on.

        Raises:
            MisconfigurationException: If it costs less than the least that is allowed.
        """
        methods = self.methods
        if self._is_cost_checked or len(methods) < 2 or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._is_cost_checked = True
        if self._num_steps is None:
            # A run without an end has no cost.
            return
        share = self.plan(full, workload, most_steps=_FEW_STEPS, draws=False).share
        names = ", ".join(type(method).__name__ for method in methods)
        rank_zero_info(f"{names} together will cost about {share:.0%} of the FLOPs of a dense run.")
        least = self.rules.least_cost
        if share < least:
            raise MisconfigurationException(
                f"{names} together leave {share:.1%} of the FLOPs of a dense run, less than least_cost={least}. So "
                "much noise from several methods at once has not been shown to pay. Leave out less, or say that you "
                "want it with Composition(least_cost=0)."
            )

    def on_first_call(self, full: Anatomy, num_sequences: int, num_tokens: int) -> None:
        """Check the cost of a run of which nobody has said before how long its sequences are.

        It is called from within a call of the model, which must not be looked at now: FSDP has gathered its parameters.

        Args:
            full: The full model.
            num_sequences: Sequences of a call of the transformer.
            num_tokens: Tokens of each.
        """
        if self._is_cost_checked or len(self.methods) < 2:
            return
        if self.trainer.world_size > 1:
            # Sequences of other ranks may be longer, and all are to come to the same decision.
            num_sequences, num_tokens = self.trainer.strategy.broadcast((num_sequences, num_tokens))
        self.check_cost(full, Workload(num_sequences, num_tokens))

    def _check_rules(self) -> None:
        start, end = self.dense_steps
        if start >= end and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"dense_warmup ends at step {start}, where dense_tail has begun (at {end:.0f}): nothing would be left "
                "out. Shorten them."
            )
        if wrong := [level for level in self.rules.drop_levels or () if level >= self.num_levels]:
            raise MisconfigurationException(
                f"drop_levels names level {wrong[0]}, and the levels of this run are 0"
                f"{f' to {self.num_levels - 1}' if self.num_levels > 1 else ', the full model, alone'}."
            )

    def _check_dense_steps(self) -> None:
        """Refuse what cannot simply be left undone for some steps: sizes and units have schedules of their own."""
        start, end = self.dense_steps
        for method in (*self._deciding("size"), *self._deciding("units")):
            for first, last in method.spans():
                inside = "dense_warmup" if first < start else "dense_tail" if last > end else None
                if inside is not None and first < last:
                    has_pattern = getattr(method, "attention_pattern", None) is not None
                    stages = "stages or attention_phase" if has_pattern else "stages"
                    what = "phases" if method.decides == "size" else stages
                    raise MisconfigurationException(
                        f"{inside} wants the whole model in steps {f'0 to {start - 1}' if first < start else ''}"
                        f"{f'from {math.ceil(end)} on' if first >= start else ''}, and {type(method).__name__} leaves "
                        f"something out in steps {first} to {last - 1}. Move its {what}, or shorten {inside}."
                    )

    # During training

    @property
    def _num_steps(self) -> int | None:
        return estimated_steps(self.trainer)

    @property
    def dense_steps(self) -> tuple[int, float]:
        """The end of the steps at the start, and the start of those at the end, in which nothing is left out."""
        if self._dense is None:
            rules = self.rules
            if rules.dense_warmup == 0 and rules.dense_tail == 0:
                self._dense = 0, math.inf
            else:
                num_steps = length_of_run(self.trainer, "Composition")
                warmup, tail = (num_steps_of(d, num_steps) for d in (rules.dense_warmup, rules.dense_tail))
                self._dense = warmup, num_steps - tail
        return self._dense

    def may_drop(self, step: int, level: int | None = None) -> bool:
        """Whether blocks and tokens may be left out in an optimizer step.

        Args:
            step: The step.
            level: The model's level in it; default: what multi-level training says.
        """
        start, end = self.dense_steps
        return start <= step < end and self.drops_at(self.level_at(step) if level is None else level)

    def drops_at(self, level: int) -> bool:
        """Whether blocks and tokens may be dropped at a level of the model.

        Args:
            level: The level.
        """
        levels = self.rules.drop_levels
        # A level of no phase is trained in no step: a model that comes with it grows before the first one.
        is_trained = all(any(phase.level == level for phase in method.phases) for method in self._deciding("size"))
        return is_trained and (levels is None or level in levels)

    def drops_from(self, anatomy: Anatomy) -> bool:
        """Whether blocks and tokens may be dropped from the model at one of its sizes.

        Args:
            anatomy: The model.
        """
        return self.drops_at(next((method.level_of(anatomy.size) for method in self._deciding("size")), 0))

    def runs_all_blocks(self, step: int) -> bool:
        """Whether no block may be dropped in an optimizer step: nothing may, or units are chosen by gradient.

        Args:
            step: The step.
        """
        return not self.may_drop(step) or any(method.needs_all_blocks(step) for method in self.methods)

    def begins_phase(self, step: int) -> bool:
        """Whether the model is another one from this optimizer step on, so that measurements of it are out of date.

        Args:
            step: The step.
        """
        return any(method.begins_phase(step) for method in self.methods)

    def transitions(self, step: int) -> list[str]:
        """Return what changes about the model right before or in an optimizer step, in words.

        Args:
            step: The step.
        """
        changes = [method.transition(step) for method in self.methods]
        drops = any(method.decides in ("layers", "tokens") for method in self.methods)
        if drops and step and self.may_drop(step) and not self.may_drop(step - 1):
            changes.append("blocks or tokens are dropped from here on")
        return [change for change in changes if change is not None]

    def level_at(self, step: int) -> int:
        """Return the model's level at an optimizer step.

        Args:
            step: The step.
        """
        return next((m.level_at(step) for m in self._deciding("size")), 0)

    def schedule_step(self, step: int) -> int:
        """Return where the schedules of blocks and tokens are in an optimizer step.

        Where each level runs through them by itself, this is the share of the level's steps that is done, in steps of
        the whole run.

        Args:
            step: The step.
        """
        levels = self._deciding("size") if self.rules.schedules == "level" else []
        if not levels:
            return step
        done, of_level, of_run = levels[0].steps_at_level(step)
        return done * of_run // of_level

    def sources_of_blocks(self, before: Anatomy, after: Anatomy) -> list[tuple[int, ...]]:
        """Return for each block of a resized model those blocks of the former one that it was made from.

        Args:
            before: The former model.
            after: The present one.
        """
        for method in self._deciding("size"):
            return method.sources_of_blocks(before.size, after.size)
        return [(index,) for index in range(len(after.blocks))]

    def _deciding(self, decision: str, methods: Collection[Method] | None = None) -> list[Any]:
        return [m for m in (self.methods if methods is None else methods) if m.decides == decision]

    # Planning

    def anatomies(self, full: Anatomy) -> list[Anatomy]:
        """Return the model at each level.

        Args:
            full: The full model.
        """
        return [full, *(step.small for method in self._deciding("size") for step in method.plan_levels(full))]

    def plan(
        self,
        full: Anatomy,
        workload: Workload,
        methods: Collection[Method] | None = None,
        *,
        most_steps: int = MOST_STEPS,
        draws: bool = True,
    ) -> RunPlan:
        """Predict what the run will cost.

        Args:
            full: The full model.
            workload: What an optimizer step works on.
            methods: Which methods act; default: all of them.
            most_steps: A longer run is predicted from so many of its steps, evenly spread.
            draws: Whether the very blocks are drawn that the run will draw, where every step is looked at. Otherwise,
                and where draws depend on measurements, the expectation is predicted.
        """
        chosen = self.methods if methods is None else in_order(methods)
        num_steps = length_of_run(self.trainer, "Composition")
        anatomies = self.anatomies(full)
        stride = max(1, math.ceil(num_steps / most_steps))
        # Draws depend on all earlier steps.
        decide = self._decider(anatomies, workload, chosen, draws=draws and stride == 1)
        return plan_run(decide, num_steps, anatomies, workload, stride=stride)

    def _decider(
        self, anatomies: Sequence[Anatomy], workload: Workload, methods: Collection[Method], *, draws: bool
    ) -> Callable[[int], StepDecision]:
        levels, units, layers, tokens = (
            next(iter(self._deciding(decision, methods)), None) for decision in ("size", "units", "layers", "tokens")
        )
        draw = layers.planned_draws() if layers is not None and draws else None
        num_tokens = workload.num_tokens
        dropping = {level: anatomy for level, anatomy in enumerate(anatomies) if self.drops_at(level)}
        blocks_at = {level: layers.plan_blocks(one, num_tokens) for level, one in dropping.items() if layers}
        tokens_at = {level: tokens.plan_tokens(one, num_tokens) for level, one in dropping.items() if tokens}
        units_at = [] if units is None else [units.plan_units(anatomy) for anatomy in anatomies]

        def decide(step: int) -> StepDecision:
            level = 0 if levels is None else levels.level_at(step)
            may_drop = self.may_drop(step, level)
            keep = None
            if layers is not None:
                runs_all = not may_drop or any(method.needs_all_blocks(step) for method in methods)
                keep = [1.0] * len(anatomies[level].blocks) if runs_all else blocks_at[level](self.schedule_step(step))
                keep = keep if draw is None else draw(step, keep)
            return StepDecision(
                level=level,
                keep=None if keep is None else tuple(keep),
                kept_tokens=tokens_at[level](self.schedule_step(step)) if tokens_at and may_drop else {},
                active=units_at[level](step) if units_at else None,
            )

        return decide


def merged_batches(methods: Sequence[Method]) -> dict[int, int]:
    """Return how many micro-batches are computed as one, by level.

    Args:
        methods: The methods of a run.
    """
    levels = [level.merge_batches for method in methods for level in getattr(method, "levels", ())]
    return dict(enumerate(levels, 1))


def workload_of(trainer: L.Trainer, module: L.LightningModule, methods: Sequence[Method]) -> Workload | None:
    """Return what an optimizer step works on, where the model or the data module says it.

    Args:
        trainer: The Trainer.
        module: Its module.
        methods: The methods of the run.

    Returns:
        The workload, or ``None`` where nobody says how long sequences are.
    """
    data = getattr(trainer, "datamodule", None)
    transformer = find_transformer(module)[1]
    # First: it refuses what cannot be counted.
    recomputes = transformer.training and uses_activation_checkpointing(transformer)
    given = [getattr(method, "num_tokens", None) for method in methods]
    num_tokens = (
        next((num for num in given if num), None)
        or anatomy_of(transformer).num_tokens
        or getattr(data, "block_size", None)
    )
    if num_tokens is None:
        return None
    return Workload(
        num_sequences=num_sequences_of(trainer),
        num_tokens=num_tokens,
        num_micro_batches=trainer.accumulate_grad_batches * trainer.world_size,
        num_merged=merged_batches(methods),
        activation_checkpointing=recomputes,
    )


def num_sequences_of(trainer: L.Trainer) -> int:
    """Return how many sequences a micro-batch has, where the data module says it; 1 otherwise.

    Args:
        trainer: The Trainer.
    """
    batch_size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    return batch_size if isinstance(batch_size, int) and batch_size > 0 else 1


_COORDINATORS: weakref.WeakKeyDictionary[L.Trainer, Coordinator] = weakref.WeakKeyDictionary()


def coordinator_of(trainer: L.Trainer) -> Coordinator:
    """Return the coordinator of a Trainer, the same for all who ask.

    Args:
        trainer: The Trainer.
    """
    if trainer not in _COORDINATORS:
        _COORDINATORS[trainer] = Coordinator(trainer)
    return _COORDINATORS[trainer]
