"""What a change of size in a fit does beside the weights: to the optimizer's state and to stored levels; and when."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as L
import pytest
import torch
from torch.optim import SGD, AdamW

from lit_accel import Level, MultiLevelTraining, Phase
from lit_accel.methods.multilevel import Interpolation, merge_optimizer_state, project_optimizer_state
from lit_accel.methods.multilevel.phases import v_cycle
from tests.training import TinyModule, loader, make_trainer

PHASES = [Phase(0, 2), Phase(1, 2), Phase(0)]
DOWN, UP, STEPS = 2, 4, 5
OPTIMIZERS = {"adamw": AdamW, "amsgrad": partial(AdamW, amsgrad=True), "sgd": partial(SGD, momentum=0.9)}


class Beside(TinyModule):
    """A module that trains something of its own beside the transformer, of the same size at every level."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.beside = torch.nn.Linear(1, 1)

    def loss(self, ids):
        loss = super().loss(ids)
        return loss + self.beside(loss.detach()[None]).square().sum()


class States(L.Callback):
    """Keeps the optimizer's state by parameter name, as it is when this callback's turn comes before a step."""

    def __init__(self):
        self.at = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        named = {name: optimizer.state.get(parameter, {}) for name, parameter in pl_module.named_parameters()}
        self.at.append({name: {key: value.clone() for key, value in entry.items()} for name, entry in named.items()})


def states_of_a_fit(tmp_path, method, optimizer):
    before, after = States(), States()
    trainer = make_trainer(tmp_path, callbacks=[before, method, after], max_steps=STEPS)
    trainer.fit(Beside(optimizer=optimizer), loader())
    return before.at, after.at


def inside(state):
    return {name.removeprefix("net."): entry for name, entry in state.items() if name.startswith("net.")}


def outside(state):
    return {name: entry for name, entry in state.items() if not name.startswith("net.")}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, entry in expected.items():
        assert actual[name].keys() == entry.keys(), name
        for key, value in entry.items():
            assert torch.equal(actual[name][key], value), (name, key)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["project", "second_moment"])
def test_the_state_of_the_optimizer_goes_along(tmp_path, policy, optimizer):
    method = MultiLevelTraining(phases=PHASES, alpha=0.5, optimizer_state=policy)
    before, after = states_of_a_fit(tmp_path, method, OPTIMIZERS[optimizer])
    (lm,) = method.maps
    down = project_optimizer_state(inside(before[DOWN]), lm, "down", policy)
    up = project_optimizer_state(inside(before[UP]), lm, "up", policy)
    if policy == "project":
        up = merge_optimizer_state(inside(before[DOWN]), up, Interpolation.of_alpha(0.5))
    for step, expected in ((DOWN, down), (UP, up)):
        assert_equal(inside(after[step]), expected)
        assert all(entry["step"] == step for entry in after[step].values() if "step" in entry)
        assert all(outside(before[step]).values())
        assert_equal(outside(after[step]), outside(before[step]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_begins_anew(tmp_path, optimizer):
    method = MultiLevelTraining(phases=PHASES, alpha=0.5, optimizer_state="reset")
    before, after = states_of_a_fit(tmp_path, method, OPTIMIZERS[optimizer])
    for step in (DOWN, UP):
        assert all(before[step].values())
        assert not any(after[step].values())


@pytest.mark.parametrize(("preset", "carries"), [("correction", True), ("paper", False), ("exact", True)])
def test_the_paper_alone_begins_each_phase_with_a_new_optimizer(tmp_path, preset, carries):
    _, after = states_of_a_fit(tmp_path, MultiLevelTraining(phases=PHASES, preset=preset), AdamW)
    for step in (DOWN, UP):
        assert all(bool(entry) == carries for entry in after[step].values())


def test_levels_are_stored_for_as_long_as_the_model_is_smaller(tmp_path):
    """They weigh as much as the model: nothing of them may stay in memory and in checkpoints after the growth."""
    method = MultiLevelTraining(
        [Level()] * 2, [Phase(level, 1) for level in (0, 1, 2, 1)] + [Phase(0)], alpha=0.5, optimizer_state="project"
    )
    weights, moments = [], []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            state = method.state_dict()
            weights.append(sorted(state["stored"]))
            moments.append(sorted(state["stored_moments"]))

    make_trainer(tmp_path, callbacks=[method, Look()], max_steps=STEPS).fit(TinyModule(), loader())
    assert weights == moments == [[], [0], [0, 1], [0], []]


def test_the_default_cycle_has_the_lengths_of_the_documentation():
    """5 % of the steps in each level on the way down, and half of them in small models on the way up."""
    assert v_cycle(1) == [Phase(0, 0.05), Phase(1, 0.5), Phase(0)]
    assert v_cycle(2) == [Phase(0, 0.05), Phase(1, 0.05), Phase(2, 0.25), Phase(1, 0.25), Phase(0)]


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as LAMB and Adan of timm do."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            self.counts.append(group["step"])
        return loss


class ScheduleFree(torch.optim.SGD):
    """Has a key of its own that is called as what a scheduler says."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["scheduled_lr"] = 0.0


def test_who_begins_with_new_moments_begins_to_count_anew(tmp_path):
    Counting.counts = []
    method = MultiLevelTraining(phases=[Phase(0, 2), Phase(1, 3), Phase(0)], optimizer_state="reset")
    make_trainer(tmp_path, callbacks=[method], max_steps=8).fit(TinyModule(optimizer=Counting), loader())
    assert Counting.counts == [1, 2, 1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("rule", ["continue", "rewarm"])
def test_the_learning_rate_of_an_optimizer_without_a_schedule_is_its_own(tmp_path, rule):
    def rates(optimizer):
        method = MultiLevelTraining(
            phases=[Phase(0, 2), Phase(1, 3), Phase(0)], optimizer_state="reset", learning_rate=rule
        )
        module = TinyModule(optimizer=optimizer)
        make_trainer(tmp_path, callbacks=[method], max_steps=8).fit(module, loader())
        return module.rates

    assert rates(ScheduleFree) == rates(torch.optim.SGD)
    assert 0 not in rates(ScheduleFree)
