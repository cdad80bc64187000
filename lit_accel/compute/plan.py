"""What a run will cost, exactly and before anything is trained: its decisions, step by step, in FLOPs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lit_accel.anatomy import Anatomy
from lit_accel.compute.active import Active
from lit_accel.compute.flops import Flops, training_flops
from lit_accel.compute.phases import Phase, phase_size, saved_share


@dataclass(frozen=True)
class StepDecision:
    """What of the model takes part in an optimizer step.

    Args:
        level: The model's level; 0 is the full model.
        keep: Of each block, whether it runs, or with which probability it does; ``None`` for all of them.
        kept_tokens: Tokens of a sequence that blocks run on, by their indices; blocks that are not named run on all.
        active: Which units are on; ``None`` where none is ever off.
    """

    level: int = 0
    keep: tuple[float, ...] | None = None
    kept_tokens: Mapping[int, int] = field(default_factory=dict)
    active: Active | None = None


@dataclass(frozen=True)
class Workload:
    """What an optimizer step is given to work on, by all ranks together.

    Args:
        num_sequences: Sequences of a micro-batch.
        num_tokens: Tokens of each.
        num_micro_batches: Micro-batches of an optimizer step, over all ranks.
        num_merged: Micro-batches that are computed as one, by level; 1 for levels that are not named.
        activation_checkpointing: Whether blocks compute their forward pass once more in the backward pass.
    """

    num_sequences: int
    num_tokens: int
    num_micro_batches: int = 1
    num_merged: Mapping[int, int] = field(default_factory=dict)
    activation_checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.num_sequences * self.num_tokens * self.num_micro_batches


@dataclass
class PlannedPhase(Phase):
    """A stretch of the run at one size of the model, or at one of its sparsities, as the ledger will have it.

    Args:
        level: The model's level.
        start: Its first optimizer step.
        anatomy: The model.
    """

    level: int = 0
    start: int = 0
    anatomy: Anatomy | None = None


@dataclass(frozen=True)
class RunPlan:
    """What a run will cost.

    Args:
        step_flops: FLOPs of the optimizer steps that were looked at: of one in each ``stride`` of them.
        dense_step_flops: FLOPs of an optimizer step of the full model.
        phases: The phases, with everything but the seconds.
        decisions: What was decided in each of those steps.
        stride: Of how many steps one was looked at; 1 for all of them.
    """

    step_flops: tuple[int, ...]
    dense_step_flops: int
    phases: tuple[PlannedPhase, ...]
    decisions: tuple[StepDecision, ...]
    stride: int = 1

    @property
    def flops(self) -> int:
        """FLOPs of the run."""
        return sum(phase.flops for phase in self.phases)

    @property
    def dense_flops(self) -> int:
        """FLOPs of the full model on the same batches."""
        return sum(phase.dense_flops for phase in self.phases)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return sum(phase.steps for phase in self.phases)

    @property
    def share(self) -> float:
        """FLOPs in parts of those of a dense run."""
        return 1 - saved_share(self.flops, self.dense_flops)


class StepCosts:
    """Costs of decisions, each kind counted once.

    Args:
        anatomies: The model at each level.
        workload: What a step works on.
    """

    def __init__(self, anatomies: Sequence[Anatomy], workload: Workload) -> None:
        self.anatomies, self.workload = anatomies, workload
        # The objects are kept beside their costs, so that no other can get the same identity.
        self._costs: dict[tuple[int, int, int], tuple[Flops, object, object]] = {}
        self._dense: dict[int, int] = {}

    def of(self, decision: StepDecision) -> int:
        """Return the FLOPs of an optimizer step; the expectation, where probabilities are given.

        Args:
            decision: What takes part.
        """
        flops = self._flops(decision)
        num_calls = self.workload.num_micro_batches // self._num_merged(decision.level)
        if decision.keep is None:
            return num_calls * flops.total
        blocks = sum(cost * keep for cost, keep in zip(flops.blocks, decision.keep, strict=True) if keep)
        return round(num_calls * (flops.outside_blocks + blocks))

    def dense(self, level: int) -> int:
        """Return the FLOPs of an optimizer step of the full model, on batches that are merged as at a level."""
        if level not in self._dense:
            work, merged = self.workload, self._num_merged(level)
            flops = training_flops(
                self.anatomies[0],
                work.num_sequences * merged,
                work.num_tokens,
                activation_checkpointing=work.activation_checkpointing,
            )
            self._dense[level] = work.num_micro_batches // merged * flops.total
        return self._dense[level]

    def _num_merged(self, level: int) -> int:
        return self.workload.num_merged.get(level, 1)

    def _flops(self, decision: StepDecision) -> Flops:
        key = (decision.level, id(decision.kept_tokens) if decision.kept_tokens else 0, id(decision.active))
        if key not in self._costs:
            work = self.workload
            flops = training_flops(
                self.anatomies[decision.level],
                work.num_sequences * self._num_merged(decision.level),
                work.num_tokens,
                activation_checkpointing=work.activation_checkpointing,
                kept=decision.kept_tokens,
                active=decision.active,
            )
            self._costs[key] = flops, decision.kept_tokens, decision.active
        return self._costs[key][0]


def plan_run(
    decide: Callable[[int], StepDecision],
    num_steps: int,
    anatomies: Sequence[Anatomy],
    workload: Workload,
    *,
    stride: int = 1,
) -> RunPlan:
    """Add up what a run costs.

    Args:
        decide: Returns the decision of an optimizer step; called in order.
        num_steps: Optimizer steps of the run.
        anatomies: The model at each level, the full one first.
        workload: What a step works on.
        stride: Look at one of so many steps only, at no fixed place among them, and let it stand for all.
    """
    costs = StepCosts(anatomies, workload)
    phases: list[PlannedPhase] = []
    step_flops, decisions = [], []
    for step in range(0, num_steps, stride):
        number = min(stride, num_steps - step)
        # Not always the first of them: what a method does every so many steps would be seen always or never.
        decision = decide(step + zlib.crc32(str(step).encode()) % number)
        anatomy = anatomies[decision.level]
        size = phase_size(anatomy, decision.active)
        if not phases or phases[-1].size != size:
            parameters = anatomy.num_parameters if decision.active is None else decision.active.num_parameters
            phases.append(
                PlannedPhase(size=size, num_parameters=parameters, level=decision.level, start=step, anatomy=anatomy)
            )
        cost = costs.of(decision)
        phase = phases[-1]
        phase.steps += number
        phase.tokens += number * workload.tokens
        phase.flops += number * cost
        phase.dense_flops += number * costs.dense(decision.level)
        step_flops.append(cost)
        decisions.append(decision)
    return RunPlan(tuple(step_flops), costs.dense(0), tuple(phases), tuple(decisions), stride)
