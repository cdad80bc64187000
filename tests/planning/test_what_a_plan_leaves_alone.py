"""What a plan must not do, refuses like a fit, or says that it cannot do."""

from __future__ import annotations

import io

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
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
from lit_accel.anatomy import anatomy_of
from lit_accel.compute.plan import StepDecision, Workload, plan_run
from lit_accel.methods.coordinator import coordinator_of
from lit_accel.planning import PlanError, plan
from lit_accel.planning.calibration import calibrate
from lit_accel.planning.table import forecast_tables
from tests.planning.runs import Data, facts, on_meta, trained, trainer
from tests.training import TinyModule, Tokens


def cycle(**options):
    return MultiLevelTraining([Level()], [Phase(0, 4), Phase(1, 16), Phase(0)], **options)


class Alarm(L.Callback):
    def __init__(self):
        self.rang = False

    def on_exception(self, trainer, pl_module, exception):
        self.rang = True


def test_nobody_is_told_of_an_exception_and_nothing_is_saved(tmp_path):
    alarm = Alarm()

    def run(**options):
        callbacks = [OnExceptionCheckpoint(tmp_path / "saved"), alarm, cycle()]
        return trainer(tmp_path, callbacks, enable_checkpointing=True, **options)

    plan(run(), on_meta(), Data())
    assert not alarm.rang
    with pytest.raises(MisconfigurationException, match='strategy="resizable"'):
        plan(run(strategy="auto"), on_meta(), Data())
    assert not list(tmp_path.iterdir())


def test_a_module_stays_in_its_mode(tmp_path):
    module = TinyModule()
    module.net.eval()
    plan(trainer(tmp_path, []), module, Data())
    assert not any(part.training for part in module.net.modules())


class BringsCallbacks(TinyModule):
    def configure_callbacks(self):
        return [ModelCheckpoint(every_n_train_steps=1)]


def test_a_calibration_leaves_nothing_behind(tmp_path):
    method = SensitivityLayerDropping(kept=0.8, protected=0.0, min_keep=0.1, max_overhead=1.0)
    planned = plan(trainer(tmp_path, [method]), on_meta(), Data()).plan
    again = SensitivityLayerDropping(kept=0.8, protected=0.0, min_keep=0.1, max_overhead=1.0)
    calibrate(trainer(tmp_path, [again], enable_checkpointing=True), BringsCallbacks(), Data(), planned)
    assert not list(tmp_path.iterdir())


def test_short_phases_are_timed_too(tmp_path):
    def callbacks():
        return [MultiLevelTraining([Level()], [Phase(0, 3), Phase(1, 3), Phase(0)])]

    planned = plan(trainer(tmp_path, callbacks()), on_meta(), Data()).plan
    assert all(seconds > 0 for seconds in calibrate(trainer(tmp_path, callbacks()), TinyModule(), Data(), planned))


@pytest.mark.parametrize(
    ("callbacks", "change", "message"),
    [
        (lambda: [ProgressiveLayerDropping(), Composition(drop_levels=[3])], None, "drop_levels names level 3"),
        (lambda: [ProgressiveLayerDropping(), Composition(0.5, 0.6)], None, "dense_tail has begun"),
        (lambda: [ProgressiveLayerDropping()], lambda module: module.net.eval(), "evaluation mode"),
        (lambda: [cycle()], lambda module: setattr(module, "optimizer", torch.optim.Adagrad), "Adagrad"),
    ],
    ids=["levels", "dense", "mode", "optimizer"],
)
def test_what_is_checked_late_is_checked(tmp_path, callbacks, change, message):
    for call in (lambda t, m: plan(t, m, Data()), lambda t, m: t.fit(m, Data())):
        module = TinyModule()
        if change is not None:
            change(module)
        with pytest.raises(MisconfigurationException, match=message):
            call(trainer(tmp_path, callbacks()), module)


class Logs(TinyModule):
    """Logs before it trains, by hand, and needs no number of the batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        self.log("batch/tokens", float(batch["a"].numel()))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch["a"])
        self.manual_backward(loss)
        optimizer.step()
        return loss


class TwoLoaders(L.LightningDataModule):
    def train_dataloader(self):
        return {"a": Data().train_dataloader(), "b": Data().train_dataloader()}


def test_usual_training_steps_are_followed(tmp_path):
    forecast = plan(trainer(tmp_path, [ProgressiveLayerDropping()]), on_meta(Logs), TwoLoaders())
    counted = trained(tmp_path, [ProgressiveLayerDropping()], Logs(), TwoLoaders())
    assert facts(forecast.plan.phases) == facts(counted.list)


class Looks(TinyModule):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net(input_ids=batch[:, :2])
        return super().training_step(batch, batch_idx)


def test_a_call_that_is_not_trained_is_not_taken_for_the_step(tmp_path):
    with pytest.raises(PlanError, match="without gradients before it trains"):
        plan(trainer(tmp_path, []), on_meta(Looks), Data())


def test_epochs_of_several_processes_have_no_known_length(tmp_path):
    run = trainer(tmp_path, [], max_steps=-1, max_epochs=2)
    with pytest.raises(MisconfigurationException, match=r"4 processes.*max_steps"):
        plan(run, on_meta(), Data(), world_size=4)


@pytest.mark.parametrize("order", [1, -1])
def test_growth_is_planned_from_the_size_that_it_leads_to(tmp_path, order):
    def callbacks():
        levels = MultiLevelTraining([Level()], [Phase(1, 10), Phase(0)], start_level=1)
        return [SensitivityLayerDropping(kept=0.8, protected=0.0, min_keep=0.1), levels][::order]

    forecast = plan(trainer(tmp_path, callbacks(), max_steps=100), on_meta(), Data())
    counted = trained(tmp_path, callbacks(), max_steps=100).list
    assert [(p.steps, p.num_parameters) for p in forecast.plan.phases] == [(p.steps, p.num_parameters) for p in counted]


def test_levels_that_are_not_visited_are_not_checked(tmp_path):
    deep = MultiLevelTraining([Level(depth=4)], [Phase(0)])
    run = trainer(tmp_path, [deep, ProgressiveLayerDropping()])
    run.fit(TinyModule(), Data())
    assert run.global_step == run.max_steps


STAGES = [(0.0, 0.0), (0.6, 0.5), (0.9, 0.0)]


def window(phase):
    pattern = {"attention_pattern": "window", "attention_window": 4, "attention_phase": phase}
    return MixedSparsityTraining(STAGES, quantum=4, **pattern)


def tokens():
    return RandomLTD(start_tokens=0.5, quantum=2, pinned=[0], growth=0.3)


@pytest.mark.parametrize(
    ("callbacks", "phase"),
    [
        (lambda: [Composition(schedules="level")], (0.5, 0.9)),
        # While the model is small, at which no token is dropped.
        (lambda: [cycle(), Composition(drop_levels=[0], least_cost=0)], (4, 12)),
    ],
    ids=["no levels", "small level"],
)
def test_a_pattern_where_no_token_is_dropped(tmp_path, callbacks, phase):
    run = trainer(tmp_path, [window(phase), tokens(), *callbacks()])
    run.fit(TinyModule(), Data())
    assert run.global_step == run.max_steps


def test_a_pattern_where_tokens_were_dropped_in_a_longer_run(tmp_path):
    callbacks = [window((0.5, 0.9)), tokens()]
    for steps in (100, 40):
        run = trainer(tmp_path, callbacks, max_steps=steps)
        run.fit(TinyModule(), Data())
        assert run.global_step == steps


def test_long_runs_are_sampled_at_no_fixed_place(tmp_path):
    """Units that are chosen anew every 100 steps are seen in one of 100 steps, however far apart samples are."""
    anatomy = anatomy_of(TinyModule().net)
    cheap, dear = StepDecision(keep=(1.0, 0.0, 0.0, 1.0)), StepDecision()

    def decide(step):
        return dear if step % 100 == 0 else cheap

    exact = plan_run(decide, 200_000, [anatomy], Workload(2, 8))
    for stride in (10, 50, 100, 250):
        sampled = plan_run(decide, 200_000, [anatomy], Workload(2, 8), stride=stride)
        assert sampled.num_steps == 200_000
        assert sampled.flops == pytest.approx(exact.flops, rel=0.02)


@pytest.mark.parametrize("stride", [3, 7, 64, 99, 1000])
def test_the_last_sample_stands_for_the_steps_that_are_left(stride):
    """Hundred steps are no multiple of most strides, and fewer than some."""
    anatomy = anatomy_of(TinyModule().net)
    anatomies, work = [anatomy, anatomy.at(anatomy.reduced(2, 2))], Workload(2, 8, num_micro_batches=3)
    for level in (0, 1):
        exact, sampled = (
            plan_run(lambda _, level=level: StepDecision(level), 100, anatomies, work, stride=each)
            for each in (1, stride)
        )
        assert facts(sampled.phases) == facts(exact.phases)
        assert (sampled.flops, sampled.dense_flops) == (exact.flops, exact.dense_flops)


def test_data_that_do_not_say_their_batch_size(tmp_path):
    class Unsaid(Data):
        batch_size = None
        block_size = 12

    run = trainer(tmp_path, [ProgressiveLayerDropping(), RandomLTD(start_tokens=0.5, quantum=2, pinned=[0])])
    run.fit(TinyModule(), Unsaid())
    assert coordinator_of(run).methods


@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_and_frozen_parameters(tmp_path, amsgrad):
    class Half(TinyModule):
        def __init__(self):
            super().__init__()
            for block in self.net.transformer.h[:2]:
                block.requires_grad_(False)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], amsgrad=amsgrad)
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    module = Half()
    memory = plan(trainer(tmp_path, []), module, Data()).memory[0]
    num_trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert memory.gradients == 4 * num_trained
    assert memory.optimizer == (3 if amsgrad else 2) * 4 * num_trained


@pytest.mark.parametrize(("momentum", "moments"), [(0.0, 0), (0.9, 1)])
def test_memory_of_what_lies_beside_the_transformer(tmp_path, momentum, moments):
    class Beside(TinyModule):
        def __init__(self):
            super().__init__()
            self.teacher = torch.nn.Linear(64, 64).requires_grad_(False)
            self.extra = torch.nn.Linear(32, 32)

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=momentum)

    module = Beside()
    memory = plan(trainer(tmp_path, []), module, Data()).memory[0]
    num_trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert memory.weights == 4 * sum(p.numel() for p in module.parameters())
    assert memory.gradients == 4 * num_trained
    assert memory.optimizer == 4 * moments * num_trained


def test_memory_that_is_not_known_is_not_left_out_in_silence(tmp_path):
    class Own(torch.optim.SGD):
        pass

    class Odd(TinyModule):
        def configure_optimizers(self):
            return Own(self.parameters(), lr=0.1)

    forecast = plan(trainer(tmp_path, []), Odd(), Data())
    assert forecast.memory[0].optimizer is None
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(forecast_tables(forecast))
    printed = " ".join(console.export_text().split())
    assert "≥ 0.0" in printed
    assert "without what the optimizer keeps" in printed


def test_the_index_of_a_batch_may_be_called_anything(tmp_path):
    class Unnamed(TinyModule):
        def training_step(self, batch, _):
            return super().training_step(batch, _)

    assert plan(trainer(tmp_path, []), on_meta(Unnamed), Data()).plan.flops > 0


def test_a_smaller_last_batch_is_said(tmp_path):
    class Uneven(Data):
        def train_dataloader(self):
            return DataLoader(Tokens(num_samples=20), batch_size=8)

    (said,) = plan(trainer(tmp_path, []), on_meta(), Uneven()).warnings
    assert "the last batch of an epoch has 4 samples instead of 8" in said
