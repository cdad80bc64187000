"""A killed write never destroys the last good checkpoint, and a damaged one is refused with words."""

from __future__ import annotations

import errno
import os
import random
import stat
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import (
    AtomicCheckpointIO,
    ComputeLedger,
    MultiLevelTraining,
    ProgressiveLayerDropping,
    TrainingGuard,
)
from lit_accel.checkpoints import local_path, replaced_folder, whole_folder
from tests.methods.test_multilevel_checkpoints import StopAt
from tests.training import TinyModule, loader, make_trainer

OLD = {"state_dict": {"weight": torch.zeros(100)}, "global_step": 1}
NEW = {"state_dict": {"weight": torch.ones(100)}, "global_step": 2}


class Died(BaseException):
    """As a kill, but that the test goes on; nothing may be cleaned up after it."""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(OLD, path)
    return path


def step_of(path: Path) -> int:
    return AtomicCheckpointIO().load_checkpoint(path)["global_step"]


def test_writes_and_reads(path):
    AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert step_of(path) == 2
    assert os.listdir(path.parent) == ["last.ckpt"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("num_bytes", [0, 1, 300, 10**9])
def test_a_write_that_is_cut_short_leaves_the_former(path, monkeypatch, num_bytes):
    save = torch.save

    def cut(checkpoint, file):
        save(checkpoint, file)
        file.truncate(min(num_bytes, file.tell()))
        # Not even the clean-up of an exception: a killed process has none.
        monkeypatch.setattr(Path, "unlink", lambda self, missing_ok: None)
        raise Died

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(Died):
        AtomicCheckpointIO().save_checkpoint(NEW, path)
    monkeypatch.undo()
    assert step_of(path) == 1
    assert [each.name for each in path.parent.glob("*.ckpt")] == ["last.ckpt"]
    # What it has left is in nobody's way.
    AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert step_of(path) == 2
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_full_disk_leaves_the_former_and_nothing_else(path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert step_of(path) == 1
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_is_on_the_disk_before_it_takes_the_place(path, monkeypatch):
    """The order matters: else a machine that loses its power has an empty file under the good name."""
    done = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths))[1])
    AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert done == ["fsync", "replace", "fsync"]


def test_lightnings_own_goes_through_another_disk(tmp_path, monkeypatch):
    """Why there is one of ours: this test fails as soon as Lightning's writes beside the file too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    moved = []
    monkeypatch.setattr("shutil.move", lambda source, target: (moved.append(source), os.replace(source, target))[1])
    TorchCheckpointIO().save_checkpoint(OLD, tmp_path / "last.ckpt")
    assert Path(moved[0]).parent == tmp_path / "elsewhere"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 0.9999])
def test_refuses_what_is_cut_short(path, share):
    (path.parent / "other.ckpt").write_bytes(path.read_bytes())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(MisconfigurationException, match=r"last\.ckpt is cut short.*In the same folder: other\.ckpt\."):
        AtomicCheckpointIO().load_checkpoint(path)


def test_refuses_what_is_damaged(path):
    """Where one bit is another one, of 300: torch itself would load most of them."""
    data = path.read_bytes()
    draws = random.Random(0)
    num_silent = 0
    for _ in range(300):
        changed = bytearray(data)
        changed[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        path.write_bytes(changed)
        try:
            same = torch.equal(torch.load(path, weights_only=True)["state_dict"]["weight"], OLD["state_dict"]["weight"])
        except Exception:
            same = True
        num_silent += not same
        try:
            checkpoint = AtomicCheckpointIO().load_checkpoint(path)
        except Exception:
            continue
        # In what nobody reads: names, dates and gaps of the archive.
        assert torch.equal(checkpoint["state_dict"]["weight"], OLD["state_dict"]["weight"])
        assert checkpoint["global_step"] == 1
    assert num_silent > 30


def test_refuses_what_is_none(path):
    path.write_text("hello")
    with pytest.raises(MisconfigurationException, match="cut short, or no checkpoint: 5 bytes"):
        AtomicCheckpointIO().load_checkpoint(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(MisconfigurationException, match="no checkpoint of a run: it has no state_dict"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(
        FileNotFoundError, match=r"There is no checkpoint .*none\.ckpt\. In the same folder: last\.ckpt"
    ):
        AtomicCheckpointIO().load_checkpoint(path.with_name("none.ckpt"))


def test_takes_the_weights_that_a_spawned_process_hands_over(path):
    """Lightning writes them bare, into a file of this name in a folder of its own."""
    handed = path.with_name(".temp.ckpt")
    AtomicCheckpointIO().save_checkpoint({"weight": torch.ones(2)}, handed)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(handed)["weight"], torch.ones(2))


def test_reads_files_of_the_old_format(path):
    torch.save(OLD, path, _use_new_zipfile_serialization=False)
    assert step_of(path) == 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of its own, and another one to work in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize("given", ["~/runs/last.ckpt", "file://{}/runs/last.ckpt"])
def test_a_path_is_the_one_that_lightning_means(home, given):
    """A method brings this IO along by itself: with it, a path is still the same place."""
    place, path = home / "runs" / "last.ckpt", given.format(home)
    kinds = (TorchCheckpointIO, AtomicCheckpointIO)
    for writer in kinds:
        writer().save_checkpoint(OLD, path)
        assert os.listdir(place.parent) == ["last.ckpt"]
        assert all(reader().load_checkpoint(path)["global_step"] == 1 for reader in kinds)
        AtomicCheckpointIO().remove_checkpoint(path)
        assert not place.exists()
    with pytest.raises(FileNotFoundError, match=f"There is no checkpoint .*{place.name}"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert os.listdir(home.parent / "work") == []


def test_a_run_with_a_method_goes_on_from_the_home_folder(home):
    def fit(num_steps: int, resume: str | None = None) -> L.Trainer:
        options = {"strategy": "auto", "max_steps": num_steps, "max_epochs": -1}
        trainer = make_trainer(home.parent, callbacks=[ProgressiveLayerDropping()], **options)
        trainer.fit(TinyModule(), loader(), ckpt_path=resume)
        return trainer

    fit(2).save_checkpoint("~/end.ckpt")
    assert step_of(home / "end.ckpt") == 2
    assert fit(3, "~/end.ckpt").global_step == 3
    assert os.listdir(home.parent / "work") == []


@pytest.mark.parametrize(
    ("method", "strategy"),
    [(lambda: ProgressiveLayerDropping(), "auto"), (lambda: MultiLevelTraining(), "resizable")],
    ids=["pld", "cycle"],
)
def test_runs_with_a_method_use_it(tmp_path, method, strategy):
    trainer = make_trainer(tmp_path, callbacks=[method()], strategy=strategy, max_steps=2, fast_dev_run=2)
    trainer.fit(TinyModule(), loader())
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO


def test_the_users_own_stays(tmp_path):
    plugin = AsyncCheckpointIO()
    method = ProgressiveLayerDropping()
    trainer = make_trainer(tmp_path, callbacks=[method], strategy="auto", plugins=[plugin], max_steps=1)
    trainer.fit(TinyModule(), loader())
    assert trainer.strategy.checkpoint_io is plugin


def test_other_runs_are_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[ComputeLedger(print_table=False)], strategy="auto", max_steps=1)
    trainer.fit(TinyModule(), loader())
    assert type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    trainer = make_trainer(tmp_path, strategy="auto", max_steps=1, plugins=[AtomicCheckpointIO()])
    trainer.fit(TinyModule(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert step_of(tmp_path / "end.ckpt") == 1


def test_the_step_that_a_run_goes_on_from_is_not_saved_again(tmp_path):
    """Lightning would, after the first micro-batch of the next step: without its gradients, over the good one."""
    steps = []

    class Save(ModelCheckpoint):
        def _save_last_checkpoint(self, trainer, monitor_candidates):
            batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed
            steps.append((trainer.global_step, batches / trainer.accumulate_grad_batches))
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def fit(num_steps: int, resume: Path | None = None) -> None:
        save = Save(tmp_path, save_last=True, every_n_train_steps=2, save_top_k=0)
        options = {"max_steps": num_steps, "accumulate_grad_batches": 2, "enable_checkpointing": True}
        trainer = make_trainer(tmp_path, callbacks=[save, ProgressiveLayerDropping()], strategy="auto", **options)
        trainer.fit(TinyModule(), loader(), ckpt_path=resume)

    fit(4)
    fit(8, tmp_path / "last.ckpt")
    assert steps == [(2, 2), (4, 4), (6, 6), (8, 8)]


# Checkpoints that are folders, of sharded runs


def write(folder: Path, text: str, *, dies_at: str | None = None) -> None:
    barriers = iter(["begin", "written", "done"])

    def barrier() -> None:
        if next(barriers) == dies_at:
            raise Died

    with replaced_folder(folder, is_writer=True, barrier=barrier) as partial:
        partial.mkdir()
        (partial / "part").write_text(text)
        if dies_at == "inside":
            raise Died


@pytest.mark.parametrize("dies_at", ["begin", "inside", "written"])
def test_a_folder_that_is_cut_short_leaves_the_former(tmp_path, dies_at):
    folder = tmp_path / "last.ckpt"
    write(folder, "old")
    with pytest.raises(Died):
        write(folder, "new", dies_at=dies_at)
    assert (whole_folder(folder) / "part").read_text() == "old"
    write(folder, "newer")
    assert (whole_folder(folder) / "part").read_text() == "newer"
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere folders cannot change places in one step")
def test_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch):
    """Never is the place empty: who looks for the last checkpoint does not know where else it could be."""
    folder = tmp_path / "last.ckpt"
    write(folder, "old")
    renamed = []
    monkeypatch.setattr(Path, "rename", lambda self, target: renamed.append(self))
    write(folder, "new")
    assert (folder / "part").read_text() == "new"
    assert not renamed
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("num_renames", [0, 1])
def test_a_folder_is_found_between_two_renames(tmp_path, monkeypatch, num_renames):
    """Where two cannot change places."""
    monkeypatch.setattr("lit_accel.checkpoints._exchange", lambda *paths: False)
    folder = tmp_path / "last.ckpt"
    write(folder, "old")
    rename, count = Path.rename, iter(range(3))

    def counted(self, target):
        if next(count) == num_renames:
            raise Died
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)
    with pytest.raises(Died):
        write(folder, "new")
    monkeypatch.undo()
    assert (whole_folder(folder) / "part").read_text() == "old"
    write(folder, "newer")
    assert (whole_folder(folder) / "part").read_text() == "newer"


def test_damaged_states_are_refused_by_name(tmp_path):
    """What was tampered with is said before a step is trained; nothing is taken up by halves."""
    path = tmp_path / "end.ckpt"
    options = {"max_steps": 4, "max_epochs": -1}
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(), StopAt(2)], **options)
    trainer.fit(TinyModule(), loader())
    trainer.save_checkpoint(path)
    key = next(key for key in torch.load(path)["callbacks"] if "MultiLevel" in key)

    def resume(change) -> L.LightningModule:
        checkpoint = torch.load(path)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        module = TinyModule()
        trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining()], **options)
        try:
            trainer.fit(module, loader(), ckpt_path=tmp_path / "changed.ckpt")
        finally:
            assert not module.losses
        return module

    for change, message in (
        (lambda c: c["callbacks"][key].pop("rules"), "state of multi-level training.*is damaged: 'rules' should be"),
        (lambda c: c["callbacks"][key].update(version=9), "multi-level training in the checkpoint has format 9"),
        (lambda c: c["callbacks"][key].update(version="x"), "multi-level training.*has no version"),
        (lambda c: c["callbacks"][key].update(stored=3), "'stored' should be there and cannot be read"),
        (lambda c: c["lit_accel"].pop("size"), "state of the model's size in the checkpoint is damaged: 'size'"),
        (
            lambda c: c["lit_accel"].update(version=9),
            "model's size in the checkpoint has format 9; .* Update lit-accel",
        ),
        (lambda c: c.update(lit_accel=[]), "the model's size in the checkpoint is damaged: it has no version"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            resume(change)


@pytest.mark.parametrize("is_broken", [True, False])
def test_a_folder_takes_the_place_of_a_link(tmp_path, is_broken):
    """ModelCheckpoint(save_last="link") leaves one, which outlives what it leads to; that is another checkpoint."""
    folder, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    write(best, "best")
    folder.symlink_to("best.ckpt")
    if is_broken:
        (best / "part").unlink()
        best.rmdir()
    write(folder, "new")
    assert not folder.is_symlink()
    assert (folder / "part").read_text() == "new"
    assert is_broken or (best / "part").read_text() == "best"


def test_paths_that_are_not_local_are_refused_where_only_local_ones_work(tmp_path):
    with pytest.raises(ValueError, match=r"s3://bucket/run is not on a local file system"):
        local_path("s3://bucket/run")
    guard = TrainingGuard(roll_back=True, folder="s3://bucket/run")
    with pytest.raises(ValueError, match="not on a local file system"):
        make_trainer(tmp_path, callbacks=[guard], max_steps=1).fit(TinyModule(), loader())
