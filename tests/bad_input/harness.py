"""Runs rows of the table, and sees that each ends as it should."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization

from lit_accel.cli import LitAccelCLI, main
from tests.bad_input.rows import Call, Command

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
_QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_steps": 4,
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
}


def configurations(cache: Path) -> dict[str, dict[str, Any]]:
    """Return small runs that work."""
    text = {
        "class_path": "lit_accel.data.TextDataModule",
        "init_args": {
            "source": "text.txt",
            "tokenizer": "bytes",
            "block_size": 8,
            "batch_size": 2,
            "cache_dir": str(cache),
        },
    }
    masked = {**text, "init_args": {**text["init_args"], "objective": "masked"}}  # type: ignore[dict-item]
    images = {
        "class_path": "lit_accel.data.ImageDataModule",
        "init_args": {"source": "digits", "image_size": 8, "in_chans": 1, "batch_size": 2},
    }
    sizes = {
        "gpt": ("CausalLM", "gpt2", {"n_layer": 4, "n_embd": 16, "n_head": 4, "n_positions": 16}),
        "bert": (
            "MaskedLM",
            "bert",
            {
                "num_hidden_layers": 4,
                "hidden_size": 16,
                "num_attention_heads": 4,
                "intermediate_size": 32,
                "max_position_embeddings": 16,
            },
        ),
    }
    runs = {
        name: {
            "trainer": _QUIET,
            "data": masked if name == "bert" else text,
            "model": {
                "class_path": f"lit_accel.tasks.{task}",
                "init_args": {"model": model, "overrides": overrides},
            },
        }
        for name, (task, model, overrides) in sizes.items()
    }
    endless = {key: value for key, value in _QUIET.items() if not key.startswith("max_")}
    runs["endless"] = {**runs["gpt"], "trainer": endless}
    runs["vit"] = {
        "trainer": _QUIET,
        "data": images,
        "model": {
            "class_path": "lit_accel.tasks.ImageClassification",
            "init_args": {
                "model": "deit_tiny_patch16_224",
                "model_kwargs": {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 4},
            },
        },
    }
    return runs


def run_command(row: Command, folder: Path, cache: Path, monkeypatch: Any, capsys: Any) -> str:
    """Run a command as the console does, and return what it says.

    Args:
        row: The command.
        folder: An empty folder to run it in.
        cache: Where token files of all rows lie.
        monkeypatch: Pytest's.
        capsys: Pytest's.
    """
    (folder / "text.txt").write_text(TEXT)
    for name, config in configurations(cache).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    for name, content in row.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    before = contents(folder)
    base = () if row.base is None else ("--config", f"{row.base}.yaml")
    subcommand = () if row.subcommand is None else (row.subcommand,)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lit-accel", *subcommand, *base, *row.args])
    monkeypatch.setattr(sys, "path", list(sys.path))
    _forbid_training(monkeypatch)
    if row.subcommand in (every := LitAccelCLI.subcommands()):
        # Parsers of the others would take most of the time; test_console.py has them all.
        monkeypatch.setattr(LitAccelCLI, "subcommands", staticmethod(lambda: {row.subcommand: every[row.subcommand]}))
    with pytest.raises(SystemExit) as exit_:
        main()
    written = capsys.readouterr().err
    code: Any = exit_.value.code
    if isinstance(code, str):
        # What Python does with it when the process ends.
        written, code = f"{written}{code}\n", 1
    assert contents(folder) == before, "a command that was refused has left something behind"
    message = only_message(written)
    assert row.message in message, message
    assert code == row.code, message
    return message


def only_message(written: str) -> str:
    """Return the one message of ours on stderr: a paragraph, after what libraries say of themselves."""
    assert "Traceback" not in written, written
    assert "usage:" not in written, written
    said = re.findall(r"^lit-accel(?: report)?: (.*)\Z", written.rstrip("\n"), re.DOTALL | re.MULTILINE)
    assert len(said) == 1, written
    (message,) = said
    assert "lit-accel: " not in message, written
    assert "\n" not in message, message
    assert "Union" not in message
    assert "jsonargparse" not in message
    assert "Namespace(" not in message
    assert len(message) < 1200, message
    return message


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of each file in a folder, by its name; but for the settings that were tried, and caches."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "config.yaml" and not {"__pycache__", ".cache"} & set(path.parts)
    }


def run_call(row: Call, folder: Path, monkeypatch: Any) -> str:
    """Run Python code, and return what its exception says.

    Args:
        row: The code.
        folder: An empty folder to run it in.
        monkeypatch: Pytest's.
    """
    monkeypatch.chdir(folder)
    _forbid_training(monkeypatch)
    try:
        with pytest.raises(row.error) as caught:
            row.make()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    message = str(caught.value)
    assert row.message in message, message
    *_, last = caught.traceback
    module = last.frame.f_globals["__name__"]
    assert module.split(".")[0] == row.raised_by, f"raised in {module}: {message}"
    assert row.raised_by == "lit_accel" or row.why
    assert not list(folder.rglob("*.ckpt"))
    return message


def _forbid_training(monkeypatch: Any) -> None:
    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        pytest.fail("a training step ran")

    monkeypatch.setattr(_AutomaticOptimization, "run", run)
