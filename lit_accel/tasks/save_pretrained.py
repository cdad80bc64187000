"""Hand a finished model on as an ordinary folder of Hugging Face's or timm's."""

import inspect
import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_accel.anatomy import AnatomyError, find_transformer
from lit_accel.run_folder import run_folder


class SavePretrained(Callback):
    """Save the model, and the data module's tokenizer, with ``save_pretrained`` when ``fit`` ends.

    The model is that of a task of this package, or the transformer inside any other module. A module that has a method
    ``save_pretrained(folder, model)`` is asked to write it, and one with a ``save_pretrained(folder)`` to write itself.

    The folder is what ``transformers`` or timm itself writes: nothing of this package is needed to load it. Rank zero
    writes. The strategy must keep whole parameters on each rank (a single device, DDP), or be able to gather them
    (``resizable_model_parallel``).

    Args:
        folder: Where to write; created if missing. Default: ``model`` in the logger's folder of the run. The tokenizer
            is written if the data module has a method ``save_tokenizer(folder)``.

    Raises:
        MisconfigurationException: When training starts, if nothing in the module can write itself.

    Example::

        >>> trainer = Trainer(callbacks=[SavePretrained("runs/gpt2/final")])  # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained("runs/gpt2/final")  # doctest: +SKIP
        >>> timm.create_model("local-dir:runs/deit/final", pretrained=True)  # doctest: +SKIP
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before anything is trained, what could not be written at the end.

        Raises:
            MisconfigurationException: If nothing in the module can write itself.
        """
        _model_of(pl_module)
        if hasattr(trainer.strategy, "gather_transformer") and _writes_itself(pl_module):
            raise MisconfigurationException(
                f"SavePretrained: the strategy shards the model, and {type(pl_module).__name__}.save_pretrained has no "
                "argument model that could be given the whole one. Add it, save_pretrained(folder, model)."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder on rank zero, unless this is a ``fast_dev_run``, which saves nothing."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # Where the model is sharded, all ranks take part in putting it together.
        gather = getattr(trainer.strategy, "gather_transformer", None)
        model: Any = _model_of(pl_module) if gather is None else gather()
        folder = self.folder or os.path.join(run_folder(trainer), "model")
        if not trainer.is_global_zero:
            return
        if _writes_itself(pl_module):
            pl_module.save_pretrained(folder)  # type: ignore[operator]
        elif hasattr(pl_module, "save_pretrained"):
            # A task whose model cannot write itself, as timm's cannot, does so.
            pl_module.save_pretrained(folder, model)  # type: ignore[operator]
        else:
            model.save_pretrained(folder)
        save_tokenizer = getattr(getattr(trainer, "datamodule", None), "save_tokenizer", None)
        if save_tokenizer is not None:
            save_tokenizer(folder)
        rank_zero_info(f"Saved the model to {folder}.")


def _writes_itself(pl_module: LightningModule) -> bool:
    """Say whether a module has a ``save_pretrained`` of its own that is given no model, as those of a hub have."""
    method = getattr(pl_module, "save_pretrained", None)
    return method is not None and "model" not in inspect.signature(method).parameters


def _model_of(pl_module: LightningModule) -> Any:
    """Return what is written: the ``model`` of a task, of whatever kind, or the transformer in another module."""
    model = getattr(pl_module, "model", None)
    if hasattr(pl_module, "save_pretrained") or hasattr(model, "save_pretrained"):
        return model
    try:
        model = find_transformer(pl_module)[1]
    except AnatomyError as error:
        raise MisconfigurationException(f"SavePretrained: {error}") from error
    if not hasattr(model, "save_pretrained"):
        raise MisconfigurationException(
            f"SavePretrained: {type(model).__name__} has no save_pretrained, and {type(pl_module).__name__} has none "
            "for it. Leave the callback out and save the model when fit has ended, one of timm's by "
            "timm.models.save_for_hf(model, folder); or give the module a method save_pretrained(folder, model)."
        )
    return model
