"""Strategies that hide the model's parameters are refused at setup, and not by what anatomies say of the remains."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as L
import pytest
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import (
    ComputeLedger,
    MixedSparsityTraining,
    MultiLevelTraining,
    ProgressiveLayerDropping,
    RandomLTD,
    SensitivityLayerDropping,
)
from lit_accel.flat_parameters import refuse_flat_parameters
from lit_accel.methods.strategy_checks import check_strategy
from tests.training import TinyModule, make_trainer

LTD = {"start_tokens": 4, "growth": 6, "quantum": 2}


class BuiltLater(L.LightningModule):
    """What it would build under the strategy, nobody could make anything of."""

    def configure_model(self):
        pytest.fail("The model was built.")


def made(kind, stage=None):
    """Not initialised: they want a GPU or a package."""
    strategy = object.__new__(kind)
    if kind is DeepSpeedStrategy:
        strategy.config = {} if stage is None else {"zero_optimization": {"stage": stage}}
    return strategy


def set_up(folder, callback, strategy, module):
    trainer = make_trainer(folder, callbacks=[callback], strategy="auto", max_steps=100, max_epochs=-1)
    trainer.strategy.connect(module)
    strategy._lightning_module = module
    trainer._accelerator_connector.strategy = strategy
    callback.setup(trainer, module, "fit")


@pytest.mark.parametrize("module", [TinyModule, BuiltLater])
@pytest.mark.parametrize(
    ("strategy", "named"),
    [
        (made(FSDPStrategy), r"FSDPStrategy \(FSDP1\)"),
        (made(DeepSpeedStrategy, 3), "DeepSpeedStrategy with ZeRO stage 3"),
    ],
    ids=["fsdp1", "zero3"],
)
@pytest.mark.parametrize("callback", [lambda: RandomLTD(**LTD), ComputeLedger], ids=["random-ltd", "ledger"])
def test_they_are_refused_before_the_model_is_built(tmp_path, callback, strategy, named, module):
    message = rf"(RandomLTD|ComputeLedger) knows .* {named} .*ModelParallelStrategy.*\"resizable_model_parallel\""
    with pytest.raises(MisconfigurationException, match=message):
        set_up(tmp_path, callback(), strategy, module())


@pytest.mark.parametrize("strategy", [made(FSDPStrategy), made(DeepSpeedStrategy, 3)], ids=["fsdp1", "zero3"])
@pytest.mark.parametrize(
    ("method", "instead"),
    [
        (MultiLevelTraining, 'strategy="resizable_model_parallel"'),
        (ProgressiveLayerDropping, 'strategy="resizable_model_parallel"'),
        (SensitivityLayerDropping, 'strategy="resizable_model_parallel"'),
        (MixedSparsityTraining, 'strategy="ddp"'),
    ],
)
def test_methods_with_needs_of_their_own_say_what_to_use(tmp_path, method, instead, strategy):
    with pytest.raises(MisconfigurationException, match=type(strategy).__name__) as refusal:
        set_up(tmp_path, method(), strategy, BuiltLater())
    refusal.match(instead)


def test_a_method_that_does_nothing_looks_at_no_parameter(tmp_path):
    set_up(tmp_path, RandomLTD(start_tokens=1.0), made(FSDPStrategy), TinyModule())


@pytest.mark.parametrize(
    "strategy",
    [
        *(made(DeepSpeedStrategy, stage) for stage in (None, 0, 1, 2)),
        made(ModelParallelStrategy),
        made(DDPStrategy),
    ],
)
def test_whole_parameters_and_those_of_fsdp2_are_not_refused(strategy):
    refuse_flat_parameters(strategy, "ComputeLedger")
    check_strategy(SimpleNamespace(strategy=strategy), RandomLTD(**LTD))
