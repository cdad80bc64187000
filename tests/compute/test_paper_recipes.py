"""The recipes of the paper's sizes, on the meta device: parameters and FLOPs of every level against counts by hand."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from lit_accel import MultiLevelTraining
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import forward_flops, training_flops
from lit_accel.methods.multilevel.phases import resolve_phases

FOLDER = Path(__file__).parents[2] / "configs" / "recipe" / "paper"
BERT_VOCAB, GPT_VOCAB = 30522, 50257


def bert(blocks, width, tokens=128, vocab=BERT_VOCAB):
    embeddings = (vocab + 512 + 2) * width + 2 * width
    head = width**2 + width + 2 * width + vocab
    parameters = embeddings + blocks * (12 * width**2 + 13 * width) + head
    in_blocks = blocks * (2 * tokens * 12 * width**2 + 4 * width * tokens**2)
    return parameters, in_blocks + 2 * tokens * (width**2 + width * vocab)


def gpt(blocks, width, tokens=512, vocab=GPT_VOCAB):
    parameters = (vocab + 1024) * width + blocks * (12 * width**2 + 13 * width) + 2 * width
    in_blocks = blocks * (2 * tokens * 12 * width**2 + 4 * width * tokens * (tokens + 1) // 2)
    return parameters, in_blocks + 2 * tokens * width * vocab


def deit(blocks, width, patches=196):
    tokens = patches + 1
    patch = 3 * 16 * 16
    parameters = (
        (patch + 1) * width
        + (1 + tokens) * width
        + blocks * (12 * width**2 + 13 * width)
        + 2 * width
        + (width + 1) * 1000
    )
    in_blocks = blocks * (2 * tokens * 12 * width**2 + 4 * width * tokens**2)
    return parameters, in_blocks + 2 * patches * patch * width + 2 * width * 1000


# recipe: what the data adds to the model, the call's tokens, and the counts of each level by hand.
RECIPES = {
    "bert_base": ({"vocab_size": BERT_VOCAB}, 128, [bert(12, 768), bert(6, 384)]),
    "bert_large_2_levels": ({"vocab_size": BERT_VOCAB}, 128, [bert(24, 1024), bert(12, 512)]),
    "bert_large_3_levels": ({"vocab_size": BERT_VOCAB}, 128, [bert(24, 1024), bert(12, 512), bert(6, 256)]),
    "gpt_base": ({"vocab_size": GPT_VOCAB}, 512, [gpt(12, 768), gpt(6, 384)]),
    "deit_base": ({"num_classes": 1000, "in_chans": 3, "image_size": 224}, 197, [deit(12, 768), deit(6, 384)]),
}


def test_every_recipe_is_counted():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_levels_are_what_a_hand_counts(name):
    from_data, num_tokens, expected = RECIPES[name]
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    module_name, _, class_name = config["model"]["class_path"].rpartition(".")
    arguments = {key: value for key, value in config["model"]["init_args"].items() if key not in _OPTIMIZATION}
    with torch.device("meta"):
        module = getattr(import_module(module_name), class_name)(**arguments, **from_data)
    (method,) = (
        MultiLevelTraining(**callback["init_args"])
        for callback in config["trainer"]["callbacks"]
        if callback["class_path"] == "lit_accel.MultiLevelTraining"
    )
    anatomy = anatomy_of(module.model)
    levels = [anatomy, *(level_map.small for level_map in method.plan_levels(anatomy))]
    assert [level.num_parameters for level in levels] == [parameters for parameters, _ in expected]
    assert [forward_flops(level, 1, num_tokens).total for level in levels] == [flops for _, flops in expected]
    data = config["data"]["init_args"]
    assert data.get("block_size", num_tokens) == num_tokens
    resolved = resolve_phases(method.phases, len(levels), config["trainer"]["max_steps"])
    assert resolved[-1].level == 0
    # What a run costs is less than as many full steps.
    costs = [training_flops(level, 1, num_tokens).total for level in levels]
    spent = sum((phase.end - phase.start) * costs[phase.level] for phase in resolved)
    assert spent < 0.75 * resolved[-1].end * costs[0]


_OPTIMIZATION = ("optimizer", "lr_scheduler")
