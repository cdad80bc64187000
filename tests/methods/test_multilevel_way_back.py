"""The way back up in a fit: the weights that it gives the larger model, and what becomes of the loss."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from torch.nn.functional import cross_entropy

from lit_accel import Level, MultiLevelTraining, Phase
from lit_accel.anatomy import anatomy_of
from lit_accel.methods.multilevel import Interpolation, coalesce, interpolate, level_map
from tests.training import TinyModule, Tokens, loader, make_trainer

DOWN, UP, END = 10, 40, 65
HELD_OUT = Tokens(320).ids[256:]


class Models(L.Callback):
    """Keeps the transformer as it is when this callback's turn comes before given steps."""

    def __init__(self, *steps):
        self.steps, self.at = steps, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps:
            self.at[trainer.global_step] = copy.deepcopy(pl_module.net)


def models_of_a_cycle(tmp_path, *, down, up, end, **settings):
    """Return the models right before and right after each change of size; the last one is that of the end."""
    method = MultiLevelTraining(phases=[Phase(0, down), Phase(1, up - down), Phase(0)], **settings)
    before, after, module = Models(down, up), Models(down, up), TinyModule()
    trainer = make_trainer(tmp_path, callbacks=[before, method, after], max_steps=end, max_epochs=-1)
    trainer.fit(module, loader())
    return before.at[down], after.at[down], before.at[up], after.at[up], module.net


def assert_same(actual, expected):
    expected = dict(expected.named_parameters())
    assert {name for name, _ in actual.named_parameters()} == expected.keys()
    for name, parameter in actual.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def loss(model):
    with torch.no_grad():
        logits = model(input_ids=HELD_OUT).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), HELD_OUT[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    ("settings", "rule", "depth_mode"),
    [
        ({"preset": "correction"}, Interpolation(1.0, 0.0), "avg"),
        ({"preset": "paper"}, Interpolation.of_alpha(0.25), "avg"),
        ({"preset": "exact"}, Interpolation.of_alpha(1.0), "zero"),
        ({"coarse": 0.3, "fine": 0.8}, Interpolation(0.3, 0.8), "avg"),
    ],
    ids=["correction", "paper", "exact", "pair"],
)
def test_the_stored_model_and_the_small_one_are_merged_by_the_rule(tmp_path, settings, rule, depth_mode):
    stored, shrunk, small, grown, _ = models_of_a_cycle(tmp_path, down=2, up=4, end=5, **settings)
    step = level_map(anatomy_of(stored), depth_mode=depth_mode)
    assert_same(shrunk, coalesce(stored, step))
    assert not torch.equal(small.lm_head.weight, shrunk.lm_head.weight)
    assert_same(grown, interpolate(stored, small, step, rule))


@pytest.mark.parametrize(
    "settings",
    [{"preset": "exact"}, {"alpha": 1.0, "levels": [Level(width=2, depth=1)]}],
    ids=["exact", "width"],
)
def test_what_replaces_the_stored_model_whole_keeps_its_loss(tmp_path, settings):
    stored, _, small, grown, _ = models_of_a_cycle(tmp_path, down=2, up=8, end=9, **settings)
    assert loss(grown) == pytest.approx(loss(small), abs=1e-6)
    assert abs(loss(small) - loss(stored)) > 1e-2


def test_no_mixture_is_worse_than_the_stored_model(tmp_path):
    stored, _, small, _, _ = models_of_a_cycle(tmp_path, down=DOWN, up=UP, end=UP + 1)
    step = level_map(anatomy_of(stored))
    for alpha in (0.1, 0.25, 0.5, 0.75, 0.9):
        mixed = loss(interpolate(stored, small, step, Interpolation.of_alpha(alpha)))
        assert mixed <= loss(stored) + 0.1, alpha


@pytest.mark.parametrize("settings", [{}, {"preset": "paper"}, {"alpha": 0.5}], ids=["correction", "paper", "half"])
def test_the_loss_is_soon_below_that_from_before_the_cycle(tmp_path, settings):
    stored, _, _, grown, last = models_of_a_cycle(tmp_path, down=DOWN, up=UP, end=END, **settings)
    assert loss(grown) <= loss(stored) + 0.1
    assert loss(last) < min(loss(stored), loss(grown)) - 0.1
