"""Checkpoints that a killed write cannot destroy."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec.core
import fsspec.utils
import lightning.pytorch as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

_PARTIAL, _PREVIOUS = ".partial", ".previous"
_CHUNK = 2**24
# Of Linux's renameat2: a path that begins at the working folder, and two that change places.
_HERE, _EXCHANGE = -100, 2


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, waits until the disk has it, and puts it there in one step.

    Whenever the process or the machine dies, the file is either the former one or the new one, both whole. Lightning's
    own way goes through the folder for temporary files: from another disk, that is a copy, which can be cut short.

    Runs with a method of lit-accel use it by themselves, unless the Trainer was given a ``CheckpointIO``. Others add it
    with ``Trainer(plugins=AtomicCheckpointIO())``. Where the path is not one of a local file system, it does what
    Lightning does.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What is to be written.
            path: Where.
            storage_options: Must be ``None``.

        Raises:
            TypeError: If there are storage options.
        """
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = local_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(path, _PARTIAL)
        try:
            # Opened anew each time: what a killed write has left is overwritten.
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: Where it is.
            map_location: See :func:`torch.load`.
            weights_only: See :func:`torch.load`.

        Returns:
            What was written.

        Raises:
            FileNotFoundError: If there is none.
            MisconfigurationException: If the file is cut short or damaged, or no checkpoint of a run.
        """
        if not _is_local(path):
            return super().load_checkpoint(path, map_location, weights_only)
        path = local_path(path)
        if not path.exists():
            raise FileNotFoundError(f"There is no checkpoint {path}.{_others(path)}")
        if path.is_file() and (damage := _damage(path)) is not None:
            raise MisconfigurationException(f"{path} {damage}. Resume from another one.{_others(path)}")
        checkpoint = super().load_checkpoint(path, map_location, weights_only)
        # A process that Lightning has spawned hands its weights alone to the one that goes on, in a file of this name.
        is_handed_over = path.name == ".temp.ckpt"
        if not is_handed_over and (not isinstance(checkpoint, dict) or "state_dict" not in checkpoint):
            raise MisconfigurationException(
                f"{path} is no checkpoint of a run: it has no state_dict. Weights alone are loaded with "
                f"model.load_state_dict, before fit is called.{_others(path)}"
            )
        return checkpoint


def write_atomically(trainer: L.Trainer) -> None:
    """Have a Trainer write its checkpoints atomically, unless it was given a ``CheckpointIO`` of its own.

    Args:
        trainer: The Trainer.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()


def resume_after_saved_step(trainer: L.Trainer) -> None:
    """Have no checkpoint written at the step that a run goes on from; call it when training starts.

    Lightning does not remember that it has written that one: where gradients are accumulated, it would do so again
    after the first micro-batch of the next step, without the gradients of that, in the place of the good one.

    Args:
        trainer: The Trainer.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._last_global_step_saved = trainer.global_step


def local_path(path: Any) -> Path:
    """Return the place that Lightning means by the path of a checkpoint.

    Args:
        path: As a user gives it: ``~`` is the home folder, and it may begin with ``file://``.

    Returns:
        The absolute path.

    Raises:
        ValueError: If it is not one of a local file system.
    """
    if not _is_local(path):
        raise ValueError(f"{path} is not on a local file system. Give a local folder.")
    return Path(fsspec.core.url_to_fs(str(path))[1])


@contextmanager
def replaced_folder(path: Path, *, is_writer: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """Give a folder to write a checkpoint of many files to, which takes the place of the former one when it is whole.

    On Linux the two change places in one step. Elsewhere, and on file systems that cannot do that, the former one is
    put aside first, and :func:`whole_folder` finds it there if the process dies in between. Every process must call it.

    Args:
        path: The place of the checkpoint.
        is_writer: Whether this process moves the folders; one of them does.
        barrier: Waits for the other processes.

    Yields:
        Where to write.
    """
    partial, previous = _beside(path, _PARTIAL), _beside(path, _PREVIOUS)
    if is_writer:
        _remove(partial)
        path.parent.mkdir(parents=True, exist_ok=True)
    barrier()
    yield partial
    barrier()
    if is_writer:
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        if path.is_symlink():
            # As ModelCheckpoint(save_last="link") makes them; what it leads to is another checkpoint.
            path.unlink()
        if not path.exists():
            partial.rename(path)
        elif not _exchange(partial, path):
            # One that was put aside when a process died is the former of the former by now.
            _remove(previous)
            path.rename(previous)
            partial.rename(path)
        _sync_folder(path.parent)
        _remove(partial)
        _remove(previous)
    barrier()


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step, where the system and the file system can do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def whole_folder(path: Path) -> Path:
    """Return where the whole checkpoint is that belongs at a path: there, or put aside by a write that was killed.

    Args:
        path: The place of the checkpoint.
    """
    previous = _beside(path, _PREVIOUS)
    return previous if not path.exists() and previous.exists() else path


def _is_local(path: Any) -> bool:
    return fsspec.utils.get_protocol(str(path)) == "file"


def _beside(path: Path, suffix: str) -> Path:
    # Hidden, and without the ending of a checkpoint: nobody who looks for checkpoints finds it.
    return path.with_name(f".{path.name}{suffix}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the disk know the names in a folder too, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _damage(path: Path) -> str | None:
    """Return what is wrong with a file of ``torch.save``, which itself would load changed numbers without a word."""
    with path.open("rb") as file:
        if file.read(1) == b"\x80":
            # Before torch 1.6, without anything to compare with.
            return None
    if not zipfile.is_zipfile(path):
        return f"is cut short, or no checkpoint: {path.stat().st_size:,} bytes that are no whole file of torch.save"
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # Without a sum: torch can be told to leave them out.
            if not entry.CRC:
                continue
            try:
                with archive.open(entry) as part:
                    while part.read(_CHUNK):
                        pass
            except (zipfile.BadZipFile, NotImplementedError, OSError):
                return f"is damaged: {entry.filename} in it is not what was written"
    return None


def _others(path: Path) -> str:
    found = [each for each in path.parent.glob("*.ckpt") if each != path] if path.parent.is_dir() else []
    newest = sorted(found, key=lambda each: each.stat().st_mtime, reverse=True)[:3]
    return f" In the same folder: {', '.join(each.name for each in newest)}." if newest else ""
