"""What watches over a run with methods: numbers after a transition, the way back, ranks, interrupted accumulation."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from lit_accel import (
    Composition,
    ComputeLedger,
    MixedSparsityTraining,
    MultiLevelTraining,
    NonFiniteError,
    Phase,
    ProgressiveLayerDropping,
    RandomLTD,
    TrainingGuard,
)
from lit_accel.methods.guard import RollBack
from tests.training import TinyModule, loader, make_trainer

STEPS, DOWN, UP = 20, 4, 12
PHASES = [Phase(0, DOWN), Phase(1, UP - DOWN), Phase(0)]
# Transitions are where epochs end, from which a plain data loader goes on exactly.
DATA = partial(loader, num_samples=8 * DOWN)
# Denser and sparser without an update in between.
STAGES = [(0, 0.0), (4, 0.5), (12, 0.0)]


class Spoiled(TinyModule):
    """Its loss, or the gradient of one parameter, is not finite in one step."""

    def __init__(self, step: int, value: float = math.nan, *, in_gradient: bool = False) -> None:
        super().__init__()
        self.step, self.value, self.in_gradient = step, value, in_gradient

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == self.step and not self.in_gradient:
            return loss * self.value
        return loss

    def on_after_backward(self):
        if self.trainer.global_step == self.step and self.in_gradient:
            next(self.net.parameters()).grad[0, 0] = self.value


def cycle() -> MultiLevelTraining:
    return MultiLevelTraining(phases=PHASES)


def roll_back() -> TrainingGuard:
    return TrainingGuard(roll_back=True)


def fit(folder: Path, module: TinyModule, *callbacks: L.Callback, **options) -> L.Trainer:
    trainer = make_trainer(folder, callbacks=callbacks, **{"max_steps": STEPS, **options})
    trainer.fit(module, DATA())
    return trainer


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("in_gradient", [False, True])
@pytest.mark.parametrize("step", [DOWN, UP, UP + 9])
def test_is_found_after_a_change_of_size(tmp_path, step, value, in_gradient):
    module = Spoiled(step, value, in_gradient=in_gradient)
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, module, cycle(), max_steps=24)
    message = str(caught.value)
    start, levels = (DOWN, "level 0 to level 1") if step == DOWN else (UP, "level 1 to level 0")
    assert f"Step {step}: " in message
    assert f"after a transition at step {start}: MultiLevelTraining has changed the model from" in message
    assert levels in message
    assert f"{sum(p.numel() for p in module.net.parameters()):,} parameters" in message
    assert "The learning rate is 0.01." in message
    assert f"Right before the transition the loss was {module.losses[start - 1]:.4g}." in message
    assert ("gradients are not finite, of net." in message) is (in_gradient or not math.isfinite(value))
    # The step was not applied.
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize(("step", "num_steps"), [(UP + 3, 3), (DOWN, 0)])
def test_is_left_alone_long_after(tmp_path, step, num_steps):
    module = Spoiled(step)
    fit(tmp_path, module, cycle(), TrainingGuard(num_steps=num_steps))
    assert math.isnan(module.losses[-1])


class Manual(Spoiled):
    """Does by itself what Lightning does for others, and returns nothing."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "num_micro_batches", "is_scaled"),
    [(Spoiled, 2, False), (Spoiled, 1, True), (Spoiled, 2, True), (Manual, 1, True)],
)
def test_says_the_loss_that_the_module_computed(tmp_path, kind, num_micro_batches, is_scaled):
    """Lightning divides it among micro-batches and scales it for fp16, before any callback sees it."""
    module = kind(DOWN)
    plugins = [MixedPrecision("16-mixed", "cpu")] if is_scaled else []
    options = {"accumulate_grad_batches": num_micro_batches, "plugins": plugins, "max_epochs": -1, "strategy": "auto"}
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, module, ProgressiveLayerDropping(), Composition(dense_warmup=DOWN), **options)
    losses = module.losses[(DOWN - 1) * num_micro_batches : DOWN * num_micro_batches]
    assert f"Right before the transition the loss was {sum(losses) / len(losses):.4g}." in str(caught.value)


def test_does_not_blame_a_transition_for_what_was_there_before(tmp_path):
    with pytest.raises(
        NonFiniteError, match=f"Step {DOWN}: .* Right before the transition the loss was nan: it is not"
    ):
        fit(tmp_path, Spoiled(2), cycle())


@pytest.mark.parametrize("step", [4, 6, 12])
def test_is_found_where_units_are_switched(tmp_path, step):
    method = MixedSparsityTraining(stages=STAGES, update_every=2, quantum=2)
    with pytest.raises(NonFiniteError, match=f"at step {step}: MixedSparsityTraining has ") as caught:
        fit(tmp_path, Spoiled(step), method, TrainingGuard(num_steps=1))
    words = {4: "a sparsity of 0 to one of 0.5", 6: "replaced units at a sparsity of 0.5", 12: "of 0.5 to one of 0"}
    assert words[step] in str(caught.value)


def test_is_found_where_dropping_begins(tmp_path):
    with pytest.raises(NonFiniteError, match="at step 5: blocks or tokens are dropped from here on"):
        fit(tmp_path, Spoiled(6), ProgressiveLayerDropping(), Composition(dense_warmup=5))


def test_accumulated_micro_batches_are_all_looked_at(tmp_path):
    class First(Spoiled):
        def training_step(self, batch, batch_idx):
            loss = TinyModule.training_step(self, batch, batch_idx)
            return loss * math.inf if self.trainer.global_step == self.step and batch_idx % 3 == 0 else loss

    with pytest.raises(NonFiniteError, match="the loss is inf"):
        fit(tmp_path, First(DOWN + 1), cycle(), accumulate_grad_batches=3, max_epochs=-1)


@pytest.mark.parametrize("step", [DOWN + 2, UP + 2])
def test_rolls_back(tmp_path, step):
    """The module has the weights and the size from before the transition, and the run can go on from there."""
    start = DOWN if step < UP else UP
    kept = {}

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == start:
                kept.update({key: value.clone() for key, value in pl_module.state_dict().items()})

    module = Spoiled(step)
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, module, cycle(), Keep(), ComputeLedger(print_table=False), TrainingGuard(roll_back=True))
    path = tmp_path / "before_transition.ckpt"
    assert f"Resume from {path}, which was written before the transition" in str(caught.value)
    assert torch.load(path, weights_only=True)["global_step"] == start
    state = module.state_dict()
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[key], value) for key, value in kept.items())

    whole, resumed = TinyModule(), TinyModule()
    fit(tmp_path, whole, cycle())
    trainer = make_trainer(tmp_path, callbacks=[cycle()], max_steps=STEPS)
    trainer.fit(resumed, DATA(), ckpt_path=path)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("step", [DOWN, UP])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (partial(ModelCheckpoint, every_n_train_steps=1000, save_on_exception=True, save_last=True), "last"),
        (OnExceptionCheckpoint, "on_exception"),
    ],
)
def test_what_is_saved_on_the_exception_is_not_rolled_back(tmp_path, step, make, name):
    """It can be resumed, from the step that was not applied; the module is rolled back all the same."""
    module, saved = Spoiled(step), tmp_path / "saved"
    size = sum(parameter.numel() for parameter in module.parameters())
    with pytest.raises(NonFiniteError):
        fit(tmp_path, module, cycle(), make(saved), roll_back(), enable_checkpointing=True)
    assert (sum(parameter.numel() for parameter in module.parameters()) == size) is (step == DOWN)

    whole, resumed = TinyModule(), TinyModule()
    fit(tmp_path, whole, cycle())
    make_trainer(tmp_path, callbacks=[cycle()], max_steps=STEPS).fit(resumed, DATA(), ckpt_path=saved / f"{name}.ckpt")
    assert resumed.losses == whole.losses[step:]
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class LeavesOut(Spoiled):
    """Does not save what is frozen."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.strict_loading = False
        self.net.transformer.wpe.requires_grad_(False)

    def on_save_checkpoint(self, checkpoint):
        del checkpoint["state_dict"]["net.transformer.wpe.weight"]


def test_rolls_back_where_frozen_weights_are_not_saved(tmp_path):
    module = LeavesOut(DOWN)
    with pytest.raises(NonFiniteError):
        fit(tmp_path, module, RandomLTD(start_tokens=4, quantum=1), Composition(dense_warmup=DOWN), roll_back())
    state = torch.load(tmp_path / "before_transition.ckpt", weights_only=True)["state_dict"]
    assert "net.transformer.wpe.weight" not in state
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())


def test_a_roll_back_that_fails_does_not_hide_why(tmp_path):
    """At the size of before, nobody has the weights that are not saved."""
    with pytest.warns(match="could not be given the weights") as said, pytest.raises(NonFiniteError):
        fit(tmp_path, LeavesOut(DOWN), cycle(), roll_back())
    assert any("lacks 1 of its parameters: net.transformer.wpe.weight" in str(each.message) for each in said)


def test_rolls_back_whatever_the_hyper_parameters_are(tmp_path):
    """A path among them, for one, is nothing that torch loads as a mere weight."""

    class Configured(Spoiled):
        def __init__(self, step: int, data: Path) -> None:
            super().__init__(step)
            self.save_hyperparameters()

    module = Configured(DOWN, data=tmp_path)
    size = sum(parameter.numel() for parameter in module.net.parameters())
    with pytest.raises(NonFiniteError):
        fit(tmp_path, module, cycle(), TrainingGuard(roll_back=True))
    assert sum(parameter.numel() for parameter in module.net.parameters()) == size


@pytest.mark.parametrize("given", ["~/kept", "file://{}/kept"])
def test_rolls_back_from_the_home_folder(tmp_path, monkeypatch, given):
    """The folder is the one that Lightning would mean."""
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    module = Spoiled(DOWN)
    size = sum(parameter.numel() for parameter in module.net.parameters())
    guard = TrainingGuard(roll_back=True, folder=given.format(tmp_path))
    with pytest.raises(NonFiniteError, match=f"Resume from {tmp_path}/kept/before_transition.ckpt, which"):
        fit(tmp_path, module, cycle(), guard)
    assert sum(parameter.numel() for parameter in module.net.parameters()) == size
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    "methods",
    [
        lambda: [cycle()],
        lambda: [MixedSparsityTraining(stages=STAGES, update_every=2, quantum=2)],
        lambda: [RandomLTD(start_tokens=4, quantum=1, growth=0.8), ProgressiveLayerDropping()],
    ],
    ids=["cycle", "sparsity", "dropping"],
)
def test_changes_nothing(tmp_path, methods):
    """Neither the one that each run has, nor one that writes checkpoints, nor one that is left idle."""
    results = []
    for guard in ([], [TrainingGuard(roll_back=True)], [TrainingGuard(num_steps=0)]):
        module = TinyModule()
        fit(tmp_path, module, *guard, *methods())
        results.append([parameter.detach().clone() for parameter in module.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_each_run_has_one_after_its_methods_and_before_what_saves(tmp_path):
    save = ModelCheckpoint(tmp_path)
    method = cycle()
    trainer = fit(tmp_path, TinyModule(), method, save, enable_checkpointing=True)
    guards = [callback for callback in trainer.callbacks if isinstance(callback, TrainingGuard)]
    assert len(guards) == 1
    order = [trainer.callbacks.index(each) for each in (method, guards[0], save)]
    assert order == sorted(order)
    assert not any(isinstance(c, TrainingGuard) for c in fit(tmp_path, TinyModule(), ComputeLedger()).callbacks)


def test_the_users_own_is_kept_in_its_place(tmp_path):
    mine = TrainingGuard(num_steps=3)
    method = cycle()
    trainer = fit(tmp_path, TinyModule(), mine, method)
    assert [callback for callback in trainer.callbacks if isinstance(callback, TrainingGuard)] == [mine]
    assert trainer.callbacks.index(mine) > trainer.callbacks.index(method)


def test_what_rolls_back_is_there_once_at_the_end(tmp_path):
    """However often a Trainer is prepared."""
    trainer = fit(tmp_path, TinyModule(), cycle(), ModelCheckpoint(tmp_path), roll_back(), enable_checkpointing=True)
    trainer.fit_loop.epoch_loop.max_steps += STEPS
    trainer.fit(trainer.lightning_module, DATA())
    assert [index for index, each in enumerate(trainer.callbacks) if isinstance(each, RollBack)] == [
        len(trainer.callbacks) - 1
    ]


def test_a_gradient_scaler_may_overflow(tmp_path):
    """It skips such a step by itself; a loss that is not finite is another matter."""

    def scaled() -> dict[str, list[MixedPrecision]]:
        return {"plugins": [MixedPrecision("16-mixed", "cpu")]}

    fit(tmp_path, Spoiled(UP + 1, math.inf, in_gradient=True), cycle(), TrainingGuard(num_steps=2), **scaled())
    with pytest.raises(NonFiniteError, match="the loss is inf, after"):
        fit(tmp_path, Spoiled(DOWN + 1, math.inf), cycle(), **scaled())


def test_warns_where_accumulated_gradients_are_lost(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2 and batch_idx % 3 == 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
            if trainer.global_step == 3 and batch_idx % 3 == 2:
                trainer.save_checkpoint(tmp_path / "whole.ckpt")

    options = {"accumulate_grad_batches": 3, "max_epochs": -1, "max_steps": 5}
    fit(tmp_path, TinyModule(), ProgressiveLayerDropping(), Save(), **options)
    for name, warns in (("middle", True), ("whole", False)):
        trainer = make_trainer(tmp_path, callbacks=[ProgressiveLayerDropping()], **options)
        with pytest.warns() as caught:
            trainer.fit(TinyModule(), DATA(), ckpt_path=tmp_path / f"{name}.ckpt")
        said = [str(each.message) for each in caught if "in the middle of optimizer step 2" in str(each.message)]
        assert bool(said) is warns
        if warns:
            assert "gradients of 2 of its 3 micro-batches are lost" in said[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": -1}, "num_steps is -1; it is a number of optimizer steps, at least 0"),
        ({"num_steps": 1.5}, "num_steps is 1.5"),
        ({"num_steps": True}, "num_steps is True"),
        ({"check_ranks_every": 0}, "check_ranks_every is 0; it is a number of optimizer steps, at least 1"),
    ],
)
def test_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingGuard(**arguments)


def test_warns_of_a_folder_for_nothing():
    with pytest.warns(UserWarning, match="folder is ignored"):
        TrainingGuard(folder="somewhere")
