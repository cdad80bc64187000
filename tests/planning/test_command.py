"""`lit-accel plan`, as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

from tests import forked

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["--model.init_args.overrides", "{n_layer: 8, n_embd: 32, n_head: 4, n_positions: 64}"]
SMALL += ["--data.init_args.block_size", "64", "--data.init_args.tokenizer", "bytes", "--trainer.max_steps", "200"]


@pytest.fixture(scope="module")
def lit_accel(tmp_path_factory):
    """Call the command in a folder; return what it printed and took."""

    def call(folder, *args):
        done = forked.run_forked(tmp_path_factory.mktemp("printed"), forked.lit_accel, folder, *args)
        assert done.returncode == 0, done.stderr[-2000:]
        return done

    return call


@pytest.fixture(scope="module")
def printed(tmp_path_factory, lit_accel):
    folder = tmp_path_factory.mktemp("plan")
    methods = ["multilevel", "progressive_layer_dropping", "random_ltd", "composition"]
    configs = ["recipe/gpt2_dense", *(f"method/{method}" for method in methods)]
    args = [part for config in configs for part in ("--config", str(CONFIGS / f"{config}.yaml"))]
    return folder, lit_accel(folder, "plan", *args, *SMALL, "--picture", "out/cost.png").stdout


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


def test_a_model_of_31_billion_parameters(tmp_path, lit_accel):
    """On a machine that could not hold it, and has none of its devices."""
    (tmp_path / "big.yaml").write_text(BIG)
    done = lit_accel(tmp_path, "plan", "--config", "big.yaml")
    assert "30.8G" in done.stdout
    assert "ZFLOPs" in done.stdout
    assert "128 processes" in done.stdout
    assert done.peak_bytes < 4 * 2**30
    # Of the processor: others may be using it at the same time. Imports are done before.
    assert done.processor_seconds < 12


MINE = """
from tests.planning.runs import Data
from tests.training import TinyModule as Mine
"""


def test_a_refusal_is_one_message_and_own_classes_are_found_where_one_is(tmp_path, monkeypatch):
    """As a user calls it, imports and all. The same of `fit`: both stop before training."""
    monkeypatch.setenv("PYTHONPATH", str(CONFIGS.parent))
    (tmp_path / "mine.py").write_text(MINE)
    mine = ["--model", "mine.Mine", "--data", "mine.Data", "--trainer.max_steps", "20", "--trainer.strategy", "ddp"]
    method = ["--trainer.accelerator", "cpu", "--trainer.callbacks+=lit_accel.MultiLevelTraining"]
    done = subprocess.run(
        # -P: as the installed command does, it looks for no module in the present folder.
        [sys.executable, "-P", "-c", "from lit_accel.cli import main; main()", "plan", *mine, *method],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert (
        "lit-accel: MultiLevelTraining changes the model's size in mid-training, which DDPStrategy cannot. Use"
        in done.stderr
    )


@pytest.mark.parametrize(("devices", "said"), [("-1", True), ("auto", True), ("1", False)])
def test_devices_that_another_machine_has_to_count(tmp_path, lit_accel, devices, said):
    recipe = ["--config", str(CONFIGS / "recipe/gpt2_dense.yaml"), *SMALL, "--picture", "null"]
    where = ["--trainer.accelerator", "gpu", "--trainer.devices", devices]
    printed = lit_accel(tmp_path, "plan", *recipe, *where).stdout
    assert ("how many devices" in " ".join(printed.split())) == said
