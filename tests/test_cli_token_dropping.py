"""Token dropping from YAML: the recipes, and the fragment on top of others."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

from lit_accel.compute import read_ledger
from tests.test_cli import CONFIGS, LITTLE_IMAGES, LITTLE_TEXT, RECIPES, run_a_little

NAMES = ["gpt2", "bert", "deit", "swinv2"]


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # LightningCLI warns where the process has arguments of its own, as pytest has.
    monkeypatch.setattr("sys.argv", ["lit-accel"])


def little(name: str) -> list[str]:
    return LITTLE_TEXT if name in ("gpt2", "bert") else LITTLE_IMAGES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_rehearsed_in_a_single_step(name):
    recipe = CONFIGS / f"recipe/{name}_random_ltd.yaml"
    run_a_little("--config", str(recipe), "--trainer.fast_dev_run=true", little=little(name))


@pytest.mark.parametrize("name", ["gpt2", "deit"])
def test_the_fragment_goes_on_top_of_a_dense_recipe(name, tmp_path):
    run_a_little(
        *("--config", str(CONFIGS / f"recipe/{name}_dense.yaml")),
        *("--config", str(CONFIGS / "method/random_ltd.yaml")),
        *("--trainer.max_steps=20", "--trainer.val_check_interval=10", "--trainer.limit_val_batches=2"),
        little=little(name),
    )
    run = tmp_path / f"runs/{name}_dense/version_0"
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["token_dropping/kept_tokens"]]
    kept = [float(row["token_dropping/kept_tokens"]) for row in rows]
    assert len(kept) == 2
    assert kept[0] < kept[1]
    tokens = [float(row["token_dropping/layer_tokens"]) for row in rows]
    assert 0 < tokens[0] < tokens[1]
    ledger = read_ledger(run)
    assert ledger.flops[-1] < ledger.dense_flops[-1]
    assert float(rows[-1]["token_dropping/effective_tokens"]) < ledger.tokens[-1]
    assert (tmp_path / f"runs/{name}_dense/version_0/model/config.json").exists()


def test_recipes_differ_from_their_neighbours_as_they_say():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES}
    for name, neighbour, model, data in (
        ("gpt2_random_ltd", "gpt2_pld", set(), set()),
        ("bert_random_ltd", "bert_pld", set(), set()),
        ("deit_random_ltd", "deit_dense", set(), set()),
        ("swinv2_random_ltd", "swinv2_dense", {"drop_path_rate"}, {"image_size"}),
    ):
        recipe, other = recipes[name], json.loads(json.dumps(recipes[neighbour]))
        assert recipe["model"]["init_args"].pop("lr_scheduler")["class_path"] == "lit_accel.LayerTokenLR"
        assert other["model"]["init_args"].pop("lr_scheduler")["class_path"] == "lit_accel.tasks.WarmupDecay"
        for kind, allowed in (("model", model), ("data", data)):
            mine, theirs = flat(recipe[kind]), flat(other[kind])
            assert {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)} == allowed
        assert recipe["trainer"]["max_steps"] == other["trainer"]["max_steps"]


def flat(part: dict) -> dict:
    arguments = dict(part["init_args"])
    nested = [arguments.pop(name, {}) for name in ("overrides", "model_kwargs")]
    return {**arguments, **nested[0], **nested[1]}
