"""A finished run leaves a checkpoint that is an ordinary one: read with ``weights_only=True``, by those who never heard
of lit-accel, and a folder that Hugging Face or timm load.
"""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_accel import Composition, ComputeLedger
from lit_accel.data import ImageDataModule, TextDataModule
from lit_accel.methods.compatibility import MST, MULTI_LEVEL, PLD, RANDOM_LTD, SBLD
from lit_accel.tasks import CausalLM, ImageClassification, MaskedLM, SavePretrained
from tests.checkpoints.plain import BERT, GPT2, IMAGE, MODELS, STEPS, PlainModule, outputs
from tests.composition.runs import METHODS
from tests.training import make_trainer

PROGRAM = Path(__file__).parent / "without_lit_accel.py"
ARMS = {
    "multi-level": (MULTI_LEVEL,),
    "pld": (PLD,),
    "sbld": (SBLD,),
    "random-ltd": (RANDOM_LTD,),
    "mst": (MST,),
    "multi-level-random-ltd": (MULTI_LEVEL, RANDOM_LTD),
}
RUNS = [f"{model}-{arm}" for model in MODELS for arm in ARMS]
TASKS = {"gpt2": MULTI_LEVEL, "bert": MST, "deit": PLD}
LIGHTNINGS_KEYS = {
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "state_dict",
    "loops",
    "callbacks",
    "optimizer_states",
    "lr_schedulers",
    "hparams_name",
    "hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hyper_parameters",
}


def fit(folder: Path, module: L.LightningModule, methods, callbacks=(), datamodule=None) -> L.Trainer:
    """Train until the run is over; its last checkpoint is ``last.ckpt``."""
    trainer = make_trainer(
        folder,
        callbacks=[
            *(METHODS[method]() for method in methods),
            Composition(),
            ComputeLedger(print_table=False),
            ModelCheckpoint(folder, save_last=True),
            *callbacks,
        ],
        max_steps=STEPS,
        max_epochs=-1,
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=datamodule)
    return trainer


def trained(folder: Path, name: str, arm: str) -> dict[str, str]:
    """Train the user's module with methods attached, and say where everything is."""
    L.seed_everything(0, verbose=False)
    module = PlainModule(name)
    config = copy.deepcopy(getattr(module.model, "config", None))
    model_class = type(module.model)
    fit(folder, module, ARMS[arm])
    assert type(module.model) is model_class
    assert config is None or module.model.config.to_dict() == config.to_dict()
    torch.save({"outputs": outputs(name, module.model)}, folder / "expected.pt")
    return {"model": name, "path": str(folder / "last.ckpt"), "expected": str(folder / "expected.pt")}


def make_task(name: str, folder: Path) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Return a task and its data."""
    if name == "deit":
        size = {key: value for key, value in IMAGE.items() if key != "num_classes"}
        data = ImageDataModule(image_size=12, in_chans=3, batch_size=4)
        return ImageClassification("deit_tiny_patch16_224", model_kwargs=size, num_classes=10), data
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(300)))
    data = TextDataModule(
        source=str(folder / "text.txt"),
        tokenizer="bpe",
        vocab_size=280,
        block_size=12,
        batch_size=4,
        cache_dir=folder / "cache",
        objective="causal" if name == "gpt2" else "masked",
    )
    if name == "gpt2":
        return CausalLM("gpt2", overrides=GPT2, vocab_size=280), data
    return MaskedLM("bert", overrides=BERT, vocab_size=280), data


def task_trained(folder: Path, name: str) -> dict[str, str]:
    """Train a task, which hands its model on as a folder, and say where everything is."""
    L.seed_everything(0, verbose=False)
    task, data = make_task(name, folder)
    fit(folder, task, (TASKS[name],), [SavePretrained(str(folder / "final"))], data)
    batch = next(iter(data.train_dataloader()))
    inputs = batch[0] if name == "deit" else batch["input_ids"]
    with torch.no_grad():
        given = task.model.eval()(inputs)
    given = given if isinstance(given, torch.Tensor) else given.logits
    torch.save({"inputs": inputs, "outputs": given}, folder / "expected.pt")
    return {
        "model": name,
        "path": str(folder / "last.ckpt"),
        "expected": str(folder / "expected.pt"),
        "folder": str(folder / "final"),
    }


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, dict[str, str]]:
    """All runs, by name."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    make = {f"{name}-{arm}": functools.partial(trained, name=name, arm=arm) for name in MODELS for arm in ARMS}
    make |= {f"task-{name}": functools.partial(task_trained, name=name) for name in TASKS}
    for case, run in make.items():
        (folder / case).mkdir()
        found[case] = run(folder / case)
    return found


@pytest.fixture(scope="module")
def found(cases, tmp_path_factory) -> dict[str, str]:
    """What a process without the package had to complain about, by case."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "cases.json").write_text(json.dumps([{"id": case, **given} for case, given in cases.items()]))
    subprocess.run([sys.executable, str(PROGRAM), str(folder)], cwd=folder, check=True)
    return json.loads((folder / "found.json").read_text())


def assert_is_plain(value: object, where: str) -> None:
    """See that a state is made of nothing but primitives, lists, dicts and tensors."""
    if type(value) is dict:
        for key, each in value.items():
            assert type(key) in (str, int), f"{where}: {key!r}"
            assert_is_plain(each, f"{where}/{key}")
    elif type(value) in (list, tuple):
        for index, each in enumerate(value):
            assert_is_plain(each, f"{where}/{index}")
    else:
        assert value is None or type(value) in (bool, int, float, str, torch.Tensor), f"{where}: {type(value)}"


def our_states(checkpoint: dict) -> dict[str, dict]:
    """Return what lit-accel has written into a checkpoint, by key."""
    ours = {key: value for key, value in checkpoint.items() if key not in LIGHTNINGS_KEYS}
    return ours | {key: value for key, value in checkpoint["callbacks"].items() if "ModelCheckpoint" not in key}


@pytest.mark.parametrize("case", [*RUNS, *(f"task-{name}" for name in TASKS)])
def test_all_that_is_written_is_plain_and_versioned(cases, case):
    ours = our_states(torch.load(cases[case]["path"], weights_only=True))
    num_methods = 1 if case.startswith("task") else len(ARMS[case.partition("-")[2]])
    data = case.startswith("task")
    # The size, the methods, Composition, the ledger; with a task, the data.
    assert len(ours) == 3 + num_methods + data
    for key, state in ours.items():
        assert type(state["version"]) is int, key
        assert_is_plain(state, key)


@pytest.mark.parametrize("case", [*RUNS, *(f"task-{name}" for name in TASKS)])
def test_the_plain_class_takes_the_weights_and_computes_the_same(found, case):
    assert not found[case], found[case]


@pytest.mark.parametrize("case", RUNS)
def test_a_plain_trainer_goes_on(found, case):
    assert not found[f"{case}-trained-on"], found[f"{case}-trained-on"]
