"""Checkpoints that a command cannot go on from."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_accel.cli import main
from tests.bad_input.harness import TEXT, configurations, run_command
from tests.bad_input.rows import Command

HALF = b"\x00half of a checkpoint\x00" * 30


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def ckpt(name, content, message, *args, path="run.ckpt", **kwargs):
    """A row whose checkpoint is made from the whole one of a small run by a function of its bytes, or is given."""
    files = {} if content is None else {path: content}
    return Command(name, (f"--ckpt_path={path}", *args), message, files=files, **kwargs)


def changed(**entries):
    """Change entries of a checkpoint: a function changes the value that there is, None removes it."""

    def change(whole: bytes) -> bytes:
        checkpoint = torch.load(io.BytesIO(whole), weights_only=True)
        for name, value in entries.items():
            if value is None:
                checkpoint.pop(name)
            else:
                checkpoint[name] = value(checkpoint.get(name)) if callable(value) else value
        return saved(checkpoint)

    return change


def cut(share):
    return lambda whole: whole[: int(share * len(whole))]


class Stranger:
    """What no weights-only reader takes."""


ROWS = [
    ckpt("a checkpoint that is not there", None, "There is no checkpoint run.ckpt, given as --ckpt_path."),
    Command(
        "a checkpoint whose name is mistyped",
        ("--ckpt_path=lats.ckpt",),
        "There is no checkpoint lats.ckpt, given as --ckpt_path. Did you mean",
        files={"last.ckpt": b"x"},
    ),
    Command(
        "a folder as checkpoint",
        ("--ckpt_path=checkpoints",),
        "checkpoints, given as --ckpt_path, is a folder and no checkpoint of",
        files={"checkpoints/last.ckpt": b"x"},
    ),
    ckpt("an empty checkpoint", b"", "run.ckpt is empty: writing it was cut off. Give an earlier checkpoint of"),
    ckpt(
        "a checkpoint cut after a byte",
        lambda whole: whole[:1],
        "run.ckpt is no checkpoint: torch.load cannot read it. Give a .ckpt file",
    ),
    ckpt(
        "a checkpoint cut in its first half",
        cut(0.3),
        "run.ckpt is a damaged checkpoint: its end is missing, as where a disk was",
    ),
    ckpt(
        "a checkpoint cut in its second half",
        cut(0.8),
        "run.ckpt is a damaged checkpoint: its end is missing, as where a disk was",
    ),
    ckpt(
        "a checkpoint without its last bytes",
        lambda whole: whole[:-30],
        "run.ckpt is a damaged checkpoint: its end is missing, as where a disk was",
    ),
    ckpt(
        "bytes that are no checkpoint", HALF, "run.ckpt is no checkpoint: torch.load cannot read it. Give a .ckpt file"
    ),
    ckpt(
        "a text as checkpoint",
        "these are no weights\n",
        "run.ckpt is no checkpoint: torch.load cannot read it. Give a .ckpt file",
    ),
    ckpt(
        "a YAML file as checkpoint",
        "trainer: {max_steps: 3}\n",
        "run.ckpt is no checkpoint: torch.load cannot read it. Give a .ckpt file",
    ),
    ckpt(
        "a list in a checkpoint", saved([1, 2, 3]), "run.ckpt can be read, and is no checkpoint of Lightning: it has no"
    ),
    ckpt(
        "a model's state dict alone",
        saved({"weight": torch.zeros(2)}),
        "run.ckpt can be read, and is no checkpoint of Lightning: it has no",
    ),
    ckpt(
        "an object of one's own in a checkpoint",
        saved({"state_dict": {}, "mine": Stranger()}),
        "run.ckpt holds objects of classes that torch does not load from a file,",
    ),
    ckpt(
        "weights alone for fit",
        changed(optimizer_states=None, lr_schedulers=None, loops=None),
        "run.ckpt holds weights only, without optimizer and position in the run, so",
    ),
    ckpt(
        "a checkpoint without its optimizer",
        changed(optimizer_states=None),
        "run.ckpt holds weights only, without optimizer and position in the run, so",
    ),
    ckpt(
        "a checkpoint without its place in the run",
        changed(loops=None),
        "run.ckpt holds weights only, without optimizer and position in the run, so",
    ),
    ckpt(
        "a checkpoint of another family",
        lambda whole: whole,
        "The checkpoint is of a CausalLM, and the configuration has a MaskedLM.",
        base="bert",
    ),
    ckpt(
        "a checkpoint of another task",
        lambda whole: whole,
        "The checkpoint is of a CausalLM, and the configuration has a",
        base="vit",
    ),
    ckpt(
        "a checkpoint of another size",
        lambda whole: whole,
        "model.overrides is {'n_layer': 3, 'n_embd': 16, 'n_head': 4,",
        '--model.overrides={"n_layer": 3, "n_embd": 16, "n_head": 4, "n_positions": 16}',
    ),
    ckpt(
        "a checkpoint of a newer lit-accel",
        changed(lit_accel=lambda record: {**record, "version": 99}),
        "The state of the model's size in the checkpoint has format 99; this",
    ),
    ckpt(
        "a checkpoint with a weight missing",
        changed(state_dict=lambda weights: dict(list(weights.items())[1:])),
        "The checkpoint does not fit the model: Missing key(s) in state_dict:",
    ),
    ckpt(
        "a checkpoint with a weight too many",
        changed(state_dict=lambda weights: {**weights, "model.more": torch.zeros(1)}),
        "The checkpoint does not fit the model: Unexpected key(s) in state_dict:",
    ),
    ckpt(
        "a checkpoint with a weight of another shape",
        changed(state_dict=lambda weights: {name: torch.zeros(3, 3) for name in weights}),
        "The checkpoint does not fit the model: size mismatch for",
    ),
    ckpt(
        "a checkpoint with a record of the size that is none",
        changed(lit_accel=lambda record: "small"),
        "The state of the model's size in the checkpoint is damaged: it has no",
    ),
    ckpt(
        "a checkpoint without weights",
        changed(state_dict=None),
        "run.ckpt can be read, and is no checkpoint of Lightning: it has no",
    ),
    ckpt(
        "a checkpoint of another vocabulary",
        lambda whole: whole,
        "The checkpoint's model differs from 'model' in more than width and depth:",
        "--data.tokenizer=bpe",
        "--data.vocab_size=300",
    ),
    ckpt(
        "a damaged checkpoint for validate",
        cut(0.5),
        "run.ckpt is a damaged checkpoint: its end is missing, as where a disk was",
        subcommand="validate",
    ),
    ckpt(
        "a checkpoint of another family for validate",
        lambda whole: whole,
        "The checkpoint is of a CausalLM, and the configuration has a MaskedLM.",
        base="bert",
        subcommand="validate",
    ),
    ckpt(
        "the best checkpoint where there is none",
        None,
        '`.validate(ckpt_path="best")` is set but `ModelCheckpoint` is not',
        path="best",
        subcommand="validate",
    ),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A checkpoint of a small run: made once."""
    folder = tmp_path_factory.mktemp("run")
    return whole_checkpoint(folder, cache)


def whole_checkpoint(folder: Path, cache: Path) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lit-accel"])
        Path("text.txt").write_text(TEXT)
        config = configurations(cache)["gpt"]
        config["trainer"] = {**config["trainer"], "enable_checkpointing": True, "max_steps": 1}
        Path("run.yaml").write_text(yaml.safe_dump(config))
        main(["fit", "--config", "run.yaml"])
        (file,) = Path("checkpoints").glob("*.ckpt")
        return file.read_bytes()


def prepared(row: Command, whole: bytes) -> Command:
    files = {name: content(whole) if callable(content) else content for name, content in row.files.items()}
    return Command(**{**vars(row), "files": files})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_before_training(row, whole, tmp_path, monkeypatch, capsys, cache):
    run_command(prepared(row, whole), tmp_path, cache, monkeypatch, capsys)
