"""The resize itself: what a strategy does when the model changes in mid-training.

Everything in Lightning holds the LightningModule by reference, so that object stays and its children change.
What refers to parameters is made anew: the distributed wrapper (whose hooks sit on the old ones: without this,
ranks train apart silently), the optimizers (one that still holds the old ones trains nothing, also silently) and
the schedulers that hold the optimizers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer

from lit_accel.resizing import OptimizerState, require_all_optimized


@dataclass(frozen=True)
class ResizeEvent:
    """One resize that took place.

    Args:
        step: The optimizer steps done before it.
        num_parameters_before: Parameters of the LightningModule before it.
        num_parameters_after: Parameters after it.
        seconds: How long it took.
    """

    step: int
    num_parameters_before: int
    num_parameters_after: int
    seconds: float


class ResizeMixin(Strategy):
    """Adds :meth:`resize` to a strategy. Stands left of the strategy class."""

    resizes: list[ResizeEvent]
    """The resizes of this run so far."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resizes = []

    def resize(
        self, rebuild: Callable[[], None], carry: Callable[[OptimizerState], OptimizerState] | None = None
    ) -> ResizeEvent:
        """Change the model in mid-training.

        Call it on all ranks at the same step, from ``on_train_batch_start`` (or ``on_train_epoch_start``): there
        the last optimizer step is complete, and the optimizers of the next one have not been read yet. Learning
        rates and all other options of the parameter groups go on, and so do schedulers, gradient scaler and step
        count.

        Args:
            rebuild: Replaces children of the LightningModule. It is called with the strategy's initialisation
                contexts active and must do the same on all ranks; new modules must be in training mode.
            carry: Receives the old optimizer state by parameter name and returns the new one, for all or some
                parameters; ``None`` starts the optimizers afresh, and drops their state before the rebuild to save
                memory: if that fails, the old model is back but its moments are not.

        Returns:
            What happened; also appended to :attr:`resizes`.

        Raises:
            MisconfigurationException: If called outside of training, if the ranks disagree on the step, if the state
                of a scheduler holds an optimizer, or if the new optimizers do not hold every trainable parameter.
        """
        started = time.perf_counter()
        module = self.lightning_module
        if module is None or not module.trainer.training:
            raise MisconfigurationException(
                "The model can only be resized while it is being trained. Call strategy.resize() from "
                "on_train_batch_start or on_train_epoch_start."
            )
        trainer = module.trainer
        if self.broadcast(trainer.global_step) != trainer.global_step:
            raise MisconfigurationException(
                f"Rank {trainer.global_rank} wants to resize at step {trainer.global_step}, rank 0 at another. The "
                "decision must be the same on all ranks: make it a function of trainer.global_step."
            )
        require_plain_schedules(config.scheduler for config in self.lr_scheduler_configs)
        num_before = sum(parameter.numel() for parameter in module.parameters())
        options = [group_options(optimizer) for optimizer in self.optimizers]
        schedules = [config.scheduler.state_dict() for config in self.lr_scheduler_configs]
        old_state = self._named_state(module) if carry is not None else {}
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

        wrapped, self.model = self.model, module
        optimizers, configs = self.optimizers, self.lr_scheduler_configs
        if carry is None:
            # Moments that nobody reads again must not stand in memory beside both models.
            self.optimizers, self.lr_scheduler_configs = [], []
            del optimizers
            optimizers = []
        try:
            with (
                self.tensor_init_context(),
                self.model_sharded_context(),
                self.precision_plugin.module_init_context(),
                isolate_rng(),
            ):
                rebuild()
        except BaseException:
            self.model = wrapped
            if optimizers:
                self.optimizers, self.lr_scheduler_configs = optimizers, configs
            raise
        del wrapped, optimizers, configs
        # With static_graph Lightning delays the first all-reduce of a wrapper; the new wrapper needs that again.
        if hasattr(self, "_pl_static_graph_delay_done"):
            self._pl_static_graph_delay_done = False
        self.setup(trainer)
        require_all_optimized(module, self.optimizers)
        restore_options(options, self.optimizers, but=_COUNTERS if carry is None else ())
        for config, state in zip(self.lr_scheduler_configs, schedules, strict=True):
            config.scheduler.load_state_dict(state)
        if carry is not None:
            self._load_named_state(carry(old_state), module)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.barrier("resize")
        event = ResizeEvent(
            step=trainer.global_step,
            num_parameters_before=num_before,
            num_parameters_after=sum(parameter.numel() for parameter in module.parameters()),
            seconds=time.perf_counter() - started,
        )
        self.resizes.append(event)
        return event

    def _named_state(self, module: L.LightningModule) -> OptimizerState:
        states = {id(p): state for optimizer in self.optimizers for p, state in optimizer.state.items()}
        # To gather is collective: its order must not be that of dictionaries, which may differ between ranks.
        return {
            name: {key: self.whole(states[id(parameter)][key]) for key in sorted(states[id(parameter)])}
            for name, parameter in module.named_parameters()
            if id(parameter) in states
        }

    def _load_named_state(self, state: OptimizerState, module: L.LightningModule) -> None:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    entry = state.get(names[id(parameter)])
                    if entry is not None:
                        placed = {key: self.placed(value, parameter) for key, value in entry.items()}
                        optimizer.state[parameter] = placed

    def whole(self, value: Any) -> Any:
        """Return an entry of an optimizer's state as ``carry`` is to see it."""
        return value

    def placed(self, value: Any, parameter: nn.Parameter) -> Any:
        """Return an entry of a parameter's state, from ``carry``, as its optimizer is to hold it."""
        return value


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return what an optimizer's parameter groups hold besides the parameters, such as learning rates."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def require_plain_schedules(schedulers: Iterable[Any]) -> None:
    """See that the states of schedulers can be given to others, which schedule other optimizers.

    Args:
        schedulers: The schedulers.

    Raises:
        MisconfigurationException: If a state holds an optimizer, or an object that does, such as another scheduler.
    """
    for scheduler in schedulers:
        for name, value in scheduler.state_dict().items():
            if (held := _holder(value)) is not None:
                kind = type(scheduler).__name__
                raise MisconfigurationException(
                    f"The state of {kind} holds a whole {type(held).__name__}, under {name!r}: after a change of the "
                    "model's size it would go on with the optimizer of the former model, and the learning rate would "
                    "stand still. Chain schedulers with torch.optim.lr_scheduler.SequentialLR, or give "
                    f"{kind} a state_dict and a load_state_dict of its own, with numbers alone."
                )


def _holder(value: Any) -> Any:
    """Return an optimizer or what has one, if a value of a scheduler's state is it or contains it."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((held for each in value if (held := _holder(each)) is not None), None)
    # A method that a scheduler keeps is bound to that scheduler.
    value = getattr(value, "__self__", value)
    return value if isinstance(value, Optimizer) or isinstance(getattr(value, "optimizer", None), Optimizer) else None


def require_same_groups(options: list[list[dict[str, Any]]], optimizers: list[Optimizer]) -> None:
    """See that optimizers of a model of another size have as many parameter groups as those of the present one.

    Args:
        options: What :func:`group_options` returned of the present ones.
        optimizers: Those of the other size.

    Raises:
        MisconfigurationException: If they have not.
    """
    new = [len(optimizer.param_groups) for optimizer in optimizers]
    old = [len(groups) for groups in options]
    if new != old:
        raise MisconfigurationException(
            f"configure_optimizers returns optimizers with {old} parameter groups at the model's present size and with "
            f"{new} at another: their learning rates could not be carried over. Make the number of groups independent "
            "of the model's size: group by kind of parameter, or by parts of the depth, in halves, and not by block."
        )


# What some optimizers count for a whole group: LAMB and Adan of timm, and those that are free of a schedule. Beside new
# moments it would say that these are old, and corrections of their bias would be left out.
_COUNTERS = ("step", "k", "weight_sum", "lr_max")


def restore_options(
    options: list[list[dict[str, Any]]], optimizers: list[Optimizer], but: Collection[str] = ()
) -> None:
    """Put back what :func:`group_options` returned, an entry an optimizer.

    Args:
        options: What it returned.
        optimizers: The optimizers.
        but: What stays as it is there.

    Raises:
        MisconfigurationException: If the optimizers have other numbers of groups.
    """
    require_same_groups(options, optimizers)
    for optimizer, groups in zip(optimizers, options, strict=True):
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in saved.items() if key not in but})
