"""Mixed sparsity from YAML: the recipes, the fragment on top of others, and the numbers of the card."""

from __future__ import annotations

import csv
import re

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from lit_accel import MixedSparsityTraining
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import forward_flops, read_ledger
from lit_accel.methods.mixed_sparsity import AttentionPattern, SparsitySchedule, Targets, spaces_of
from tests.test_cli import CONFIGS, RECIPES, run_a_little
from tests.test_cli_token_dropping import flat, in_a_new_folder, little  # noqa: F401

CARD = CONFIGS.parent / "lit_accel/methods/mixed_sparsity/README.md"


@pytest.mark.parametrize("name", ["gpt2", "bert", "deit", "swinv2"])
def test_a_recipe_can_be_rehearsed_in_a_single_step(name):
    recipe = CONFIGS / f"recipe/{name}_mixed_sparsity.yaml"
    run_a_little("--config", str(recipe), "--trainer.fast_dev_run=true", little=little(name))


@pytest.mark.parametrize("name", ["gpt2", "deit"])
def test_the_fragment_goes_on_top_of_a_dense_recipe(name, tmp_path):
    run_a_little(
        *("--config", str(CONFIGS / f"recipe/{name}_dense.yaml")),
        *("--config", str(CONFIGS / "method/mixed_sparsity.yaml")),
        *("--trainer.max_steps=40", "--trainer.val_check_interval=10", "--trainer.limit_val_batches=2"),
        little=little(name),
    )
    run = tmp_path / f"runs/{name}_dense/version_0"
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["mixed_sparsity/sparsity"]]
    sparsities = [float(row["mixed_sparsity/sparsity"]) for row in rows]
    assert sparsities[0] > 0.5
    assert sparsities[-1] == 0
    ledger = read_ledger(run)
    assert ledger.flops[-1] < ledger.dense_flops[-1]
    assert (tmp_path / f"runs/{name}_dense/version_0/model/config.json").exists()


def test_recipes_differ_from_dense_ones_in_the_method_alone():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES}
    for name in ("gpt2", "bert", "deit", "swinv2"):
        recipe, dense = recipes[f"{name}_mixed_sparsity"], recipes[f"{name}_dense"]
        assert (recipe["model"], recipe["data"]) == (dense["model"], dense["data"])
        assert recipe["trainer"]["max_steps"] == dense["trainer"]["max_steps"]


def test_the_fragment_has_every_argument_with_its_default():
    text = (CONFIGS / "method/mixed_sparsity.yaml").read_text()
    (given,) = (c["init_args"] for c in yaml.safe_load(text)["trainer"]["callbacks+"] if "init_args" in c)
    default, stated = MixedSparsityTraining(), MixedSparsityTraining(**given)
    assert vars(stated).keys() == vars(default).keys()
    assert {name for name in vars(default) if vars(default)[name] != vars(stated)[name]} == set()


def test_the_numbers_of_the_card():
    """Shares of GPT-2 small that the card says by heart."""
    text = " ".join(CARD.read_text().split())
    with torch.device("meta"):
        anatomy = anatomy_of(GPT2LMHeadModel(GPT2Config()))
    num_steps = 100_000

    def shares(callback, counted):
        schedule = SparsitySchedule.of(callback.stages, num_steps, callback.update_every, callback.drop_fraction)
        spaces = spaces_of(anatomy, callback.ffn_units, callback.attention_units, callback.head_units)
        kind = callback.attention_pattern
        pattern = None if kind is None else AttentionPattern(kind, callback.attention_window)
        phase = tuple(round(bound * num_steps) for bound in callback.attention_phase)
        targets = Targets(
            anatomy,
            spaces,
            schedule,
            callback.distribution,
            callback.gradient_share,
            pattern=pattern,
            pattern_steps=phase,
        )
        return targets.shares(1024, counted)

    default = shares(MixedSparsityTraining(), "exact")
    said = re.findall(r"\| (\d+) %(?: of a dense run)? \|", text)
    assert [int(number) for number in said] == [
        round(100 * share) for share in (default.dense, default.masked, default.excluded)
    ]
    preset = shares(MixedSparsityTraining(preset="paper_4x"), "full")
    assert (
        f"to {preset.masked:.0%} by its accounting, {preset.dense:.0%} with a dense head and".replace("%", " %") in text
    )
    assert f"{preset.excluded:.0%} without one".replace("%", " %") in text
    assert preset.masked <= 0.25
    dense = forward_flops(anatomy, 1, 1024, attention="full")
    assert f"{dense.head / dense.total:.0%} of GPT-2 small's FLOPs".replace("%", " %") in text
