"""Keys, types and class paths that the command cannot read."""

from __future__ import annotations

import pytest

from tests.bad_input.harness import run_command
from tests.bad_input.rows import Command

LTD = "--trainer.callbacks+=lit_accel.RandomLTD"
LEVELS = "--trainer.callbacks+=lit_accel.MultiLevelTraining"


def alone(name, args, message, **kwargs):
    return Command(name, args, message, **{"base": None, "code": 2, **kwargs})


def config(name, content, message, **kwargs):
    return alone(name, ("--config", "bad.yaml"), message, files={"bad.yaml": content}, **kwargs)


def wrong(name, args, message, **kwargs):
    args = (args,) if isinstance(args, str) else args
    return Command(name, args, message, **{"code": 2, **kwargs})


ROWS = [
    # Keys
    wrong(
        "an unknown option",
        "--trainr.max_steps=3",
        "There is no argument trainr.max_steps. Did you mean trainer.max_steps? See",
    ),
    wrong(
        "an unknown option of the Trainer",
        "--trainer.max_stpes=3",
        "There is no argument trainer.max_stpes. Did you mean trainer.max_steps?",
    ),
    wrong("an unknown option of the command", "--sed=3", "There is no argument sed."),
    wrong("a seed that is none", "--seed_everything=-1", "-1 is not in bounds, numpy accepts from 0 to", code=1),
    alone(
        "a subcommand that is misspelt",
        ("fitt", "--config", "good.yaml"),
        "fitt",
        subcommand=None,
        files={"good.yaml": "trainer: {max_steps: 1}"},
    ),
    wrong(
        "an unknown argument of the model",
        "--model.init_args.modle=gpt2",
        "model: CausalLM has no argument modle. Did you mean model? It has model,",
    ),
    wrong(
        "an unknown argument of the model, shortly",
        "--model.overides.n_layer=3",
        "model: CausalLM has no argument overides. Did you mean overrides? It has",
    ),
    wrong(
        "an unknown argument of the data",
        "--data.blok_size=3",
        "data: TextDataModule has no argument blok_size. Did you mean block_size?",
    ),
    wrong(
        "an unknown argument of the optimizer",
        ("--model.optimizer=torch.optim.AdamW", "--model.optimizer.lrr=3"),
        "model.optimizer: AdamW has no argument lrr. Did you mean lr? It has lr,",
    ),
    wrong(
        "an unknown argument of the schedule",
        ("--model.lr_scheduler=lit_accel.tasks.WarmupDecay", "--model.lr_scheduler.warmup=3"),
        "model.lr_scheduler: WarmupDecay has no argument warmup. It has",
    ),
    wrong(
        "an unknown argument of a callback",
        (LTD, "--trainer.callbacks.quantm=3"),
        "trainer.callbacks: RandomLTD has no argument quantm. Did you mean quantum?",
    ),
    wrong(
        "an argument of fit for validate",
        "--trainer.callbacks.nope=3",
        "trainer.callbacks is '3', which is none that is known. A class is given by its import path",
        subcommand="validate",
    ),
    # Types
    wrong(
        "text for a whole number", "--trainer.max_steps=many", "trainer.max_steps is 'many'; it must be a whole number."
    ),
    wrong(
        "a fraction for a whole number",
        "--trainer.max_steps=1.5",
        "trainer.max_steps is '1.5'; it must be a whole number.",
    ),
    wrong(
        "text for a number of the data", "--data.batch_size=two", "data.batch_size is 'two'; it must be a whole number."
    ),
    wrong("a list for a number", "--data.batch_size=[1,2]", "data.batch_size is '[1, 2]'; it must be a whole number."),
    wrong(
        "text for a switch",
        "--model.compile_blocks=maybe",
        "model.compile_blocks is 'maybe'; it must be true or false.",
    ),
    wrong("text for a mapping", "--model.overrides=deep", "model.overrides is 'deep'; it must be a mapping or null."),
    wrong(
        "text for a number of a callback",
        (LTD, "--trainer.callbacks.quantum=three"),
        "trainer.callbacks.quantum is 'three'; it must be a whole number. See",
    ),
    wrong(
        "a word that is none of several",
        (LTD, "--trainer.callbacks.scope=lyer"),
        "trainer.callbacks.scope is 'lyer'; it must be one of 'layer', 'route',",
    ),
    wrong(
        "a preset that is none",
        (LEVELS, "--trainer.callbacks.preset=papper"),
        "trainer.callbacks.preset is 'papper'; it must be one of 'correction',",
    ),
    wrong(
        "levels that are a number",
        (LEVELS, "--trainer.callbacks.levels=2"),
        "trainer.callbacks.levels is '2'; it must be a list or null.",
    ),
    wrong(
        "a width that is text",
        (LEVELS, '--trainer.callbacks.levels=[{"width": "wide"}]'),
        "trainer.callbacks.levels.width is 'wide'; it must be a whole number. See",
    ),
    wrong(
        "a level that is a number",
        (LEVELS, "--trainer.callbacks.levels=[2]"),
        "trainer.callbacks.levels is '2', which is no Level. Give",
    ),
    wrong(
        "an objective that is none",
        "--data.objective=denoising",
        "data.objective is 'denoising'; it must be one of 'causal', 'masked'. See",
    ),
    wrong(
        "a precision that is none", "--trainer.precision=12", "trainer.precision is '12'; it must be one of 64, 32, 16,"
    ),
    wrong(
        "a seed that is text",
        "--seed_everything=abc",
        "seed_everything is 'abc'; it must be true or false or a whole number. See",
    ),
    wrong(
        "text for the learning rate",
        ("--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=fast"),
        "model.optimizer.lr is 'fast'; it must be a number.",
    ),
    wrong(
        "a pair with three numbers",
        "--data.crop_scale=[0.1,0.2,0.3]",
        "data.crop_scale is '[0.1, 0.2, 0.3]'; it must be a list of 2 values. See",
        base="vit",
    ),
    wrong(
        "a decay that is none",
        ("--model.lr_scheduler=lit_accel.tasks.WarmupDecay", "--model.lr_scheduler.decay=step"),
        "model.lr_scheduler.decay is 'step'; it must be one of 'linear', 'cosine',",
    ),
    # Class paths
    wrong(
        "a model class that is not there",
        "--model=lit_accel.tasks.CausalML",
        "model: there is no CausalML in lit_accel.tasks. Did you mean CausalLM? See",
    ),
    wrong(
        "a model module that is not there",
        "--model=my_modle.Net",
        "model: my_modle.Net cannot be imported, since there is no module my_modle.",
    ),
    wrong(
        "a model class without its module",
        "--model=CausalML",
        "model is 'CausalML', which is none that is known. A class is given by its import path",
    ),
    wrong(
        "a model that is no LightningModule",
        "--model=torch.nn.Linear",
        "model is 'torch.nn.Linear', which is no LightningModule. Give the import",
    ),
    wrong(
        "a callback as model",
        "--model=lit_accel.RandomLTD",
        "model is 'lit_accel.RandomLTD', which is no LightningModule. Give the",
    ),
    wrong("data that is not there", "--data=lit_accel.data.Nope", "data: there is no Nope in lit_accel.data."),
    wrong(
        "a data set as data",
        "--data=torch.utils.data.TensorDataset",
        "data is 'torch.utils.data.TensorDataset', which is no LightningDataModule.",
    ),
    wrong(
        "a callback that is not there",
        "--trainer.callbacks+=lit_accel.RandomLDT",
        "trainer.callbacks: there is no RandomLDT in lit_accel. Did you mean",
    ),
    wrong(
        "a model as callback",
        "--trainer.callbacks+=torch.nn.Linear",
        "trainer.callbacks is 'torch.nn.Linear', which is no Callback. Give the",
    ),
    wrong(
        "an optimizer that is not there",
        "--model.optimizer=torch.optim.Adamm",
        "model.optimizer: there is no Adamm in torch.optim. Did you mean Adam? See",
    ),
    wrong(
        "a schedule as optimizer",
        "--model.optimizer=torch.optim.lr_scheduler.StepLR",
        "model.optimizer is 'torch.optim.lr_scheduler.StepLR', which is no",
    ),
    wrong(
        "a logger that is not there",
        "--trainer.logger=lightning.pytorch.loggers.CVSLogger",
        "trainer.logger: there is no CVSLogger in lightning.pytorch.loggers. Did",
    ),
    wrong(
        "a class path of one's own that fails to import",
        "--model=broken.Net",
        "broken.py: No module named 'nothing_like_it'.",
        files={"broken.py": "import nothing_like_it\n"},
    ),
    wrong(
        "a class path of one's own with a slip in its module",
        "--model=slip.Net",
        "slip.py: name 'Nett' is not defined.",
        files={"slip.py": "class Net:\n    pass\nNett()\n"},
    ),
    alone(
        "a model without its name",
        ("--model=lit_accel.tasks.CausalLM",),
        "model: CausalLM needs model, which is missing.",
    ),
    alone(
        "a model class path without a name in YAML",
        ("--config", "m.yaml"),
        "model: CausalLM needs model, which is missing.",
        files={"m.yaml": "model: {class_path: lit_accel.tasks.CausalLM}\n"},
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_in_one_message(row, tmp_path, monkeypatch, capsys, cache):
    run_command(row, tmp_path, cache, monkeypatch, capsys)
