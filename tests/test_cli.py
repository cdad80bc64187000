import csv
import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from lit_accel.cli import LitAccelCLI, main
from lit_accel.command_inputs import check_same_model
from lit_accel.compute import read_ledger
from lit_accel.tasks import CausalLM

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("recipe/*.yaml"))
DROPPING_RECIPES = [path for path in RECIPES if "LayerDropping" in path.read_text()]
PAPER_RECIPES = sorted(CONFIGS.glob("recipe/paper/*.yaml"))  # of full size
VOCAB_SIZE = 37


class RandomTokens(LightningDataModule):
    """Says how many tokens there are, as a data module of text does."""

    def __init__(self, vocab_size: int = VOCAB_SIZE, block_size: int = 8):
        super().__init__()
        self._vocab_size, self.block_size = vocab_size, block_size

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def _loader(self):
        tokens = torch.randint(self._vocab_size, (4, self.block_size))
        return DataLoader([{"input_ids": text, "labels": text} for text in tokens], batch_size=2)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


class NoVocabulary(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.ones(2, 3))


class OwnVocabulary(LightningModule):
    def __init__(self, vocab_size: int = 5):
        super().__init__()
        self.vocab_size = vocab_size


class NoArguments(LightningModule):
    pass


MODEL = {
    "model": {
        "class_path": "lit_accel.tasks.CausalLM",
        "init_args": {
            "model": "gpt2",
            "overrides": {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 8},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.03, "weight_decay": 0.2}},
            "lr_scheduler": {
                "class_path": "lit_accel.tasks.WarmupDecay",
                "init_args": {"num_warmup_steps": 0.5},
            },
        },
    }
}
DATA = {"data": {"class_path": f"{__name__}.RandomTokens", "init_args": {"block_size": 8}}}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "max_steps": 2}


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # LightningCLI warns where the process has arguments of its own, as pytest has.
    monkeypatch.setattr("sys.argv", ["lit-accel"])


def files(**contents):
    arguments = []
    for name, content in contents.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
        arguments += ["--config", f"{name}.yaml"]
    return arguments


def parsed(*arguments):
    """The command with everything built and nothing run."""

    class Stopped(LitAccelCLI):
        def _run_subcommand(self, subcommand):
            pass

    return Stopped(list(arguments))


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_two_files_compose_into_a_run(subcommand):
    trainer = {"trainer": {**QUIET, "logger": False, "fast_dev_run": True}}
    main([subcommand, *files(model={**MODEL, "seed_everything": 3}, data={**DATA, **trainer})])


def test_the_vocabulary_of_the_data_is_the_models():
    cli = parsed("fit", *files(model=MODEL, data=DATA))
    assert cli.model.model.config.vocab_size == VOCAB_SIZE
    assert cli.model.hparams["vocab_size"] == VOCAB_SIZE


class ElevenWords(LightningModule):
    """A module of somebody's, with a default of its own."""

    def __init__(self, vocab_size: int = 11):
        super().__init__()
        self.vocab_size = vocab_size


def test_a_default_gives_way_to_the_data_and_a_given_value_does_not():
    data = f"--data={__name__}.RandomTokens"
    assert parsed("fit", f"--model={__name__}.ElevenWords", data).model.vocab_size == VOCAB_SIZE
    parsed("fit", f"--model={__name__}.ElevenWords", f"--model.vocab_size={VOCAB_SIZE}", data)
    with pytest.raises(MisconfigurationException, match=f"vocab_size is 12, but the data has {VOCAB_SIZE}"):
        parsed("fit", f"--model={__name__}.ElevenWords", "--model.vocab_size=12", data)


@pytest.mark.parametrize(
    ("model", "data", "vocab_size"),
    [
        ("OwnVocabulary", "RandomTokens", VOCAB_SIZE),
        ("OwnVocabulary", "NoVocabulary", 5),
        ("OwnVocabulary", None, 5),
        ("NoArguments", "RandomTokens", None),
    ],
)
def test_without_a_vocabulary_on_both_sides_nothing_is_linked(model, data, vocab_size):
    data_arguments = [f"--data={__name__}.{data}"] if data else []
    cli = parsed("fit", f"--model={__name__}.{model}", *data_arguments)
    assert getattr(cli.model, "vocab_size", None) == vocab_size


def test_the_classes_and_the_shape_of_the_images_are_the_models():
    fragments = [CONFIGS / "model/deit_digits.yaml", CONFIGS / "data/digits.yaml"]
    cli = parsed("fit", *(f"--config={path}" for path in fragments), "--data.init_args.image_size=16")
    assert cli.model.model.patch_embed.proj.in_channels == 1
    assert cli.model.model.patch_embed.img_size == (16, 16)
    assert cli.model.model.num_classes == cli.model.hparams["num_classes"] == 10


def test_images_that_are_not_there_are_said_to_be_missing(tmp_path):
    model, data = (CONFIGS / path for path in ("model/deit_digits.yaml", "data/fashion_mnist.yaml"))
    with pytest.raises((SystemExit, ValueError), match="data_dir"):
        parsed("fit", f"--config={model}", f"--config={data}", f"--data.init_args.data_dir={tmp_path / 'no'}")


def test_a_vocabulary_can_be_given_where_the_data_has_none():
    cli = parsed("fit", f"--model={__name__}.OwnVocabulary", "--model.vocab_size=9", f"--data={__name__}.NoVocabulary")
    assert cli.model.vocab_size == 9


def test_the_module_configures_its_own_optimizer():
    cli = parsed("fit", *files(model=MODEL, data=DATA), "--model.init_args.lr_scheduler=null")
    first, second = (cli.model.configure_optimizers() for _ in range(2))
    assert first is not second
    assert [group["lr"] for group in first.param_groups] == [0.03, 0.03]
    assert [group["weight_decay"] for group in first.param_groups] == [0.2, 0]


def test_print_config_prints_and_runs_nothing(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *files(model=MODEL, data=DATA), "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["overrides"]["n_embd"] == 8
    assert printed["data"]["init_args"]["vocab_size"] == VOCAB_SIZE


def test_whole_numbers_stay_whole():
    """With some versions of torch they were fractions: the Trainer refuses 2.0 batches, and a phase 3.0 steps."""
    phases = [{"level": 0, "length": 3}, {"level": 1, "length": 0.5}, {"level": 0}]
    method = {"class_path": "lit_accel.MultiLevelTraining", "init_args": {"phases": phases}}
    trainer = {"trainer": {**QUIET, "logger": False, "callbacks": [method], "limit_val_batches": 2}}
    config = parsed("fit", *files(model=MODEL, data=DATA, trainer=trainer)).config["fit"]["trainer"]
    lengths = [phase.length for phase in config.callbacks[0].init_args.phases]
    assert list(map(repr, [config.limit_val_batches, *lengths])) == ["2", "3", "0.5", "None"]


def test_a_later_file_overrides_an_earlier_one():
    later = {"model": {"init_args": {"overrides": {"n_layer": 1, "n_embd": 4, "n_head": 1, "n_positions": 8}}}}
    cli = parsed("fit", *files(model=MODEL, data=DATA, later=later))
    assert cli.model.model.config.n_layer == 1


def test_an_unknown_field_is_refused_before_training():
    with pytest.raises((SystemExit, ValueError)) as refusal:
        parsed("fit", *files(model=MODEL, data=DATA), "--model.init_args.overrides.n_layers=3")
    assert "n_layer" in str(refusal.value)


def test_strategies_are_known_by_name():
    cli = parsed("fit", *files(model=MODEL, data=DATA), "--trainer.strategy=resizable", "--trainer.accelerator=cpu")
    assert type(cli.trainer.strategy).__name__ == "ResizableSingleDeviceStrategy"


def test_a_run_of_the_command_line_can_be_loaded_resumed_and_validated():
    trainer = {"trainer": {**QUIET, "logger": False, "default_root_dir": "."}, "seed_everything": 3}
    config = files(model=MODEL, data=DATA, trainer=trainer)
    main(["fit", *config])
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")

    loaded = CausalLM.load_from_checkpoint(checkpoint, weights_only=True)
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 2
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in loaded.state_dict().items())

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Without --ckpt_path")
        main(["validate", *config, "--ckpt_path", str(checkpoint)])
    with pytest.warns(UserWarning, match="Without --ckpt_path the model is evaluated as it is built"):
        main(["validate", *config])
    main(["fit", *config, "--ckpt_path", str(checkpoint), "--trainer.max_steps=3"])
    resumed = {torch.load(path, weights_only=True)["global_step"] for path in Path("checkpoints").glob("*.ckpt")}
    assert 3 in resumed


def test_a_resumed_command_keeps_its_own_optimizer():
    trainer = {"trainer": {**QUIET, "logger": False, "default_root_dir": "."}}
    config = files(model=MODEL, data=DATA, trainer=trainer)
    main(["fit", *config])
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    cli = parsed("fit", *config, "--ckpt_path", str(checkpoint))
    init_args = cli.config["fit"]["model"]["init_args"]
    assert init_args["optimizer"]["init_args"]["lr"] == 0.03
    assert init_args["lr_scheduler"]["init_args"]["num_warmup_steps"] == 0.5


def test_the_final_model_is_saved_where_the_callback_says():
    callback = {"class_path": "lit_accel.tasks.SavePretrained", "init_args": {"folder": "final"}}
    main(
        [
            "fit",
            *files(
                model=MODEL,
                data=DATA,
                trainer={"trainer": {**QUIET, "logger": False, "callbacks": [callback]}},
            ),
        ]
    )
    assert json.loads(Path("final/config.json").read_text())["vocab_size"] == VOCAB_SIZE


@pytest.mark.parametrize("recipe", RECIPES + PAPER_RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(recipe, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(recipe), "--print_config"])
    assert exit_.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] > 0


LITTLE_TEXT = ["max_bytes=60000", "vocab_size=300", "block_size=16", "batch_size=2"]
LITTLE_IMAGES = ["batch_size=2", "val_batches=2"]


def run_a_little(*arguments, little=LITTLE_TEXT):
    main(
        [
            "fit",
            *arguments,
            *(f"--data.init_args.{argument}" for argument in little),
            *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        ]
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_on_a_little_data(recipe):
    little = LITTLE_IMAGES if "lit_accel.data.ImageDataModule" in recipe.read_text() else LITTLE_TEXT
    # Three steps: in a rehearsal each phase of a method has one.
    run_a_little("--config", str(recipe), "--trainer.fast_dev_run=3", little=little)


def test_a_method_goes_on_top_of_a_dense_recipe(tmp_path, monkeypatch, capfd):
    """The whole cycle from two files: ledger, loggers and the final model are where the recipe says."""
    monkeypatch.chdir(tmp_path)
    run_a_little(
        *("--config", str(CONFIGS / "recipe/gpt2_dense.yaml")),
        *("--config", str(CONFIGS / "method/multilevel.yaml")),
        *("--trainer.max_steps=20", "--trainer.val_check_interval=10", "--trainer.limit_val_batches=2"),
        "--trainer.log_every_n_steps=1",
    )
    run = tmp_path / "runs/gpt2_dense/version_0"
    ledger = read_ledger(run)
    assert set(ledger.phase) == {0, 1, 2}
    assert ledger.flops[-1] < 0.8 * ledger.dense_flops[-1]
    levels = [row["multilevel/level"] for row in csv.DictReader((run / "metrics.csv").open())]
    # 5 % of the steps in the full model, 50 % in the small one; validation and learning rate have rows of their own.
    assert [float(level) for level in levels if level] == [0] + [1] * 10 + [0] * 9
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "runs/gpt2_dense/version_0/model")
    assert model.num_parameters() == ledger.num_parameters[-1]
    assert "Compute ledger" in capfd.readouterr().out


@pytest.mark.parametrize("recipe", DROPPING_RECIPES, ids=lambda path: path.stem)
def test_layer_dropping_can_be_rehearsed_in_a_single_step(recipe):
    little = LITTLE_IMAGES if "lit_accel.data.ImageDataModule" in recipe.read_text() else LITTLE_TEXT
    run_a_little("--config", str(recipe), "--trainer.fast_dev_run=true", little=little)


@pytest.mark.parametrize("method", ["progressive_layer_dropping", "sensitivity_layer_dropping"])
def test_layer_dropping_goes_on_top_of_a_dense_recipe(method, tmp_path):
    run_a_little(
        *("--config", str(CONFIGS / "recipe/deit_dense.yaml")),
        *("--config", str(CONFIGS / f"method/{method}.yaml")),
        *("--trainer.max_steps=20", "--trainer.val_check_interval=20"),
        little=LITTLE_IMAGES,
    )
    run = tmp_path / "runs/deit_dense/version_0"
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["layer_dropping/kept_flops"]]
    assert len(rows) == 2
    assert all(0 < float(row["layer_dropping/kept_flops"]) < 1 for row in rows)
    assert all(f"layer_dropping/keep_probability/{index:02d}" in rows[0] for index in range(6))
    ledger = read_ledger(run)
    assert ledger.flops[-1] < ledger.dense_flops[-1]  # also with what measuring costs
    assert (run / "sensitivities.png").exists() == (method == "sensitivity_layer_dropping")
    assert (tmp_path / "runs/deit_dense/version_0/model/config.json").exists()


def test_layer_dropping_recipes_differ_from_the_dense_ones_as_they_say():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES}
    for name, changed in {
        "gpt2_pld": {"n_layer", "n_embd", "n_head"},
        "gpt2_sbld": {"n_layer", "n_embd", "n_head"},
        "bert_pld": {"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"},
        "deit_pld": set(),
        "swinv2_sbld": {"drop_path_rate"},
    }.items():
        recipe, dense = recipes[name], recipes[f"{name.partition('_')[0]}_dense"]
        sizes, dense_sizes = (
            {**given["model"]["init_args"].pop("overrides", {}), **given["model"]["init_args"].pop("model_kwargs", {})}
            for given in (recipe, json.loads(json.dumps(dense)))
        )
        assert {key for key in sizes if sizes[key] != dense_sizes.get(key)} == changed
        assert sizes.keys() | changed == dense_sizes.keys() | changed
        assert recipe["data"] == dense["data"]
        assert recipe["trainer"]["max_steps"] == dense["trainer"]["max_steps"]
    assert recipes["gpt2_pld"]["model"] == recipes["gpt2_sbld"]["model"]


@pytest.mark.parametrize("data", ["stdlib_bpe", "stdlib_bytes"])
def test_fragments_compose(data):
    fragments = [CONFIGS / "model/gpt2_tiny.yaml", CONFIGS / f"data/{data}.yaml"]
    cli = parsed("fit", *(f"--config={fragment}" for fragment in fragments), "--trainer.accelerator=cpu")
    assert cli.model.model.config.vocab_size == cli.datamodule.vocab_size


@pytest.mark.parametrize("model", ["deit_digits", "swinv2_digits"])
def test_fragments_of_images_compose(model):
    fragments = [CONFIGS / f"model/{model}.yaml", CONFIGS / "data/digits.yaml"]
    cli = parsed("fit", *(f"--config={fragment}" for fragment in fragments), "--trainer.accelerator=cpu")
    assert cli.model.num_classes == cli.datamodule.num_classes


@pytest.mark.parametrize("recipe", ["deit", "swinv2"])
def test_a_recipe_repeats_its_fragments(recipe):
    """Dense and V-cycle differ in the method alone, and both hold what the fragments say."""
    dense, vcycle, model, data = (
        yaml.safe_load((CONFIGS / path).read_text())
        for path in (
            f"recipe/{recipe}_dense.yaml",
            f"recipe/{recipe}_vcycle.yaml",
            f"model/{recipe}_digits.yaml",
            "data/digits.yaml",
        )
    )
    assert dense["model"] == vcycle["model"] == model["model"]
    assert dense["data"] == vcycle["data"] == data["data"]
    assert dense["trainer"]["max_steps"] == vcycle["trainer"]["max_steps"]


@pytest.mark.parametrize("called", ["fit", "validate", "test", "predict", "plan"])
def test_a_subcommand_has_all_its_arguments_and_collects_no_others(called, capsys, monkeypatch):
    collected = []
    add = LitAccelCLI.add_core_arguments_to_parser
    monkeypatch.setattr(
        LitAccelCLI, "add_core_arguments_to_parser", lambda self, parser: (collected.append(parser), add(self, parser))
    )
    with pytest.raises(SystemExit) as ended:
        main([called, "--help"])
    assert ended.value.code == 0
    assert len(collected) == 1
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("trainer.max_steps", "model", "data", "seed_everything", "config"))


def test_without_a_subcommand_all_of_them_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in ("fit", "validate", "test", "predict", "plan"))


def test_a_default_that_a_checkpoint_overrules_is_said():
    """The command cannot know whether it was given, or is what nobody has said."""
    model = {"class_path": "lit_accel.tasks.ImageClassification", "init_args": {"mixup": 0.0, "label_smoothing": 0.1}}
    checkpoint = {"hyper_parameters": {"mixup": 0.8, "label_smoothing": 0.1}}
    with pytest.warns(UserWarning, match=r"model.mixup is 0.0, its default.*trained with 0.8, which holds"):
        check_same_model(checkpoint, model)
    with pytest.raises(MisconfigurationException, match="which would hold"):
        check_same_model(checkpoint, {**model, "init_args": {"mixup": 0.4}})


def test_a_folder_may_be_written_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    task = CausalLM("gpt2", overrides={"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16}, vocab_size=61)
    task.model.save_pretrained(tmp_path / "gpt")
    again = CausalLM("~/gpt", vocab_size=61)
    assert all(torch.equal(one, other) for one, other in zip(task.parameters(), again.parameters(), strict=True))
