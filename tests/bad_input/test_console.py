"""The real command: exit codes, and that a user's own errors keep their traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_accel.cli import main
from tests.bad_input.harness import TEXT, configurations, only_message
from tests.forked import lit_accel, run_forked

BROKEN = """
import lightning.pytorch as L


class Broken(L.LightningModule):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        raise {error}


class Faulty(L.LightningModule):
    def training_step(self, batch, batch_idx):
        return {{}}["loss"]
"""
EXECUTABLE = Path(sys.executable).with_name("lit-accel")
AS_MODULE = (sys.executable, "-m", "lit_accel")


def run(folder, *command):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("command", "args", "code", "message"),
    [
        (
            (str(EXECUTABLE),),
            ("fit", "--config", "gpt.yaml", "--trainer.max_stpes=3"),
            2,
            "Did you mean trainer.max_steps?",
        ),
        (AS_MODULE, ("report", "nowhere"), 1, "There is no nowhere"),
    ],
    ids=["usage", "report"],
)
def test_the_exit_code_is_real(tmp_path, cache, command, args, code, message):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "gpt.yaml").write_text(yaml.safe_dump(configurations(cache)["gpt"]))
    ended = run(tmp_path, *command, *args)
    assert ended.returncode == code
    assert message in only_message(ended.stderr)


def test_data_that_are_not_there_end_it_with_one_message(tmp_path, cache):
    (tmp_path / "gpt.yaml").write_text(yaml.safe_dump(configurations(cache)["gpt"]))
    ended = run_forked(tmp_path, lit_accel, tmp_path, "fit", "--config", "gpt.yaml", "--data.source=no.txt")
    assert ended.returncode == 1
    assert "source='no.txt' is no file" in only_message(ended.stderr)


@pytest.mark.parametrize("error", ['ValueError("my own")', 'KeyError("my own")', 'AttributeError("my own")', "1 / 0"])
def test_an_error_of_ones_own_class_keeps_its_traceback(tmp_path, monkeypatch, error):
    name = f"own_{abs(hash(error))}"
    (tmp_path / f"{name}.py").write_text(BROKEN.format(error=error))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-accel", "fit", f"--model={name}.Broken", "--trainer.max_steps=1"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises((ValueError, KeyError, AttributeError, ZeroDivisionError)) as caught:
        main()
    assert name in str(caught.traceback[-1].path)
    assert "Union" not in str(caught.value)


def test_arguments_given_in_python_raise_as_they_are(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-accel"])
    Path("gpt.yaml").write_text(yaml.safe_dump(configurations(cache)["gpt"]))
    with pytest.raises(ValueError, match=r"source='text\.txt' is no file"):
        main(["fit", "--config", "gpt.yaml"])
