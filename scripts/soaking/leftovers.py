"""What a killed run leaves behind: the checkpoint that it goes on from, and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_accel.checkpoints import whole_folder
from scripts.soaking.training import CHECKPOINTS


def check_checkpoint(folder: Path, saved_step: int | None) -> list[str]:
    """Return what is wrong with the checkpoint that a killed run goes on from.

    Args:
        folder: The folder of the run.
        saved_step: The newest step whose checkpoint was complete.
    """
    names = sorted(path.name for path in (folder / CHECKPOINTS).glob("*.ckpt"))
    last = whole_folder(folder / CHECKPOINTS / "last.ckpt")
    if not last.exists():
        return [] if saved_step is None and not names else [f"there is {names}, and no checkpoint of step {saved_step}"]
    if names not in (["last.ckpt"], []):
        return [f"there are {names} instead of last.ckpt"]
    try:
        # Of a folder, what says of which step it is; whether its shards are whole is seen at the resume.
        file = last / "meta.pt" if last.is_dir() else last
        checkpoint = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever is wrong with the file
        return [f"the checkpoint cannot be read: {error}"]
    if checkpoint["global_step"] < (saved_step or 0):
        return [f"the checkpoint is of step {checkpoint['global_step']}, though that of {saved_step} was complete"]
    return []


def count_temporary_files(folder: Path) -> int:
    """Return how many files, or folders of shards, killed writers have left behind."""
    beside = [path for path in (folder / CHECKPOINTS).glob("*") if path.name != "last.ckpt"]
    return len(beside) + sum(path.is_file() for path in (folder / "temporary").rglob("*"))
