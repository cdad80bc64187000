"""What is known of blocks follows them through changes of size, and is measured anew where the model is another one."""

from __future__ import annotations

import statistics

import lightning.pytorch as L
import pytest
import torch

from lit_accel import Composition, Level, MultiLevelTraining, Phase
from lit_accel.methods.compatibility import MST, SBLD
from lit_accel.methods.layer_dropping.history import History
from tests.composition.runs import METHODS, Host, Saves, assert_same, run
from tests.methods.mixed_sparsity import assert_equal


def sensitivity(**given):
    """Measured at the end of step 2, and then only where the model is another one."""
    options = {"measure_every": 18, "ema": 0.5, "kept": 0.85, "warmup": 1, "num_batches": 2, **given}
    return METHODS[SBLD](**options)


class Look(L.Callback):
    """Notes sensitivities before and after a change of size. Stands left and right of the methods."""

    def __init__(self, of, noted, when):
        self.of, self.noted, self.when = of, noted, when

    def on_train_batch_start(self, trainer, *_):
        values = self.of.sensitivities
        self.noted[trainer.global_step, self.when] = None if values is None else list(values)


def averaged(values, groups):
    """Averages of groups; blocks that cannot be dropped have nothing to average."""
    return [statistics.fmean(values[index] for index in group) for group in groups]


SOURCES = {
    "adjacent": [(0, 1), (2, 3), (4, 5)],
    "stack": [(0, 3), (1, 4), (2, 5)],
}
# A measurement takes two batches: the size changes again before it is complete.
SHORT = [Phase(0, 4), Phase(1, 1), Phase(0, 1), Phase(1, 4), Phase(0)]


def followed(folder, grouping, name="gpt2-tied", level=None, **given):
    method, noted = sensitivity(**given), {}
    levels = MultiLevelTraining([level or Level()], SHORT, depth_grouping=grouping, optimizer_state="reset")
    # Methods take the places of methods: these look before and after all of them.
    made = run(
        folder,
        [Look(method, noted, "before"), levels, method, Look(method, noted, "after")],
        name,
        strategy="resizable",
        max_steps=12,
    )
    return made, method, noted


@pytest.mark.parametrize("grouping", sorted(SOURCES))
def test_averaged_down_and_copied_up(tmp_path, grouping):
    made, method, noted = followed(tmp_path, grouping)
    groups = SOURCES[grouping]
    values = noted[4, "before"]
    assert len(set(values)) == 6
    assert noted[4, "after"] == averaged(values, groups)
    # Where it grows again before it was measured, each has what the block had that it came from.
    small, large = noted[4, "after"], noted[5, "after"]
    assert noted[5, "before"] == small
    assert large == [small[next(i for i, group in enumerate(groups) if block in group)] for block in range(6)]
    assert noted[6, "after"] == pytest.approx(small)
    # Then there is time.
    assert len(noted[8, "before"]) == 3
    assert noted[8, "before"] != noted[7, "before"]
    assert next(step for step in method.history.measured_at if step >= 4) == 7
    assert {len(values) for values in method.history.sensitivities} == {6}
    assert {len(values) for values in method.history.keep_probabilities} == {6}


def test_stages_of_a_swin_follow_by_themselves(tmp_path):
    """Two blocks of the first stage are never measured; of eight in the second, pairs of their own kind merge."""
    made, method, noted = followed(tmp_path, "adjacent", "swin", Level(depth=[1, 2]), kept=0.9)
    values, small, large = noted[4, "before"], noted[4, "after"], noted[5, "after"]
    groups = [(2, 4), (3, 5), (6, 8), (7, 9)]
    assert values[:2] == small[:2] == large[:2] == [0.0, 0.0]
    assert len(set(values[2:])) == 8
    assert small[2:] == averaged(values, groups)
    assert large[2:] == [small[2 + next(i for i, group in enumerate(groups) if b in group)] for b in range(2, 10)]


def test_measured_anew_after_each_change_of_size_and_of_sparsity(tmp_path):
    levels = MultiLevelTraining([Level()], [Phase(0, 5), Phase(1, 5), Phase(0)])
    method = sensitivity()
    run(tmp_path, [levels, method], strategy="resizable")
    # Two batches from 1, 5 and 10 on.
    assert method.history.measured_at == [2, 6, 11]
    method, units = sensitivity(), METHODS[MST](stages=[(0, 0.0), (4, 0.25), (9, 0.5), (13, 0.0)])
    run(tmp_path, [units, method])
    # Of units: from 4, 9 and 13 on, where they change before the forward pass, since none is chosen by gradient.
    assert method.history.measured_at == [2, 5, 10, 14]
    alone = sensitivity()
    run(tmp_path, [alone])
    assert alone.history.measured_at == [2]


def test_not_if_that_cannot_be_paid_for(tmp_path):
    levels = MultiLevelTraining([Level()], [Phase(0, 5), Phase(1, 5), Phase(0)])
    method = sensitivity(max_overhead=0.12, num_batches=1)
    made = run(tmp_path, [levels, method], strategy="resizable")
    assert 1 <= len(method.history.measured_at) < 3
    total = made.ledger.phases.total
    assert total.flops < total.dense_flops


@pytest.mark.parametrize("estimator", ["ablate", "taylor"])
def test_resumed_within_the_small_phase(tmp_path, estimator):
    """Between the two batches of a measurement, and after it."""

    def methods():
        levels = MultiLevelTraining([Level(), Level(width=1, depth=3)], [Phase(0, 4), Phase(1, 6), Phase(0)])
        return [levels, sensitivity(estimator=estimator, measure_every=3)]

    saves = Saves(tmp_path, [5, 10])
    made = run(tmp_path, methods(), strategy="resizable", callbacks=[saves, Composition(drop_levels=[0, 1])])
    for step in saves.steps:
        again = run(
            tmp_path / "again",
            methods(),
            module=Host(seed=1),
            strategy="resizable",
            callbacks=[Composition(drop_levels=[0, 1])],
            resume=saves.path(step),
        )
        assert again.module.seen == made.module.seen[step:]
        assert_equal(again.module, made.module)
        assert_same(again.methods[1].state_dict(), made.methods[1].state_dict())
        assert again.ledger.phases.total.flops == made.ledger.phases.total.flops


def test_they_outlive_a_level_at_which_nothing_is_dropped(tmp_path, pictures_are_drawn):
    """12, 6 and 3 blocks: nothing is dropped or measured at the level between; the picture is of the full model."""
    noted = {}

    def callbacks(noted):
        method = sensitivity()
        levels = MultiLevelTraining(
            [Level(), Level()],
            [Phase(0, 4), Phase(1, 3), Phase(2, 2), Phase(1, 2), Phase(0)],
            optimizer_state="reset",
        )
        looks = [Look(method, noted, "before"), Look(method, noted, "after")]
        return [levels, method], [looks[0], levels, method, looks[1], Composition(drop_levels=[0, 2])]

    (_, method), given = callbacks(noted)
    saves = Saves(tmp_path, [5, 8])
    made = run(tmp_path, given, module=Host(blocks=12), strategy="resizable", callbacks=[saves])
    assert [len(keep) for keep in made.ran.keep.values()] == [12] * 4 + [6] * 3 + [3] * 2 + [6] * 2 + [12] * 7
    for step, keep in made.ran.keep.items():
        assert len(keep) != 6 or all(keep), step
    # Carried over to the level below the one that was left out.
    full = noted[4, "before"]
    assert noted[6, "after"] == full
    expected = averaged(averaged(full, [(2 * i, 2 * i + 1) for i in range(6)]), [(0, 1), (2, 3), (4, 5)])
    assert noted[7, "after"] == pytest.approx(expected)
    assert len(noted[13, "after"]) == 12
    assert {len(values) for values in method.history.sensitivities} == {12}
    assert {len(values) for values in method.history.keep_probabilities} == {12}
    assert not any(4 < step < 7 or 9 <= step < 11 for step in method.history.measured_at)
    picture = tmp_path / "sensitivities.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for step in saves.steps:
        (_, resumed), given = callbacks({})
        module = Host(blocks=12, seed=1)
        again = run(tmp_path / "again", given, module=module, strategy="resizable", resume=saves.path(step))
        assert again.module.seen == made.module.seen[step:]
        assert_equal(again.module, made.module)
        assert_same(resumed.state_dict(), method.state_dict())


@pytest.mark.parametrize("rules", [{}, {"drop_levels": [0]}])
def test_the_picture_of_a_run_that_was_stopped_when_small_is_of_the_full_model(tmp_path, monkeypatch, rules):
    class StopWhenSmall(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 7

    drawn = []
    monkeypatch.setattr(History, "draw", lambda self, path, units, num_steps: drawn.append((self, list(units))))
    levels = MultiLevelTraining([Level()], [Phase(0, 4), Phase(1, 6), Phase(0)])
    callbacks = [levels, sensitivity(), Composition(**rules), StopWhenSmall()]
    made = run(tmp_path, callbacks, strategy="resizable")
    assert len(made.ran.keep[6]) == 3
    ((history, units),) = drawn
    assert {len(values) for values in history.sensitivities} == {6}
    assert units == [0, 1, 2, 3, 4, 5]


def test_measurements_see_the_model_of_the_step(tmp_path):
    """In the first step after a change the model that is measured is the one that is trained."""
    levels = MultiLevelTraining([Level()], [Phase(0, 5), Phase(1, 5), Phase(0)])
    units = METHODS[MST](stages=[(0, 0.0), (13, 0.5), (16, 0.0)])
    made = run(tmp_path, [sensitivity(), units, levels], strategy="resizable")
    calls = {call["step"]: call for call in made.ran.calls}
    assert {step for step, *_ in made.module.probes} == {1, 2, 5, 6, 10, 11, 13, 14}
    for step, anatomy, active in made.module.probes:
        assert anatomy.size == calls[step]["anatomy"].size
        assert active == calls[step]["active"]


def test_sensitivities_are_those_of_plain_ablation(tmp_path):
    """Also in a small phase: the loss without a block, minus the loss with it, on the batch of the step."""
    method = sensitivity(num_batches=1, ema=0.0)
    levels = MultiLevelTraining([Level()], [Phase(0, 5), Phase(1, 5), Phase(0)])

    class Measure(L.Callback):
        def __init__(self):
            self.values = {}

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step not in (1, 5, 10):
                return
            net, rows = pl_module.net, torch.arange(len(batch)) + len(batch) * batch_idx
            blocks = list(net.transformer.h)
            changes = []
            pl_module.eval()
            with torch.no_grad():
                whole = pl_module.loss(rows).double().item()
                for block in blocks:
                    forward = block.forward
                    block.forward = lambda hidden_states, *_, **__: hidden_states
                    changes.append(pl_module.loss(rows).double().item() - whole)
                    block.forward = forward
                    del block.forward
            pl_module.train()
            self.values[trainer.global_step] = changes

    measure = Measure()
    noted = {}
    run(tmp_path, [levels, method, Look(method, noted, "after"), measure], strategy="resizable")
    for step, changes in measure.values.items():
        assert len(changes) == (3 if step == 5 else 6)
        assert noted[step, "after"] == pytest.approx(changes, abs=1e-6)
