"""The resizing strategies, used by a callback that is not ours."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.anatomy import anatomy_of
from lit_accel.methods.multilevel import coalesce, level_map
from lit_accel.strategies import ResizableDDPStrategy, ResizableSingleDeviceStrategy
from scripts.measure_transition import measure
from tests.training import TinyModule, loader, make_trainer


class Halve(L.Callback):
    """Halves the depth at a step, as any user's callback could."""

    def __init__(self, at: int = 3, carry=None, fail: bool = False) -> None:
        self.at, self.carry, self.fail = at, carry, fail
        self.done = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != self.at or self.done:
            return
        self.done = True

        def rebuild():
            if self.fail:
                raise RuntimeError("no")
            pl_module.net = coalesce(pl_module.net, level_map(anatomy_of(pl_module.net), width=1, depth=2))

        trainer.strategy.resize(rebuild, self.carry)


def test_names_are_registered():
    assert StrategyRegistry["resizable"]["strategy"] is ResizableSingleDeviceStrategy
    assert StrategyRegistry["resizable_ddp"]["strategy"] is ResizableDDPStrategy


@pytest.mark.parametrize("strategy", ["resizable", "resizable_ddp"])
def test_other_callbacks_can_resize(tmp_path, strategy):
    module = TinyModule(scheduler="cosine")
    monitor = LearningRateMonitor()
    trainer = make_trainer(
        tmp_path, callbacks=[Halve(), monitor], strategy=strategy, max_steps=8, logger=CSVLogger(tmp_path)
    )
    trainer.fit(module, loader())
    assert module.sizes[:3] == [module.sizes[0]] * 3
    assert len(set(module.sizes[3:])) == 1
    assert module.sizes[3] < module.sizes[2]
    (event,) = trainer.strategy.resizes
    assert (event.step, event.num_parameters_before, event.num_parameters_after) == (3, *module.sizes[2:4])
    # The wrapper of the new size is gone at the end, as Lightning's own is.
    assert trainer.strategy.model is module
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_resize_without_training_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.validate(TinyModule(), loader(num_samples=8))
    with pytest.raises(MisconfigurationException, match="while it is being trained"):
        trainer.strategy.resize(lambda: None)


def test_resizing_in_validation_is_refused(tmp_path):
    class InValidation(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            trainer.strategy.resize(lambda: None)

    trainer = make_trainer(tmp_path, callbacks=[InValidation()], max_steps=4, num_sanity_val_steps=0)
    with pytest.raises(MisconfigurationException, match="on_train_batch_start"):
        trainer.fit(TinyModule(), loader(num_samples=8), loader(num_samples=8))


@pytest.mark.parametrize("carry", [None, dict])
def test_a_failed_rebuild_leaves_the_old_model(tmp_path, carry):
    module = TinyModule()
    net = module.net
    with pytest.raises(RuntimeError, match="no"):
        make_trainer(tmp_path, callbacks=[Halve(fail=True, carry=carry)], max_steps=8).fit(module, loader())
    assert module.net is net


def test_changed_parameter_groups_are_refused(tmp_path):
    class Groups(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD([{"params": [parameter]} for parameter in self.parameters()], lr=0.1)

    with pytest.raises(MisconfigurationException, match="number of groups independent"):
        make_trainer(tmp_path, callbacks=[Halve()], max_steps=8).fit(Groups(), loader())


def test_a_scheduler_that_would_keep_the_old_optimizer_is_refused(tmp_path):
    class After(torch.optim.lr_scheduler.LambdaLR):
        def __init__(self, optimizer):
            self.after = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            super().__init__(optimizer, lambda step: 1.0)

    class Scheduled(TinyModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [After(optimizer)]

    module = Scheduled()
    net = module.net
    with pytest.raises(MisconfigurationException, match="state of After holds a whole ExponentialLR"):
        make_trainer(tmp_path, callbacks=[Halve()], max_steps=8).fit(module, loader())
    assert module.net is net


def test_several_devices_are_refused():
    with pytest.raises(MisconfigurationException, match="resizable_ddp"):
        L.Trainer(strategy="resizable", accelerator="cpu", devices=2)


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}])
def test_options_of_the_wrapper_survive(tmp_path, options):
    wrappers = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            wrapper = trainer.strategy.model
            wrappers.append((wrapper.find_unused_parameters, wrapper.static_graph))

    module = TinyModule()
    trainer = make_trainer(tmp_path, callbacks=[Halve(), Look()], strategy=ResizableDDPStrategy(**options), max_steps=8)
    trainer.fit(module, loader())
    assert module.sizes[3] < module.sizes[2]
    assert wrappers == [(options.get("find_unused_parameters", False), options.get("static_graph", False))] * 8
    torch.distributed.destroy_process_group()


class Grouped(TinyModule):
    """Two parameter groups with all that a scheduler or a user may change in them while the run goes on."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.options = []

    def configure_optimizers(self):
        matrices = {"params": [each for each in self.parameters() if each.ndim > 1], "weight_decay": 0.1, "mine": 1}
        vectors = {"params": [each for each in self.parameters() if each.ndim < 2], "weight_decay": 0.0, "mine": 2}
        optimizer = self.optimizer([matrices, vectors], lr=self.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 2e-2], total_steps=9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer):
        groups = optimizer.param_groups
        self.options.append([{key: value for key, value in group.items() if key != "params"} for group in groups])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 2:
            for group in self.trainer.optimizers[0].param_groups:
                group["weight_decay"] += 0.5
                group["mine"] += 10


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)], ids=["adamw", "sgd"])
def test_options_of_parameter_groups_go_on(tmp_path, optimizer):
    plain, resized = Grouped(optimizer=optimizer), Grouped(optimizer=optimizer)
    for module, callbacks in ((plain, []), (resized, [Halve()])):
        make_trainer(tmp_path, callbacks=callbacks, max_steps=8).fit(module, loader())
    assert resized.sizes[3] < plain.sizes[3]
    assert resized.options == plain.options
    # The scheduler moves what is neither the learning rate nor constant.
    moving = "betas" if optimizer is torch.optim.AdamW else "momentum"
    assert len({groups[0][moving] for groups in plain.options}) == 8


class Scales(L.Callback):
    """The gradient scaler's factor, and the steps since it has changed, before each step."""

    def __init__(self):
        self.at = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        state = trainer.precision_plugin.scaler.state_dict()
        self.at.append((state["scale"], state["_growth_tracker"]))


@pytest.mark.parametrize("overflows", [False, True])
def test_the_gradient_scaler_goes_on(tmp_path, overflows):
    class Overflows(TinyModule):
        def on_after_backward(self):
            if overflows and self.trainer.global_step == 3:
                next(self.net.parameters()).grad[0, 0] = torch.inf

    before, after = Scales(), Scales()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))
    trainer = make_trainer(tmp_path, callbacks=[before, Halve(), after], plugins=[precision], max_steps=6)
    module = Overflows()
    trainer.fit(module, loader())
    assert module.sizes[3] < module.sizes[2]
    grown, last = 2.0**11, [(2.0**10, 0), (2.0**10, 1)] if overflows else [(2.0**12, 0), (2.0**12, 1)]
    assert before.at == after.at == [(2.0**10, 0), (2.0**10, 1), (grown, 0), (grown, 1), *last]


def test_global_randomness_is_untouched(tmp_path):
    """A resize draws nothing: the next dropout mask is the one that would have come anyway."""
    states = []

    class State(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            states.append(torch.get_rng_state())

    for callbacks in ([State()], [State(), Halve()]):
        L.seed_everything(1, verbose=False)
        make_trainer(tmp_path, callbacks=callbacks, max_steps=6).fit(TinyModule(), loader())
    half = len(states) // 2
    for plain, resized in zip(states[:half], states[half:], strict=True):
        assert torch.equal(plain, resized)


def test_a_transition_costs_little():
    """Ten million parameters: less than three optimizer steps, and less memory than weights and moments take."""
    for cost in measure(["reset", "project"], rounds=1):
        assert cost["num_parameters"] > 10_000_000
        assert max(cost["down_in_steps"], cost["up_in_steps"]) < 3
        assert max(cost["extra_bytes_down"], cost["extra_bytes_up"]) < cost["weights_and_moments_bytes"]
        assert cost["extra_bytes_up"] > 0
