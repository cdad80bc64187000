"""A fit that stops where training would begin: everything is set up and checked, on a model without weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as L
import torch

from lit_accel.methods.coordinator import coordinator_of

_Made = TypeVar("_Made")


class _RehearsalOver(Exception):  # noqa: N818 - it is no error
    """Ends a rehearsal."""


def rehearse(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: Any,
    make: Callable[[], _Made],
) -> tuple[_Made, list[str]]:
    """Set a fit up, and call a function where it would put the model on its device and train.

    Everything that refuses a run refuses it here too. What a module builds in ``configure_model`` is built on the meta
    device. Loggers are left out: they would write.

    Args:
        trainer: The Trainer; it must not be used to train afterwards.
        module: Its module, whose parameters may be on the meta device.
        data: Its data module or training loader; ``None`` if the module brings its own.
        make: Called when all is set up.

    Returns:
        What ``make`` returned, and the warnings that were given on the way.
    """
    trainer.loggers = []
    made: list[_Made] = []
    strategy: Any = trainer.strategy
    configure_model = module.configure_model

    def configure_model_on_meta() -> None:
        with torch.device("meta"):
            configure_model()

    def instead_of_setup(trainer: L.Trainer) -> None:
        coordinator = coordinator_of(trainer)
        for method in coordinator.methods:
            # Of a module that makes its data in its own setup.
            if not method.is_planned:
                method.resolve(trainer, module)
        coordinator.check_run(module)
        made.append(make())
        raise _RehearsalOver

    module.configure_model = configure_model_on_meta  # type: ignore[method-assign]
    # A model on the meta device can neither be moved to a device nor back from one.
    strategy.setup, strategy.teardown = instead_of_setup, lambda: None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, data)
        except _RehearsalOver:
            pass
        finally:
            del module.configure_model, strategy.setup, strategy.teardown
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return made[0], list(dict.fromkeys(said))
