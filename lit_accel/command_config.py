"""The configuration of a run, in the folder of that run."""

from __future__ import annotations

import os

import lightning.pytorch as L
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from lit_accel.run_folder import run_folder

# How a file begins that Lightning's parser has written.
_WRITTEN = "# lightning.pytorch=="


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of the run, over a former run's, and never over a file of the user's.

    Lightning's own writes into what all runs of some loggers share, and, without a logger, into the folder that one is
    in, where a configuration may lie that somebody has written.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write it, once."""
        if self.already_saved:
            return
        self.already_saved = True
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        files, path = get_filesystem(folder), os.path.join(folder, self.config_filename)
        if files.isfile(path):
            with files.open(path, "r") as file:
                begins = file.read(len(_WRITTEN))
            if begins != _WRITTEN:
                rank_zero_warn(
                    f"{path} was not written by a run, and is left as it is: the configuration of this run is not "
                    "saved. Give the Trainer a logger with a folder of its own, or another default_root_dir."
                )
                return
        files.makedirs(folder, exist_ok=True)
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)
