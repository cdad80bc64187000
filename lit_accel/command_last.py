"""What ``--ckpt_path last`` means on the command line, where every run has a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

_LAST = re.compile(rf"{ModelCheckpoint.CHECKPOINT_NAME_LAST}(-v?\d+)?{re.escape(ModelCheckpoint.FILE_EXTENSION)}")
_LOGGERS = ("CSVLogger", "TensorBoardLogger")


def last_checkpoint(trainer: Mapping[str, Any]) -> Path | None:
    """Return the last checkpoint of the runs with a name, the newest of them.

    Lightning looks in the folder that a run will write to. Its loggers number these folders, so that the one of a new
    command is always empty, and the run would begin anew.

    Args:
        trainer: What the configuration says of the Trainer, with callbacks and loggers that are not made yet.

    Returns:
        The checkpoint; ``None`` if there is none, or if the configuration fixes the folder, in which Lightning looks.
    """
    root = _numbered_in(trainer)
    if root is None or _have_folders(trainer):
        return None
    found = [path for path in root.glob("version_*/checkpoints/*") if _LAST.fullmatch(path.name) and path.exists()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _numbered_in(trainer: Mapping[str, Any]) -> Path | None:
    """Return the folder whose versions the Trainer's runs are."""
    logger = trainer.get("logger")
    logger = logger[0] if isinstance(logger, list) and logger else logger
    here = trainer.get("default_root_dir") or "."
    if logger is None or logger is True:
        return Path(here, "lightning_logs")
    if not isinstance(logger, Mapping) or str(logger.get("class_path")).rpartition(".")[2] not in _LOGGERS:
        return None
    settings = logger.get("init_args") or {}
    if settings.get("version") is not None:
        return None
    return Path(settings.get("save_dir") or here, settings.get("name") or "").expanduser()


def _have_folders(trainer: Mapping[str, Any]) -> bool:
    """Say whether last checkpoints lie where the configuration says, and not in the folder of their run."""
    callbacks = trainer.get("callbacks")
    settings = [
        each.get("init_args") or {}
        for each in (callbacks if isinstance(callbacks, list) else [callbacks])
        if isinstance(each, Mapping)
    ]
    writers = [each for each in settings if each.get("save_last")]
    return bool(writers) and all(each.get("dirpath") is not None for each in writers)
