"""What a run will be like, before anything is trained: its cost by phase and by method, its memory, what speaks against
it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lit_accel.anatomy import Anatomy, anatomy_of, build_resized, find_transformer, uses_activation_checkpointing
from lit_accel.arguments import require_whole
from lit_accel.compute.plan import PlannedPhase, RunPlan, Workload
from lit_accel.methods.coordinator import coordinator_of, merged_batches
from lit_accel.planning.first_call import FirstCall, first_call
from lit_accel.planning.memory import MOMENTS, Activations, activations_of
from lit_accel.planning.rehearsal import rehearse
from lit_accel.resizing import full_size
from lit_accel.run_length import length_of_run

_BYTES = {"64-true": 8, "bf16-true": 2, "16-true": 2}


@dataclass(frozen=True)
class PhaseMemory:
    """Most bytes that a phase needs at a time, of one process that holds the whole model.

    Args:
        weights: Of all parameters; units that are off are kept beside the model.
        gradients: Of those that take part.
        optimizer: What the optimizer keeps; ``None`` where its kind is not known.
        activations: What the forward pass of a micro-batch saves for the backward pass; ``None`` where the model could
            not be followed.
    """

    weights: int
    gradients: int
    optimizer: int | None
    activations: float | None

    @property
    def is_complete(self) -> bool:
        """Whether all of them are known."""
        return self.optimizer is not None and self.activations is not None

    @property
    def total(self) -> float:
        """All that is known of them."""
        return self.weights + self.gradients + (self.optimizer or 0) + (self.activations or 0)


@dataclass(frozen=True)
class Forecast:
    """What a run will be like.

    Args:
        plan: What it costs, with all methods together.
        alone: What it would cost with each method alone, by the name of its callback.
        workload: What an optimizer step works on.
        memory: By phase.
        warnings: What speaks against it.
        is_expectation: Whether blocks that run depend on measurements or draws that were not made.
        seconds: Predicted seconds of each phase, of those steps that were evaluated; ``None`` without a calibration.
    """

    plan: RunPlan
    alone: dict[str, RunPlan]
    workload: Workload
    memory: tuple[PhaseMemory, ...]
    warnings: tuple[str, ...]
    is_expectation: bool
    seconds: tuple[float, ...] | None = None


def plan(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: Any = None,
    *,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    world_size: int | None = None,
) -> Forecast:
    """Predict what a run will cost and need, with the schedules of all its methods, step by step.

    What ``trainer.fit`` would refuse before training is refused here too, but for some checks of blocks that are frozen
    or in evaluation mode. The module may be built on the meta device (``with torch.device("meta")``), so that models of
    any size can be planned.

    Args:
        trainer: The Trainer with its callbacks; it must not be used to train afterwards.
        module: Its module.
        data: Its data module or training loader; ``None`` if the module brings its own.
        num_sequences: Sequences of a micro-batch. Default: those of the first training batch.
        num_tokens: Tokens of each. Default: the same.
        world_size: Processes of the run. Default: those of the trainer.

    Raises:
        ValueError: If ``num_sequences`` or ``num_tokens`` cannot be.
        MisconfigurationException: If the run is refused, or its length is not known.
        PlanError: If it cannot be found out what the transformer is called with.
    """
    for name, number in (("num_sequences", num_sequences), ("num_tokens", num_tokens)):
        if number is not None:
            require_whole(name, number, 1)

    def make() -> Forecast:
        return _forecast(trainer, module, num_sequences, num_tokens, world_size or trainer.world_size)

    forecast, said = rehearse(trainer, module, data, make)
    return replace(forecast, warnings=tuple(said))


def _forecast(
    trainer: L.Trainer, module: L.LightningModule, num_sequences: int | None, num_tokens: int | None, world_size: int
) -> Forecast:
    length_of_run(trainer, "A plan")
    if world_size != trainer.world_size and trainer.max_steps == -1:
        raise MisconfigurationException(
            f"The run is to have {world_size} processes, and how many optimizer steps its epochs have then depends on "
            "how the data is shared out. Give the Trainer max_steps."
        )
    transformer = find_transformer(module)[1]
    full = anatomy_of(transformer).at(full_size(module))
    longest = full.max_tokens
    if num_tokens is not None and longest and num_tokens > longest:
        raise MisconfigurationException(
            f"num_tokens is {num_tokens}, and this {full.family} model has positions for {longest} tokens. Give fewer, "
            "or plan a model with more positions."
        )
    coordinator = coordinator_of(trainer)
    is_given = num_sequences is not None and num_tokens is not None
    call = None if is_given else first_call(trainer, module)
    workload = Workload(
        num_sequences=num_sequences or (call.num_sequences if call else 1),
        num_tokens=num_tokens or (call.num_tokens if call else 1),
        num_micro_batches=trainer.accumulate_grad_batches * world_size,
        num_merged=merged_batches(coordinator.methods),
        activation_checkpointing=transformer.training and uses_activation_checkpointing(transformer),
    )
    coordinator.check_cost(full, workload)
    together = coordinator.plan(full, workload)
    methods = coordinator.methods
    alone = {type(method).__name__: coordinator.plan(full, workload, [method]) for method in methods}
    levels = {phase.level: phase.anatomy for phase in together.phases}
    activations = {level: _activations(transformer, anatomy, call, trainer) for level, anatomy in levels.items()}
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    share_trained = trained / sum(p.numel() for p in transformer.parameters())
    num_bytes = _BYTES.get(str(trainer.precision), 4)
    moments = _num_moments(trainer)
    memory = _memory(together, activations, workload, num_bytes, num_bytes * share_trained, moments)
    memory = tuple(_with_rest(each, module, transformer, num_bytes, moments) for each in memory)
    if call is not None:
        _warn_of_smaller_batches(trainer)
    measured = any(method.measures_blocks for method in methods)
    drawn = any(method.decides == "layers" for method in methods) and together.stride > 1
    return Forecast(together, alone, workload, memory, (), measured or drawn)


def _activations(
    transformer: nn.Module, anatomy: Anatomy | None, call: FirstCall | None, trainer: L.Trainer
) -> Activations | None:
    if call is None or anatomy is None:
        return None
    present, model = anatomy_of(transformer), transformer
    if anatomy.size != present.size:
        with torch.device(next(transformer.parameters()).device):
            model = build_resized(transformer, present, anatomy.size)
    try:
        return activations_of(model, call, str(trainer.precision))
    except Exception:
        # Any model can be trained, but not any can be followed without values; its cost is known all the same.
        return None


def _num_moments(trainer: L.Trainer) -> int | None:
    """Return how many tensors like a parameter the optimizers keep for each; ``None`` if that is not known."""
    numbers = {MOMENTS.get(type(optimizer)) for optimizer in trainer.optimizers}
    if len(numbers) != 1 or None in numbers:
        return None
    (number,) = numbers
    assert number is not None
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return number + sum(any(group.get(option) for group in groups) for option in ("amsgrad", "momentum"))


def _memory(
    run: RunPlan,
    activations: dict[int, Activations | None],
    workload: Workload,
    num_bytes: int,
    num_bytes_trained: float,
    num_moments: int | None,
) -> tuple[PhaseMemory, ...]:
    def of(phase: PlannedPhase, end: int) -> PhaseMemory:
        assert phase.anatomy is not None
        saved = activations[phase.level]
        most = None
        if saved is not None:
            decisions = run.decisions[-(-phase.start // run.stride) : -(-end // run.stride)]
            merged = workload.num_merged.get(phase.level, 1)
            most = merged * saved.most(phase.anatomy, decisions, workload.num_tokens)
        moments = None if num_moments is None else round(num_moments * phase.anatomy.num_parameters * num_bytes_trained)
        return PhaseMemory(
            weights=phase.anatomy.num_parameters * num_bytes,
            gradients=round(phase.num_parameters * num_bytes_trained),
            optimizer=moments,
            activations=most,
        )

    ends = [*(phase.start for phase in run.phases[1:]), run.num_steps]
    return tuple(of(phase, end) for phase, end in zip(run.phases, ends, strict=True))


def _with_rest(
    memory: PhaseMemory, module: nn.Module, transformer: nn.Module, num_bytes: int, num_moments: int | None
) -> PhaseMemory:
    """Add the parameters that a module has beside its transformer."""
    inside = {id(parameter) for parameter in transformer.parameters()}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in inside]
    trained = num_bytes * sum(parameter.numel() for parameter in rest if parameter.requires_grad)
    return replace(
        memory,
        weights=memory.weights + num_bytes * sum(parameter.numel() for parameter in rest),
        gradients=memory.gradients + trained,
        optimizer=None if memory.optimizer is None else memory.optimizer + (num_moments or 0) * trained,
    )


def _warn_of_smaller_batches(trainer: L.Trainer) -> None:
    """Say if an epoch ends with a smaller batch: a plan takes all of them to be like the first."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.batch_size is None or loader.drop_last:
        return
    try:
        num_samples = len(loader.sampler)  # type: ignore[arg-type]
    except TypeError:
        return
    if rest := num_samples % loader.batch_size:
        warnings.warn(
            f"the last batch of an epoch has {rest} samples instead of {loader.batch_size}, and the plan counts it "
            "whole. Set drop_last=True in the loader to train as planned.",
            stacklevel=1,
        )
