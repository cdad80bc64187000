"""Schedules that each level runs through by itself, as if its steps were the whole run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_accel import Composition, Level, MultiLevelTraining, Phase, ProgressiveLayerDropping, RandomLTD
from lit_accel.anatomy import anatomy_of
from lit_accel.methods.coordinator import coordinator_of
from lit_accel.methods.multilevel.phases import ResolvedPhase
from tests.composition.runs import Saves, counted, run, workload_for

PHASES = [Phase(0, 4), Phase(1, 6), Phase(0)]


def methods():
    tokens = RandomLTD(start_tokens=0.5, quantum=1, growth=0.5)
    return [MultiLevelTraining([Level()], PHASES), ProgressiveLayerDropping(theta=0.5, gamma_factor=5), tokens]


def by_level():
    return Composition(schedules="level", least_cost=0)


def test_each_level_begins_at_the_start_and_goes_on_where_it_was(tmp_path):
    made = run(tmp_path, methods(), strategy="resizable", callbacks=[by_level()])
    trainer = made.module.kept_trainer
    coordinator = coordinator_of(trainer)
    num_steps = trainer.global_step
    steps = [coordinator.schedule_step(step) for step in range(num_steps)]
    small, full = steps[4:10], steps[:4] + steps[10:]
    for of_level in (small, full):
        assert of_level == [index * num_steps // len(of_level) for index in range(len(of_level))]


def test_it_trains_is_counted_and_resumes_bitwise(tmp_path):
    saves = Saves(tmp_path, [3, 6, 12])
    made = run(tmp_path, methods(), strategy="resizable", callbacks=[saves, by_level()])
    other = run(tmp_path / "run", methods(), strategy="resizable", callbacks=[Composition(least_cost=0)])
    assert made.module.seen != other.module.seen
    for step in saves.steps:
        path = saves.path(step)
        again = run(tmp_path / "again", methods(), strategy="resizable", callbacks=[by_level()], resume=path)
        for name, value in made.module.state_dict().items():
            assert torch.equal(again.module.state_dict()[name], value), (step, name)
        assert counted(again.ledger.phases.list) == counted(made.ledger.phases.list)
    full = anatomy_of(made.module.net)
    plan = coordinator_of(made.module.kept_trainer).plan(full, workload_for(made.module))
    assert counted(plan.phases) == counted(made.ledger.phases.list)


def test_without_levels_they_are_those_of_the_run(tmp_path):
    alone = [ProgressiveLayerDropping(theta=0.5, gamma_factor=5)]
    made = run(tmp_path, alone, callbacks=[by_level()])
    plain = run(tmp_path / "plain", [ProgressiveLayerDropping(theta=0.5, gamma_factor=5)])
    assert made.module.seen == plain.module.seen


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30)), min_size=1, max_size=6))
def test_the_clock_of_a_level_never_runs_back_and_never_out(phases):
    levels = MultiLevelTraining([Level(), Level()])
    levels.schedule = levels_schedule(phases)
    num_steps = levels.schedule[-1].end
    last = {}
    for step in range(num_steps):
        level = levels.level_at(step)
        done, of_level, of_run = levels.steps_at_level(step)
        assert of_run == num_steps
        assert done == last.get(level, -1) + 1
        assert 0 <= done < of_level
        last[level] = done
    assert all(last[level] + 1 == levels.steps_at_level(step)[1] for step, level in at_each_level(levels, num_steps))


def levels_schedule(phases):
    start, made = 0, []
    for level, length in phases:
        made.append(ResolvedPhase(level, start, start + length, 1.0))
        start += length
    return tuple(made)


def at_each_level(levels, num_steps):
    return [(step, levels.level_at(step)) for step in range(num_steps)]


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="schedules is 'phase'; allowed are 'run', 'level'"):
        Composition(schedules="phase")
