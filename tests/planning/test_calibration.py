"""Seconds are predicted from steps that are really trained, at places all over the run."""

from __future__ import annotations

import itertools
import random
import statistics
import time

import lightning.pytorch as L
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import Level, MixedSparsityTraining, MultiLevelTraining, Phase, ProgressiveLayerDropping, RandomLTD
from lit_accel.anatomy import anatomy_of
from lit_accel.compute.plan import StepDecision, Workload, plan_run
from lit_accel.planning import plan
from lit_accel.planning.calibration import NUM_TIMED, _line, _places, calibrate
from tests.planning.runs import Data, on_meta, trainer
from tests.training import TinyModule

LTD = {"start_tokens": 0.5, "quantum": 2, "pinned": [0], "growth": 150}
NUM_STEPS = 200


def cycle():
    return MultiLevelTraining([Level()], [Phase(0, 20), Phase(1, 80), Phase(0)])


class Sleepy(TinyModule):
    """Takes a known time: so much for each parameter of the model, and nothing else that counts."""

    SECONDS = 5e-6

    def training_step(self, batch, batch_idx):
        num = sum(parameter.numel() for parameter in self.net.parameters())
        time.sleep(num * self.SECONDS)
        return super().training_step(batch, batch_idx)


def forecast(tmp_path, callbacks, **options):
    return plan(trainer(tmp_path, callbacks, max_steps=NUM_STEPS, **options), on_meta(), Data()).plan


def test_a_known_time_is_found(tmp_path):
    """Of each phase of a V-cycle, in which the model really is another one."""
    planned = forecast(tmp_path, [cycle()])
    seconds = calibrate(trainer(tmp_path, [cycle()], max_steps=NUM_STEPS), Sleepy(), Data(), planned)
    known = [phase.steps * phase.num_parameters * Sleepy.SECONDS for phase in planned.phases]
    assert len(seconds) == 3
    for predicted, least in zip(seconds, known, strict=True):
        # What the tiny model itself takes comes on top.
        assert least < predicted < least + 0.05 * planned.num_steps


class Watch(L.Callback):
    def __init__(self):
        self.steps, self.levels = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append(trainer.global_step)
        self.levels.append(len(pl_module.net.transformer.h))


class Watched(Sleepy):
    SECONDS = 0.0

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, len(anatomy_of(self.net).blocks)))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_steps_are_trained_in_each_phase_at_its_size(tmp_path, accumulated):
    callbacks = [cycle(), RandomLTD(**LTD, num_tokens=12), ProgressiveLayerDropping()]
    callbacks[1].pinned = []
    planned = forecast(tmp_path, callbacks, accumulate_grad_batches=accumulated)
    module = Watched()
    again = [cycle(), RandomLTD(**LTD, num_tokens=12), ProgressiveLayerDropping()]
    again[1].pinned = []
    run = trainer(tmp_path, again, max_steps=NUM_STEPS, accumulate_grad_batches=accumulated)
    seconds = calibrate(run, module, Data(), planned)
    assert all(second > 0 for second in seconds)
    for step, num_blocks in module.seen:
        assert num_blocks == (2 if 20 <= step < 100 else 4)
    # Far fewer steps than the run has, and some of each phase.
    assert len({step for step, _ in module.seen}) < NUM_STEPS / 2
    for phase in planned.phases:
        assert sum(phase.start <= step < phase.start + phase.steps for step, _ in set(module.seen)) >= NUM_TIMED
    assert not list(tmp_path.iterdir())


def test_in_every_stage_of_sparsity(tmp_path):
    stages = [(0, 0.0), (20, 0.5), (120, 0.25), (180, 0.0)]
    callback = MixedSparsityTraining(stages, update_every=10, quantum=4)
    planned = forecast(tmp_path, [callback])
    again = MixedSparsityTraining(stages, update_every=10, quantum=4)
    module = Watched()
    seconds = calibrate(trainer(tmp_path, [again], max_steps=NUM_STEPS), module, Data(), planned)
    assert len(seconds) == 4
    assert all(second > 0 for second in seconds)


def test_manual_optimization_is_refused(tmp_path):
    module = TinyModule()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="Leave calibrate out"):
        calibrate(trainer(tmp_path, []), module, Data(), forecast(tmp_path, []))


@given(
    st.lists(st.tuples(st.floats(1, 1e3), st.floats(1e-3, 1.0)), min_size=1, max_size=9),
)
def test_a_line_never_falls_and_goes_through_the_mean(points):
    slope, base = _line(points)
    assert slope >= 0
    assert base >= -1e-9
    mean_cost = sum(cost for cost, _ in points) / len(points)
    assert base + slope * mean_cost == pytest.approx(sum(second for _, second in points) / len(points))


@given(st.floats(1e-3, 1.0), st.floats(0.0, 1.0), st.lists(st.integers(100, 1000), min_size=2, max_size=9, unique=True))
def test_a_line_is_found(slope, base, costs):
    found = _line([(cost, base + slope * cost) for cost in costs])
    spread = sum((cost - sum(costs) / len(costs)) ** 2 for cost in costs) / len(costs)
    if spread > (0.02 * sum(costs) / len(costs)) ** 2:
        assert found == pytest.approx((slope, base), abs=1e-6 * (1 + max(costs)))


@pytest.fixture(scope="module")
def anatomies():
    full = anatomy_of(TinyModule().net)
    return [full, full.at(full.reduced(2, 2)), full.at(full.reduced(1, 2))]


@given(
    num_steps=st.integers(1, 300),
    levels=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    length=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=50)
def test_places_lie_in_every_phase(anatomies, num_steps, levels, length, seed):
    """At its start and its last steps, and where it costs least and most, with a view to all that is trained there."""
    costs = random.Random(seed)

    def decide(step):
        level = levels[step * len(levels) // num_steps]
        return StepDecision(level, tuple(costs.random() for _ in anatomies[level].blocks))

    planned = plan_run(decide, num_steps, anatomies, Workload(2, 4))
    assert [phase.level for phase in planned.phases] == [
        level for level, _ in itertools.groupby(levels[step * len(levels) // num_steps] for step in range(num_steps))
    ]
    places = _places(planned, length)
    assert places == sorted(set(places))
    for phase in planned.phases:
        end = phase.start + phase.steps
        inside = [place for place in places if phase.start <= place < end]
        last = max(phase.start, end - length)
        assert {phase.start, last} <= set(inside)
        assert len(inside) <= 4
        mean = {
            step: statistics.fmean(planned.step_flops[step : min(step + length, end)])
            for step in range(phase.start, end)
        }
        # Of a longer phase some of the steps are looked at, evenly.
        looked_at = [mean[step] for step in range(phase.start, last + 1, max(1, (last - phase.start) // 50))]
        assert min(mean[place] for place in inside) <= min(looked_at)
        assert max(mean[place] for place in inside) >= max(looked_at)
