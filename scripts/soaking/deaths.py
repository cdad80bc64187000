"""How a process dies: without a word, by SIGKILL, at a moment that was chosen before."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from fsspec.implementations.local import LocalFileOpener

from lit_accel.methods.mixed_sparsity.dynamics import DynamicSparsity
from scripts.soaking.journal import Journal

Kind = Literal["time", "step", "backward", "validation", "write", "resize", "update"]
POINTS: dict[Kind, tuple[str, ...]] = {
    # Anywhere, from outside.
    "time": ("",),
    # Before an optimizer step, after any transition.
    "step": ("",),
    # Between the backward pass and the optimizer's step.
    "backward": ("",),
    "validation": ("",),
    # After some bytes of a checkpoint, and on either side of what puts it into its place.
    "write": ("bytes", "before replace", "after replace"),
    "resize": ("before rebuild", "after rebuild", "before setup", "after setup", "before carry", "after carry"),
    # Of the topology.
    "update": ("before", "after"),
}


@dataclass(frozen=True)
class Death:
    """When a process dies; the first time that the moment comes.

    Args:
        kind: In the midst of what.
        point: Where in it, see :data:`POINTS`.
        step: Not before so many optimizer steps are done.
        rank: Who dies.
        alone: Whether the other rank is left to itself.
        share: Of the bytes of a checkpoint that are written, or of the expected seconds of a run that pass.
    """

    kind: Kind
    point: str = ""
    step: int = 0
    rank: int = 0
    alone: bool = False
    share: float = 0.0


class Reaper(L.Callback):
    """Ends the process when its time has come. Stands right of all methods.

    Args:
        death: When that is.
        journal: Where it says so just before.
    """

    def __init__(self, death: Death, journal: Journal) -> None:
        self.death = death
        self.journal = journal

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lie in wait where no hook leads to."""
        self.trainer = trainer
        if self.death.kind == "resize":
            self._watch_resizes(trainer.strategy)
        elif self.death.kind == "update":
            self._watch(DynamicSparsity, "_change", "")
        elif self.death.kind == "write":
            self._watch_writes(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Die before a step."""
        if self.death.kind == "step":
            self._die_if_due()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Die before the optimizer's step."""
        if self.death.kind == "backward":
            self._die_if_due()

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Die within an evaluation."""
        if self.death.kind == "validation" and not trainer.sanity_checking:
            self._die_if_due()

    @property
    def _is_due(self) -> bool:
        return self.trainer.global_step >= self.death.step

    def _die_if_due(self) -> None:
        if self._is_due:
            self._die()

    def _die(self) -> None:
        self.journal.note("dies", step=self.trainer.global_step, rank=self.trainer.global_rank)
        os.kill(os.getpid(), signal.SIGKILL)

    def _watch(self, owner: Any, name: str, what: str, is_meant: Callable[..., bool] = lambda *_, **__: True) -> None:
        """Die before or after a call of a function."""
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            meant = is_meant(*args, **kwargs)
            if meant and self.death.point == f"before {what}".strip():
                self._die_if_due()
            result = original(*args, **kwargs)
            if meant and self.death.point == f"after {what}".strip():
                self._die_if_due()
            return result

        setattr(owner, name, watched)

    def _watch_resizes(self, strategy: Any) -> None:
        original = strategy.resize
        resizing = False

        def resize(rebuild: Callable[[], None], carry: Callable[[Any], Any] | None = None) -> Any:
            nonlocal resizing
            parts = {"rebuild": rebuild, "carry": carry}
            if self._is_due:
                resizing = True
                for name in [name for name, part in parts.items() if part is not None]:
                    holder = type("Part", (), {name: staticmethod(parts[name])})
                    self._watch(holder, name, name)
                    parts[name] = getattr(holder, name)
            try:
                return original(parts["rebuild"], parts["carry"])
            finally:
                resizing = False

        strategy.resize = resize
        self._watch(strategy, "setup", "setup", lambda _: resizing)

    def _watch_writes(self, trainer: L.Trainer) -> None:
        save_checkpoint, save, write = trainer.save_checkpoint, torch.save, LocalFileOpener.write
        saving: Path | None = None
        # A folder is put into its place in two steps: the former one has to make room.
        num_spared = int(self.death.share > 0.5)

        def watched_save_checkpoint(path: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal saving
            saving = Path(path) if self._is_due else None
            save_checkpoint(path, *args, **kwargs)
            if saving is not None:
                # A writer that puts files into their place in a way that is not known here.
                self._die()

        def puts_into_place(source: Any, target: Any, *_: Any, **__: Any) -> bool:
            nonlocal num_spared
            if saving is None or Path(target).parent != saving.parent:
                return False
            if Path(source).is_dir() and num_spared and saving.exists():
                num_spared -= 1
                return False
            return True

        def cut(data: bytes) -> bytes:
            return data[: int(self.death.share * len(data))]

        def watched_save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            # What goes to memory first is written later, by Lightning's own writer.
            if saving is None or self.death.point != "bytes" or isinstance(f, io.BytesIO):
                return save(obj, f, *args, **kwargs)
            memory = io.BytesIO()
            save(obj, memory, *args, **kwargs)
            if isinstance(f, (str, os.PathLike)):
                Path(f).write_bytes(cut(memory.getvalue()))
            else:
                f.write(cut(memory.getvalue()))
                f.flush()
            return self._die()

        def watched_write(opener: LocalFileOpener, data: bytes) -> int:
            if saving is None or self.death.point != "bytes":
                return write(opener, data)
            write(opener, cut(data))
            opener.flush()
            self._die()
            return 0

        trainer.save_checkpoint = watched_save_checkpoint  # type: ignore[method-assign]
        torch.save = watched_save
        LocalFileOpener.write = watched_write
        # Files are moved or put in the place of others, folders renamed.
        for owner, name in ((shutil, "move"), (os, "replace"), (os, "rename")):
            self._watch(owner, name, "replace", puts_into_place)
