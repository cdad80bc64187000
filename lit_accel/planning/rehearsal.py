"""A fit that stops where training would begin: everything is set up and checked, on a model without weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as L
import torch

from lit_accel.anatomy import anatomy_of, find_transformer
from lit_accel.methods.composition import Composition
from lit_accel.methods.coordinator import coordinator_of
from lit_accel.methods.method import Method
from lit_accel.methods.requirements import require_training_mode

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

    What refuses a run before training refuses it here too. What a module builds in ``configure_model`` is built on the
    meta device. Loggers are left out: they would write.

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
        strategy.setup_optimizers(trainer)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # What is about to end is no exception that others should act on.
        ours = [callback for callback in callbacks if isinstance(callback, (Method, Composition))]
        trainer.callbacks = ours  # type: ignore[attr-defined]
        for callback in ours:
            callback.on_fit_start(trainer, module)
        transformer = find_transformer(module)[1]
        for method in coordinator_of(trainer).methods:
            if method.decides in ("layers", "tokens"):
                require_training_mode(transformer, anatomy_of(transformer), type(method).__name__)
        made.append(make())
        raise _RehearsalOver

    module.configure_model = configure_model_on_meta  # type: ignore[method-assign]
    # A model on the meta device can neither be moved to a device nor back from one.
    strategy.setup, strategy.teardown = instead_of_setup, lambda: None
    # Nor is there anything to be saved where a run is refused.
    trainer.save_checkpoint = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, data)
        except _RehearsalOver:
            pass
        finally:
            del module.configure_model, strategy.setup, strategy.teardown, trainer.save_checkpoint
    # Lightning's own are about training.
    said = [str(warning.message) for warning in caught if "lit_accel" in warning.filename]
    return made[0], list(dict.fromkeys(said))
