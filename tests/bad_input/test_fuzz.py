"""Whole configurations at random: each is refused with a message of ours, or trains.

``HYPOTHESIS_PROFILE=long`` looks at many more, and at others each time.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lit_accel
from lit_accel.anatomy import AnatomyError
from lit_accel.command_errors import is_raised_by
from lit_accel.data import ImageDataModule, TextDataModule
from lit_accel.tasks import CausalLM, ImageClassification, MaskedLM
from tests.bad_input.harness import TEXT
from tests.bad_input.spaces import CONFIGURATIONS
from tests.training import make_trainer

REFUSALS = (ValueError, TypeError, MisconfigurationException, AnatomyError)
LONG = {"max_examples": int(os.environ.get("FUZZ_EXAMPLES", "2000")), "derandomize": False}
# What fails is not made smaller here, which would take minutes.
SHORT = {"max_examples": 50, "derandomize": True, "phases": [Phase.explicit, Phase.generate]}
CHOSEN: dict[str, Any] = LONG if os.environ.get("HYPOTHESIS_PROFILE") == "long" else SHORT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("fuzz")
    (made / "text.txt").write_text(TEXT)
    return made


def build(folder, configuration: dict[str, Any]) -> tuple[L.Trainer, L.LightningModule, L.LightningDataModule]:
    """Make what a configuration asks for."""
    family, sizes = configuration["family"], configuration["sizes"]
    blocks, width, heads = sizes["blocks"], sizes["width"], sizes["heads"]
    optimizer: Any = getattr(torch.optim, configuration["optimizer"])
    task: L.LightningModule
    data: L.LightningDataModule
    if family == "vit":
        names = {"patch_size": 4, "depth": blocks, "embed_dim": width, "num_heads": heads}
        task = ImageClassification(
            "deit_tiny_patch16_224",
            model_kwargs=names,
            num_classes=10,
            in_chans=1,
            image_size=8,
            optimizer=lambda groups: optimizer(groups, lr=0.01),
        )
        given_data = {name: value for name, value in configuration["data"].items() if name != "block_size"}
        data = ImageDataModule(image_size=8, in_chans=1, **{"batch_size": 2, **given_data})
    else:
        gpt = {"n_layer": blocks, "n_embd": width, "n_head": heads, "n_positions": 16}
        bert = {
            "num_hidden_layers": blocks,
            "hidden_size": width,
            "num_attention_heads": heads,
            "intermediate_size": 32,
            "max_position_embeddings": 16,
        }
        kind = CausalLM if family == "gpt2" else MaskedLM
        task = kind(
            family,
            overrides=gpt if family == "gpt2" else bert,
            vocab_size=262,
            optimizer=lambda groups: optimizer(groups, lr=0.01),
        )
        data = TextDataModule(
            str(folder / "text.txt"),
            tokenizer="bytes",
            objective="causal" if family == "gpt2" else "masked",
            cache_dir=folder / "cache",
            **{"block_size": 8, "batch_size": 2, **configuration["data"]},
        )
    callbacks = [getattr(lit_accel, name)(**arguments) for name, arguments in configuration["methods"]]
    trainer = make_trainer(
        folder, callbacks=callbacks, limit_val_batches=1, num_sanity_val_steps=0, **configuration["trainer"]
    )
    return trainer, task, data


def names_of(configuration: dict[str, Any]) -> set[str]:
    """Return what a message can speak of: arguments, classes, and what a run is called."""
    names = {"max_steps", "strategy", "run", "phase", "level", "stage", "blocks", "heads", "block", "model", "size"}
    for name, arguments in configuration["methods"]:
        names |= {name, *arguments}
    return names | {*configuration["data"], *configuration["sizes"], "model_kwargs", "overrides"}


def refusal(folder, configuration: dict[str, Any]) -> Exception | None:
    """Train what a configuration asks for; return why it was refused, or None if it was not."""
    try:
        trainer, task, data = build(folder, configuration)
        trainer.fit(task, data)
    except REFUSALS as error:
        return error
    assert trainer.global_step == configuration["trainer"]["max_steps"]
    return None


@settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, **CHOSEN)
@given(configuration=CONFIGURATIONS)
def test_a_configuration_is_refused_or_trains(folder, configuration):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = refusal(folder, configuration)
    if error is not None:
        assert is_raised_by(error, "lit_accel"), f"{type(error).__name__}: {error}"
        assert any(name in str(error) for name in names_of(configuration)), str(error)
