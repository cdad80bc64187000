"""What is planned is what the ledger counts afterwards; and what a fit refuses is refused."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lit_accel import (
    Composition,
    Level,
    MixedSparsityTraining,
    MultiLevelTraining,
    Phase,
    ProgressiveLayerDropping,
    RandomLTD,
    SensitivityLayerDropping,
)
from lit_accel.planning import PlanError, plan
from tests.planning.runs import Data, facts, on_meta, trained, trainer
from tests.training import TinyModule, Tokens

LTD = {"start_tokens": 0.5, "quantum": 2, "pinned": [0], "growth": 30}
STAGES = [(0, 0.0), (4, 0.5), (20, 0.25), (32, 0.0)]


def cycle(**options):
    return MultiLevelTraining([Level(**options)], [Phase(0, 4), Phase(1, 16), Phase(0)])


RUNS = {
    "dense": list,
    "V-cycle": lambda: [cycle()],
    "PLD": lambda: [ProgressiveLayerDropping()],
    "PLD by chance": lambda: [ProgressiveLayerDropping(sampler="bernoulli", theta=0.3)],
    "random-LTD": lambda: [RandomLTD(**LTD)],
    "MST": lambda: [MixedSparsityTraining(STAGES, update_every=3, quantum=4)],
    "MST of entries": lambda: [
        MixedSparsityTraining(STAGES, update_every=3, ffn_units="element", attention_units="element")
    ],
    "three": lambda: [RandomLTD(**LTD), ProgressiveLayerDropping(), cycle()],
    "three by rules": lambda: [
        RandomLTD(**LTD),
        ProgressiveLayerDropping(),
        cycle(),
        Composition(dense_warmup=2, dense_tail=0.2, drop_levels=[0]),
    ],
    "units, layers, tokens": lambda: [
        RandomLTD(**LTD),
        ProgressiveLayerDropping(),
        MixedSparsityTraining(STAGES, update_every=3, quantum=4),
        Composition(least_cost=0),
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_planned_is_what_is_counted(tmp_path, name):
    """Every phase, to the last FLOP; blocks that a seed drops by chance are the same ones."""
    forecast = plan(trainer(tmp_path, RUNS[name]()), on_meta(), Data())
    counted = trained(tmp_path, RUNS[name]())
    assert facts(forecast.plan.phases) == facts(counted.list)
    assert forecast.plan.share == counted.total.flops / counted.total.dense_flops
    assert not forecast.is_expectation


@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 4}, {"max_steps": -1, "max_epochs": 2}, {"precision": "bf16-mixed"}],
    ids=lambda options: next(iter(options)),
)
def test_accumulated_over_epochs_and_in_half_precision(tmp_path, options):
    def callbacks():
        return [cycle(merge_batches=2 if "accumulate_grad_batches" in options else 1), RandomLTD(**LTD)]

    forecast = plan(trainer(tmp_path, callbacks(), **options), on_meta(), Data())
    assert facts(forecast.plan.phases) == facts(trained(tmp_path, callbacks(), **options).list)


def test_an_expectation_where_blocks_are_measured(tmp_path):
    def callbacks():
        return [SensitivityLayerDropping(kept=0.8, protected=0.0, min_keep=0.1)]

    forecast = plan(trainer(tmp_path, callbacks(), max_steps=400), on_meta(), Data())
    counted = trained(tmp_path, callbacks(), max_steps=400).total
    assert forecast.is_expectation
    assert forecast.plan.flops == pytest.approx(counted.flops, rel=0.03)
    assert forecast.plan.dense_flops == counted.dense_flops


def test_several_processes_are_planned_as_one(tmp_path):
    alone = plan(trainer(tmp_path, RUNS["three"]()), on_meta(), Data())
    eight = plan(trainer(tmp_path, RUNS["three"]()), on_meta(), Data(), world_size=8)
    assert (eight.plan.flops, eight.plan.share) == (8 * alone.plan.flops, alone.plan.share)


def test_each_method_alone(tmp_path):
    together = plan(trainer(tmp_path, RUNS["three"]()), on_meta(), Data())
    for callbacks in ([RandomLTD(**LTD)], [ProgressiveLayerDropping()], [cycle()]):
        alone = plan(trainer(tmp_path, callbacks), on_meta(), Data())
        assert together.alone[type(callbacks[0]).__name__].flops == alone.plan.flops
    assert list(together.alone) == ["MultiLevelTraining", "ProgressiveLayerDropping", "RandomLTD"]


class BringsItAll(TinyModule):
    """Builds its model and its data by itself, as late as Lightning allows."""

    def __init__(self):
        L.LightningModule.__init__(self)
        self.losses, self.rates, self.sizes = [], [], []
        self.optimizer, self.scheduler, self.lr = torch.optim.AdamW, None, 1e-2

    def setup(self, stage):
        self.tokens = Tokens()

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = TinyModule().net

    def train_dataloader(self):
        return DataLoader(self.tokens, batch_size=8)


def test_a_module_that_makes_model_and_data_late(tmp_path):
    module = BringsItAll()
    forecast = plan(trainer(tmp_path, RUNS["three"](), max_steps=-1, max_epochs=2), module)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    counted = trained(tmp_path, RUNS["three"](), BringsItAll(), max_steps=-1, max_epochs=2, data=NoData())
    assert facts(forecast.plan.phases) == facts(counted.list)


class NoData(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Tokens(), batch_size=8)


def test_a_module_with_weights_keeps_them(tmp_path):
    module = TinyModule()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    plan(trainer(tmp_path, RUNS["three"]()), module, Data())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        (list, {"max_steps": -1, "max_epochs": -1}, "how long the run is"),
        (lambda: [cycle()], {"strategy": "auto"}, 'strategy="resizable"'),
        (lambda: [ProgressiveLayerDropping(), SensitivityLayerDropping()], {}, "would both drop layers"),
        (lambda: [RandomLTD(**LTD), ProgressiveLayerDropping(), Composition(least_cost=0.9)], {}, "least_cost=0.9"),
        (lambda: [cycle(), Composition(dense_tail=0.9)], {}, "dense_tail wants the whole model"),
    ],
    ids=["length", "strategy", "pair", "cost", "tail"],
)
def test_what_a_fit_refuses_is_refused(tmp_path, callbacks, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        plan(trainer(tmp_path, callbacks(), **options), on_meta(), Data())


def test_warnings_are_part_of_it(tmp_path):
    callbacks = [MixedSparsityTraining(STAGES, update_every=3, quantum=4), ProgressiveLayerDropping(theta=0.9)]
    warnings = plan(trainer(tmp_path, callbacks), on_meta(), Data()).warnings
    assert any("updated less often" in warning for warning in warnings)


class Secretive(TinyModule):
    def training_step(self, batch, batch_idx):
        if batch.sum().item() > 0:
            return super().training_step(batch, batch_idx)
        return None


def test_a_step_that_looks_at_values_wants_to_be_told(tmp_path):
    with pytest.raises(PlanError, match="--num_sequences and --num_tokens"):
        plan(trainer(tmp_path, []), on_meta(Secretive), Data())
    told = plan(trainer(tmp_path, []), on_meta(Secretive), Data(), num_sequences=8, num_tokens=12)
    assert facts(told.plan.phases) == facts(trained(tmp_path, [], Secretive()).list)
    assert told.memory[0].activations is None


class PartsOnly(TinyModule):
    def training_step(self, batch, batch_idx):
        return self.net.transformer.wte.weight.mean()


def test_a_step_that_calls_parts_only_cannot_be_counted(tmp_path):
    with pytest.raises(PlanError, match="does not call its transformer"):
        plan(trainer(tmp_path, []), on_meta(PartsOnly), Data())
