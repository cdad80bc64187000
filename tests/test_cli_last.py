"""``--ckpt_path last``: a run that died goes on by the command that began it."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lit_accel.cli import main
from lit_accel.command_last import last_checkpoint
from tests.test_cli import DATA, MODEL, QUIET, files

CSV = "lightning.pytorch.loggers.CSVLogger"
CHECKPOINTS = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
TRAINER = {
    **QUIET,
    "logger": {"class_path": CSV, "init_args": {"save_dir": "runs", "name": "own"}},
    "callbacks": [CHECKPOINTS],
}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # LightningCLI warns where the process has arguments of its own, as pytest has.
    monkeypatch.setattr("sys.argv", ["lit-accel"])


def step_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def put(path: str, age: int) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (1e9 - age, 1e9 - age))
    return file


def test_the_same_command_goes_on_where_the_last_run_of_its_name_stopped():
    command = ["fit", *files(model=MODEL, data=DATA, trainer={"trainer": TRAINER}), "--ckpt_path", "last"]
    with pytest.warns(UserWarning, match="No checkpoint will be loaded"):
        main([*command, "--trainer.max_steps=2"])
    main([*command, "--trainer.max_steps=3"])
    first, second = (Path("runs/own", f"version_{number}") for number in range(2))
    assert step_of(first / "checkpoints/last.ckpt") == 2
    assert step_of(second / "checkpoints/last.ckpt") == 3
    config = yaml.safe_load((second / "config.yaml").read_text())
    assert config["ckpt_path"] == str(first / "checkpoints/last.ckpt")
    # It died before it wrote any: the one before counts.
    shutil.rmtree(second / "checkpoints")
    main([*command, "--trainer.max_steps=4"])
    assert yaml.safe_load(Path("runs/own/version_2/config.yaml").read_text())["ckpt_path"] == config["ckpt_path"]
    main(["validate", *command[1:]])


def test_it_is_the_newest_of_that_name():
    put("runs/own/version_0/checkpoints/last.ckpt", age=3)
    put("runs/own/version_10/checkpoints/last.ckpt", age=2)
    newest = put("runs/own/version_2/checkpoints/last-v1.ckpt", age=1)
    put("runs/own/version_2/checkpoints/last_words.ckpt", age=0)
    put("runs/own/version_2/checkpoints/epoch=0-step=9.ckpt", age=0)
    put("runs/other/version_0/checkpoints/last.ckpt", age=0)
    Path("runs/own/version_2/checkpoints/last-v2.ckpt").symlink_to("gone.ckpt")
    assert last_checkpoint(TRAINER) == newest


def test_a_folder_of_several_processes_is_one_too():
    put("lightning_logs/version_0/checkpoints/last.ckpt/.metadata", age=0)
    assert last_checkpoint({"logger": None}) == Path("lightning_logs/version_0/checkpoints/last.ckpt")
    assert last_checkpoint({"logger": True, "default_root_dir": "elsewhere"}) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"logger": False},
        {"logger": {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"save_dir": "runs"}}},
        {"logger": {"class_path": CSV, "init_args": {"save_dir": "runs", "name": "own", "version": 0}}},
        {"callbacks": [{**CHECKPOINTS, "init_args": {"dirpath": "runs/own/version_0/checkpoints", "save_last": True}}]},
    ],
    ids=["no logger", "another logger", "a version", "a folder"],
)
def test_where_the_folder_is_said_lightning_looks_in_it(changed):
    put("runs/own/version_0/checkpoints/last.ckpt", age=0)
    assert last_checkpoint(TRAINER) is not None
    assert last_checkpoint({**TRAINER, **changed}) is None


def test_the_folder_of_the_best_is_not_that_of_the_last():
    last = put("runs/own/version_0/checkpoints/last.ckpt", age=0)
    best = {**CHECKPOINTS, "init_args": {"dirpath": "best", "monitor": "val/loss"}}
    assert last_checkpoint({**TRAINER, "callbacks": [CHECKPOINTS, best, {"class_path": "lit_accel.RandomLTD"}]}) == last
