"""Recipes of several methods: what they are made of, what they cost, and the table of costs in configs/README.md.

``python -m tests.test_recipes_composed`` writes the table anew.
"""

from __future__ import annotations

import contextlib
import io
import re
from functools import partial
from importlib import import_module

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lit_accel import cli, planning
from lit_accel.cli import main
from lit_accel.compute import forward_flops, read_ledger
from lit_accel.methods.layer_dropping.sensitivity import ablation_flops
from tests.test_cli import CONFIGS, LITTLE_IMAGES, RECIPES, RandomTokens, run_a_little

FAMILIES = ["gpt2", "bert", "llama", "deit", "swinv2"]
TITLES = {
    "dense": "dense",
    "vcycle": "V-cycle",
    "pld": "progressive layer dropping",
    "sbld": "sensitivity-based layer dropping",
    "random_ltd": "random-LTD",
    "mixed_sparsity": "mixed sparsity",
    "vcycle_random_ltd": "V-cycle, random-LTD",
    "pld_random_ltd": "progressive layer dropping, random-LTD",
    "sbld_random_ltd": "sensitivity-based layer dropping, random-LTD",
    "all": "V-cycle, layer dropping, random-LTD",
}
CALLBACKS = {
    "vcycle": "MultiLevelTraining",
    "pld": "ProgressiveLayerDropping",
    "sbld": "SensitivityLayerDropping",
    "random_ltd": "RandomLTD",
}
DROPPING = {"gpt2": "pld", "bert": "pld", "deit": "pld", "swinv2": "sbld"}
COMPOSED = {
    f"{family}_{what}": methods
    for family, layers in DROPPING.items()
    for what, methods in {
        "vcycle_random_ltd": ["vcycle", "random_ltd"],
        f"{layers}_random_ltd": [layers, "random_ltd"],
        "all": ["vcycle", layers, "random_ltd"],
    }.items()
}
# Texts long enough for several numbers of kept tokens, and few of them.
LITTLE_TEXT = ["max_bytes=60000", "vocab_size=300", "block_size=32", "batch_size=2"]
TABLE = re.compile(r"(?<=<!-- recipes -->\n).*?(?=<!-- /recipes -->)", re.DOTALL)


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # LightningCLI warns where the process has arguments of its own, as pytest has.
    monkeypatch.setattr("sys.argv", ["lit-accel"])


@contextlib.contextmanager
def forecasts():
    """Collect what ``lit-accel plan`` would print."""
    made, plan = [], cli.plan
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(cli, "plan", lambda *args, **kwargs: made.append(plan(*args, **kwargs)) or made[-1])
        yield made


def recipe(name):
    return yaml.safe_load((CONFIGS / f"recipe/{name}.yaml").read_text())


def callbacks(given):
    return {
        each["class_path"].rpartition(".")[2]: each.get("init_args", {})
        for each in given["trainer"].get("callbacks") or given["trainer"]["callbacks+"]
    }


def built(node):
    """Build what a recipe names, as the command line does but without its parser, which takes longer than a plan."""
    if isinstance(node, list):
        return [built(each) for each in node]
    if not isinstance(node, dict):
        return node
    if "class_path" not in node:
        return {name: built(each) for name, each in node.items()}
    module, _, name = node["class_path"].rpartition(".")
    given = {each: built(value) for each, value in node.get("init_args", {}).items()}
    return partial(getattr(import_module(module), name), **given)


def plans_of_all():
    """Plan every recipe, of random texts: only their length matters."""
    made = {}
    for path in RECIPES:
        given = recipe(path.stem)
        if given["data"]["class_path"] == "lit_accel.data.TextDataModule":
            size = {name: given["data"]["init_args"][name] for name in ("vocab_size", "block_size")}
            data, linked = RandomTokens(**size), ("vocab_size",)
        else:
            data, linked = built(given["data"])(), ("num_classes", "in_chans", "image_size")
        sizes = {name: getattr(data, name) for name in linked}
        with torch.device("meta"):
            model = built(given["model"])(**sizes)
        options = {**given["trainer"], "accelerator": "cpu", "logger": False}
        options["callbacks"] = [make() for make in built(options["callbacks"])]
        trainer = Trainer(**options, enable_progress_bar=False, enable_model_summary=False)
        made[path.stem] = planning.plan(trainer, model, data)
    return made


@pytest.fixture(scope="module")
def costs():
    """What each recipe costs and what is warned about."""
    return plans_of_all()


def table(costs):
    """Lay out which recipes there are, each with its share of a dense run's FLOPs."""
    rows = [f"| | {' | '.join(FAMILIES)} |", f"| --- |{' ---: |' * len(FAMILIES)}"]
    for what, title in TITLES.items():
        names = [f"{family}_{what}" for family in FAMILIES]
        cells = [f"[{costs[name].plan.share:.0%}](recipe/{name}.yaml)" if name in costs else "" for name in names]
        rows.append(f"| {title} | {' | '.join(cell.replace('%', ' %') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def test_the_table_has_every_recipe_with_what_it_costs(costs):
    assert set(costs) <= {f"{family}_{what}" for family in FAMILIES for what in TITLES}
    text = (CONFIGS / "README.md").read_text()
    assert TABLE.search(text).group() == table(costs), "python -m tests.test_recipes_composed writes it anew"


def test_paths_in_the_text_exist():
    text = (CONFIGS / "README.md").read_text()
    for path in re.findall(r"\]\(([^)]+)\)", text):
        assert (CONFIGS / path).exists()
    for path in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (CONFIGS.parent / path).exists()


def test_the_table_says_what_the_command_prints(costs):
    with forecasts() as made:
        main(["plan", f"--config={CONFIGS}/recipe/deit_all.yaml", "--picture=null"])
    assert made[0].plan.flops == costs["deit_all"].plan.flops


def test_methods_save_more_together_than_the_best_of_them_alone(costs):
    for name, methods in COMPOSED.items():
        together, alone = costs[name].plan.share, costs[name].alone
        assert list(alone) == [CALLBACKS[method] for method in methods]
        assert 0.3 < together < min(plan.share for plan in alone.values()) - 0.03


def test_nothing_is_warned_about_but_post_norm_models(costs):
    for name, forecast in costs.items():
        is_known = name.startswith("bert_") and any("LayerDropping" in method for method in forecast.alone)
        assert len(forecast.warnings) == is_known
        assert all("post-norm" in warning for warning in forecast.warnings)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_writes_under_its_own_name(path):
    text, given = path.read_text(), recipe(path.stem)
    logger = given["trainer"]["logger"]["init_args"]
    assert (logger["save_dir"], logger["name"]) == ("runs", path.stem)
    # Beside its ledger: runs that are called otherwise, or made again, do not overwrite each other's models.
    assert callbacks(given)["SavePretrained"] == {}
    assert f"configs/recipe/{path.name}" in text[: text.index("\nseed_everything")]
    assert text.count("lit_accel.ComputeLedger") == 1


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composed_recipe_is_the_one_of_token_dropping_with_more_methods(name):
    family, methods = name.partition("_")[0], COMPOSED[name]
    given, base, dense = recipe(name), recipe(f"{family}_random_ltd"), recipe(f"{family}_dense")
    found = callbacks(given)
    assert {each for each in found if each in CALLBACKS.values()} == {CALLBACKS[method] for method in methods}
    assert ("Composition" in found) == name.endswith("_all")

    # LayerTokenLR would count dropped tokens alone.
    assert given["model"]["init_args"].pop("lr_scheduler") == dense["model"]["init_args"]["lr_scheduler"]
    base["model"]["init_args"].pop("lr_scheduler")
    if "vcycle" in methods and family in ("gpt2", "bert"):
        heads = {"gpt2": "n_head", "bert": "num_attention_heads"}[family]
        assert given["model"]["init_args"]["overrides"].pop(heads) == 4
        assert base["model"]["init_args"]["overrides"].pop(heads) == 3
    assert (given["model"], given["data"]) == (base["model"], base["data"])

    changed = ("callbacks", "logger", "strategy")
    trainer, base_trainer = ({k: v for k, v in g["trainer"].items() if k not in changed} for g in (given, base))
    assert trainer == base_trainer
    resizes = "vcycle" in methods
    assert given["trainer"]["strategy"] == ("resizable" if resizes else "auto")
    # With a monitor Lightning writes last.ckpt where the monitored value is at its best, and nowhere else.
    assert found["ModelCheckpoint"] == {"save_last": True}


def test_recipes_of_one_method_share_their_models():
    for name, neighbour in (("bert_sbld", "bert_pld"), ("deit_sbld", "deit_pld"), ("swinv2_pld", "swinv2_sbld")):
        mine, theirs = recipe(name), recipe(neighbour)
        assert (mine["model"], mine["data"]) == (theirs["model"], theirs["data"])
        assert {key: value for key, value in mine["trainer"].items() if key not in ("callbacks", "logger")} == {
            key: value for key, value in theirs["trainer"].items() if key not in ("callbacks", "logger")
        }


def planned_and_counted(*arguments, num_steps, little, run):
    """Plan a short run and do it; return the forecast and the ledger."""
    short = ["--trainer.max_steps", str(num_steps), "--trainer.val_check_interval", str(num_steps)]
    short += ["--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    with forecasts() as made:
        given = [f"--data.init_args.{each}" for each in little]
        main(["plan", *arguments, *short, *given, "--picture=null"])
    run_a_little(*arguments, *short, little=little)
    return made[0], read_ledger(f"runs/{run}/version_0")


@pytest.mark.parametrize("name", ["gpt2_pld_random_ltd", "bert_all", "deit_all", "swinv2_vcycle_random_ltd"])
def test_a_run_costs_what_was_planned(name):
    little = LITTLE_TEXT if name.startswith(("gpt2", "bert")) else LITTLE_IMAGES
    forecast, ledger = planned_and_counted(
        "--config", str(CONFIGS / f"recipe/{name}.yaml"), num_steps=20, little=little, run=name
    )
    plan = forecast.plan
    assert (ledger.flops[-1], ledger.dense_flops[-1]) == (plan.flops, plan.dense_flops)
    assert ledger.phase[-1] == len(plan.phases) - 1
    assert ledger.tokens[-1] == forecast.workload.tokens * plan.num_steps
    assert all(alone.flops < plan.dense_flops for alone in forecast.alone.values())


def test_a_run_that_measures_costs_its_measurements_more():
    forecast, ledger = planned_and_counted(
        *("--config", str(CONFIGS / "recipe/swinv2_all.yaml")),
        num_steps=40,
        little=LITTLE_IMAGES,
        run="swinv2_all",
    )
    plan, work = forecast.plan, forecast.workload
    full = forward_flops(plan.phases[0].anatomy, work.num_sequences, work.num_tokens)
    # So short a run is measured on a single batch.
    measuring = ablation_flops(full.blocks, full.outside_blocks, range(2, 8))
    assert ledger.dense_flops[-1] == plan.dense_flops
    assert ledger.flops[-1] == pytest.approx(plan.flops + measuring, rel=0.03)


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("gpt2_dense", ["progressive_layer_dropping", "random_ltd", "composition"]),
        ("deit_dense", ["composition", "random_ltd", "multilevel", "progressive_layer_dropping"]),
    ],
)
def test_fragments_stack(name, fragments):
    """In any order of the files; each brings a ledger, and one is left."""
    files = [f"recipe/{name}", *(f"method/{each}" for each in fragments)]
    brought = [callbacks(yaml.safe_load((CONFIGS / f"{file}.yaml").read_text())) for file in files]
    assert sum("ComputeLedger" in each for each in brought) > 1
    forecast, ledger = planned_and_counted(
        *(argument for file in files for argument in ("--config", str(CONFIGS / f"{file}.yaml"))),
        num_steps=20,
        little=LITTLE_TEXT if name.startswith("gpt2") else LITTLE_IMAGES,
        run=name,
    )
    plan = forecast.plan
    assert len(forecast.alone) == len(fragments) - 1
    assert (ledger.flops[-1], ledger.dense_flops[-1]) == (plan.flops, plan.dense_flops)
    # The fragment's dense_tail: the last fifth of the run costs what a dense one does.
    assert plan.step_flops[16:] == (plan.dense_step_flops,) * 4
    assert plan.step_flops[15] < plan.dense_step_flops


def test_fragments_that_do_not_go_together_are_refused():
    files = ["recipe/deit_dense", "method/progressive_layer_dropping", "method/sensitivity_layer_dropping"]
    with pytest.raises(Exception, match="would both drop layers"):
        main(["plan", *(f"--config={CONFIGS / file}.yaml" for file in files), "--picture=null"])


def test_rules_of_the_last_fragment_can_be_given_on_the_command_line():
    """Of three blocks at the small level the budget cannot be met; the message says what to do, and it does."""
    names = ["multilevel", "sensitivity_layer_dropping", "composition"]
    arguments = [f"--config={CONFIGS}/recipe/deit_dense.yaml", *(f"--config={CONFIGS}/method/{n}.yaml" for n in names)]
    with pytest.raises(Exception, match=r"drop_levels=\[0\]"):
        main(["plan", *arguments, "--picture=null"])
    with forecasts() as made:
        main(["plan", *arguments, "--trainer.callbacks.drop_levels=[0]", "--picture=null"])
    assert len(made[0].alone) == 2


if __name__ == "__main__":
    readme = CONFIGS / "README.md"
    readme.write_text(TABLE.sub(lambda _: table(plans_of_all()), readme.read_text()))
