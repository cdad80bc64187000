"""Subcommands that there are not, and configuration files that cannot be read."""

from __future__ import annotations

import pytest

from tests.bad_input.harness import run_command
from tests.bad_input.rows import Command


def alone(name, args, message, **kwargs):
    return Command(name, args, message, **{"base": None, "code": 2, **kwargs})


def config(name, content, message, **kwargs):
    return alone(name, ("--config", "bad.yaml"), message, files={"bad.yaml": content}, **kwargs)


def added(name, content, message, **kwargs):
    return Command(name, ("--config", "bad.yaml"), message, files={"bad.yaml": content}, code=2, **kwargs)


def wrong(name, args, message, **kwargs):
    args = (args,) if isinstance(args, str) else args
    return Command(name, args, message, **{"code": 2, **kwargs})


ROWS = [
    # Subcommands
    alone(
        "no subcommand",
        (),
        "which subcommand? There are fit, validate, test, predict, plan and report.",
        subcommand=None,
    ),
    alone(
        "an unknown subcommand",
        (),
        "there is no subcommand fti. Did you mean fit? There are fit, validate,",
        subcommand="fti",
    ),
    alone("a subcommand after an unknown option", ("--nope",), "There is no argument nope.", subcommand=None),
    alone("nothing to fit", (), "model is missing. Give a --config file that has it, or --model itself. See"),
    wrong("a word that is no option", "stray", "'stray' is not understood: arguments are written --name=value. See"),
    wrong(
        "an option without its value",
        ("--trainer.max_steps",),
        "--trainer.max_steps needs a value: --trainer.max_steps=VALUE. See",
    ),
    alone(
        "a recipe before the subcommand",
        ("--config", "base.yaml", "fit"),
        "--config comes after the subcommand: lit-accel fit --config base.yaml",
        files={"base.yaml": "trainer:\n  max_steps: 3\n"},
        subcommand=None,
    ),
    # Files
    alone(
        "a configuration that is not there",
        ("--config", "bsae.yaml"),
        "There is no file bsae.yaml, given as --config. Did you mean bert.yaml?",
    ),
    alone(
        "a configuration in a folder that is not there",
        ("--config", "no/base.yaml"),
        "There is no file no/base.yaml, given as --config. There is no folder no",
    ),
    alone(
        "a folder as configuration",
        ("--config", "."),
        "., given as --config, is a folder. Give one YAML file of it, or several",
    ),
    alone("--config without a file", ("--config",), "-c/--config needs a value: --config=VALUE."),
    config("an empty file", "", "bad.yaml is empty. A configuration is a mapping, with keys such as"),
    config("a file of comments", "# trainer:\n", "bad.yaml is empty. A configuration is a mapping, with keys such as"),
    config(
        "a list as configuration",
        "- trainer\n- model\n",
        "bad.yaml holds a list. A configuration is a mapping, with keys such as",
    ),
    config(
        "a word as configuration", "hello\n", "bad.yaml holds a single value. A configuration is a mapping, with keys"
    ),
    config(
        "a tab in YAML",
        "trainer:\n\tmax_steps: 3\n",
        "bad.yaml is no valid YAML, in line 2, column 1: a tab, where YAML allows",
    ),
    config(
        "an open bracket in YAML",
        "trainer: {max_steps: 3\nmodel: 4\n",
        "bad.yaml is no valid YAML, in line 2, column 6: expected ',' or '}', but",
    ),
    config(
        "wrong indentation in YAML",
        "trainer:\n  max_steps: 3\n devices: 1\n",
        "bad.yaml is no valid YAML, in line 3, column 2: expected <block end>, but",
    ),
    config(
        "a picture as configuration",
        b"\x89PNG\r\n\x1a\n\xff\xfe\x00",
        "bad.yaml is no text, and so no YAML file ('utf-8' codec can't decode byte",
    ),
    config(
        "a key twice",
        "trainer: {max_steps: 3}\nmodel: x\ntrainer: {devices: 1}\n",
        "bad.yaml has the key trainer twice, the second time in line 3. Leave one",
    ),
    config(
        "an unknown anchor",
        "trainer: *base\n",
        "bad.yaml is no valid YAML, in line 1, column 10: found undefined alias",
    ),
    added(
        "an unknown key of the top",
        "trianer: {max_steps: 3}\n",
        "There is no argument trianer.max_steps. Did you mean trainer.max_steps?",
    ),
    added(
        "an unknown key of the Trainer",
        "trainer: {max_step: 3}\n",
        "There is no argument trainer.max_step. Did you mean trainer.max_steps? See",
    ),
    added(
        "an unknown key of a class",
        "data: {init_args: {blocksize: 3}}\n",
        "data: TextDataModule has no argument blocksize. Did you mean block_size?",
    ),
    added(
        "a class's argument beside its class_path",
        "data: {class_path: lit_accel.data.TextDataModule, batch_size: 3}\n",
        "data: TextDataModule has no argument class_path. It has source, tokenizer,",
    ),
    added(
        "an unknown key of an optimizer",
        "model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lrr: 1}}}}\n",
        "model.optimizer: AdamW has no argument lrr. Did you mean lr? It has lr,",
    ),
    added(
        "an unknown key of a callback",
        "trainer: {callbacks: [{class_path: lit_accel.RandomLTD, init_args: {quantm: 3}}]}\n",
        "trainer.callbacks: RandomLTD has no argument quantm. Did you mean quantum?",
    ),
    added(
        "an unknown key of a level",
        "trainer: {callbacks: [{class_path: lit_accel.MultiLevelTraining, init_args: {levels: [{widht: 2}]}}]}\n",
        "trainer.callbacks.levels: Level has no argument widht. Did you mean width?",
    ),
    added(
        "an unknown key of a phase",
        "trainer: {callbacks: [{class_path: lit_accel.MultiLevelTraining, init_args: {phases: [{levle: 0}]}}]}\n",
        "trainer.callbacks.phases: Phase has no argument levle. Did you mean level?",
    ),
    added(
        "a phase without a level",
        "trainer: {callbacks: [{class_path: lit_accel.MultiLevelTraining, init_args: {phases: [{length: 0.5}]}}]}\n",
        "trainer.callbacks.phases: Phase needs level, which is missing. See",
    ),
    added(
        "a list instead of a mapping",
        "trainer: [max_steps, 3]\n",
        "bad.yaml has a list as trainer. It must be a mapping, of arguments and",
    ),
    added(
        "a mapping instead of a number",
        "trainer: {max_steps: {a: 1}}\n",
        "trainer.max_steps is \"{'a': 1}\"; it must be a whole number.",
    ),
    added(
        "init_args that are a list",
        "model: {class_path: lit_accel.tasks.CausalLM, init_args: [gpt2]}\n",
        "model.init_args must be a mapping from names of arguments to their values.",
    ),
    added(
        "callbacks that are names",
        "trainer: {callbacks: [RandomLDT]}\n",
        "trainer.callbacks is \"['RandomLDT']\", which is no Callback. Give the",
    ),
    added(
        "a callback without a class",
        "trainer: {callbacks: [{init_args: {quantum: 3}}]}\n",
        "trainer.callbacks is \"[{'init_args': {'quantum': 3}}]\", which is no",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_in_one_message(row, tmp_path, monkeypatch, capsys, cache):
    run_command(row, tmp_path, cache, monkeypatch, capsys)
