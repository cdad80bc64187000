"""Hand a finished model on as an ordinary folder of Hugging Face's or timm's."""

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_accel.run_folder import run_folder


class SavePretrained(Callback):
    """Save the transformer, and the data module's tokenizer, with ``save_pretrained`` when ``fit`` ends.

    The folder is what ``transformers`` or timm itself writes: nothing of this package is needed to load it. Rank zero
    writes. The strategy must keep whole parameters on each rank (a single device, DDP), or be able to gather them
    (``resizable_model_parallel``).

    Args:
        folder: Where to write; created if missing. Default: ``model`` in the logger's folder of the run. The tokenizer
            is written if the data module has a method ``save_tokenizer(folder)``.

    Example::

        >>> trainer = Trainer(callbacks=[SavePretrained("runs/gpt2/final")])  # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained("runs/gpt2/final")  # doctest: +SKIP
        >>> timm.create_model("local-dir:runs/deit/final", pretrained=True)  # doctest: +SKIP
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder on rank zero, unless this is a ``fast_dev_run``, which saves nothing."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # Where the model is sharded, all ranks take part in putting it together.
        gather = getattr(trainer.strategy, "gather_transformer", None)
        model: Any = pl_module.model if gather is None else gather()
        folder = self.folder or os.path.join(run_folder(trainer), "model")
        if not trainer.is_global_zero:
            return
        if hasattr(pl_module, "save_pretrained"):
            # A task whose model cannot write itself, as timm's cannot, does so.
            pl_module.save_pretrained(folder, model)  # type: ignore[operator]
        else:
            model.save_pretrained(folder)
        save_tokenizer = getattr(getattr(trainer, "datamodule", None), "save_tokenizer", None)
        if save_tokenizer is not None:
            save_tokenizer(folder)
        rank_zero_info(f"Saved the model to {folder}.")
