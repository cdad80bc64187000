"""`lit-accel plan`, as a user calls it."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["--model.init_args.overrides", "{n_layer: 8, n_embd: 32, n_head: 4, n_positions: 64}"]
SMALL += ["--data.init_args.block_size", "64", "--data.init_args.tokenizer", "bytes", "--trainer.max_steps", "200"]


def call(tmp_path, *args):
    return subprocess.run(
        [sys.executable, "-c", "from lit_accel.cli import main; main()", *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def lit_accel(tmp_path, *args):
    """Call the command in a folder; return its output."""
    done = call(tmp_path, *args)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    methods = ["multilevel", "progressive_layer_dropping", "random_ltd", "composition"]
    configs = ["recipe/gpt2_dense", *(f"method/{method}" for method in methods)]
    args = [part for config in configs for part in ("--config", str(CONFIGS / f"{config}.yaml"))]
    return folder, lit_accel(folder, "plan", *args, *SMALL, "--picture", "out/cost.png")


def test_it_prints_phases_methods_and_what_they_come_to(printed):
    _, output = printed
    for expected in ("200 optimizer steps", "MultiLevelTraining alone", "RandomLTD alone", "together", "of dense"):
        assert expected in output
    assert max(map(len, output.splitlines())) <= 80


def test_it_draws_and_leaves_nothing_else_behind(printed):
    folder, _ = printed
    # The data keeps its tokens where a fit will look for them.
    assert {path.name for path in folder.iterdir()} == {"out", ".cache"}
    assert [path.name for path in (folder / "out").iterdir()] == ["cost.png"]
    picture = matplotlib.image.imread(folder / "out/cost.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.05


BIG = """
trainer:
  accelerator: gpu
  devices: 8
  num_nodes: 16
  strategy: resizable_model_parallel
  precision: bf16-true
  max_steps: 300000
  max_epochs: -1
  callbacks:
    - class_path: lit_accel.MultiLevelTraining
    - class_path: lit_accel.ProgressiveLayerDropping
    - class_path: lit_accel.RandomLTD
model:
  class_path: lit_accel.tasks.CausalLM
  init_args:
    model: gpt2
    overrides: {n_layer: 50, n_embd: 7168, n_head: 56, n_positions: 2048}
data:
  class_path: lit_accel.data.TextDataModule
  init_args: {source: stdlib, tokenizer: bytes, block_size: 2048, batch_size: 2}
"""


def test_a_model_of_31_billion_parameters(tmp_path):
    """On a machine that could not hold it, and has none of its devices."""
    (tmp_path / "big.yaml").write_text(BIG)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = lit_accel(tmp_path, "plan", "--config", "big.yaml")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "30.8G" in output
    assert "ZFLOPs" in output
    assert "128 processes" in output
    # The largest child so far; in units of 1024 bytes.
    assert after.ru_maxrss * 1024 < 4 * 2**30
    # Of the processor: others may be using it at the same time.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20


MINE = """
from tests.planning.runs import Data
from tests.training import TinyModule as Mine
"""


def test_a_refusal_is_one_message_and_own_classes_are_found_where_one_is(tmp_path, monkeypatch):
    """The same of `fit`: both stop before training."""
    monkeypatch.setenv("PYTHONPATH", str(CONFIGS.parent))
    (tmp_path / "mine.py").write_text(MINE)
    mine = ["--model", "mine.Mine", "--data", "mine.Data", "--trainer.max_steps", "20", "--trainer.strategy", "ddp"]
    done = call(
        tmp_path, "plan", *mine, "--trainer.accelerator", "cpu", "--trainer.callbacks+=lit_accel.MultiLevelTraining"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert (
        "lit-accel: MultiLevelTraining changes the model's size in mid-training, which DDPStrategy cannot. Use"
        in done.stderr
    )
