"""Where what belongs to one run is written."""

from __future__ import annotations

import os

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: L.Trainer) -> str:
    """Return a folder of this run alone, as far as its logger has one. A collective: every rank must call it.

    Lightning's own ``Trainer.log_dir`` is that for two loggers. For all others (Weights & Biases, MLflow, ...) it is
    what all of their runs share; there the folder is the one in which ``ModelCheckpoint`` puts checkpoints.

    Args:
        trainer: The Trainer.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return trainer.log_dir or trainer.default_root_dir
    version = f"version_{logger.version}" if isinstance(logger.version, int) else logger.version
    parts = [str(part) for part in (logger.name, version) if part not in (None, "")]
    return trainer.strategy.broadcast(os.path.join(logger.save_dir or trainer.default_root_dir, *parts))
