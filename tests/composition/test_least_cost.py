"""How little several methods may leave of a run, what the arguments of Composition may be, and rehearsals."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import Composition, RandomLTD
from lit_accel.methods import coordinator
from tests.composition.runs import LATE_STAGES, METHODS, Host, run


def greedy(**given):
    """Of the blocks' FLOPs hardly anything is left; the head of this model is a tenth."""
    layers = METHODS["PLD"](theta=0.02, gamma=50.0)
    return [
        METHODS["multi-level"](),
        layers,
        RandomLTD(**{"start_tokens": 0.1, "growth": 18, "quantum": 1, "num_tokens": 12, **given}),
    ]


@pytest.mark.parametrize("num_tokens", [12, None])
def test_hardly_anything_left_is_refused(tmp_path, num_tokens):
    """Before training, or at the first call of the model where nobody has said how long sequences are."""
    module = Host()
    names = "MultiLevelTraining, ProgressiveLayerDropping, RandomLTD"
    match = rf"{names} together leave 2\d\.\d% .* less than least_cost=0\.3.*least_cost=0"
    with pytest.raises(MisconfigurationException, match=match):
        run(tmp_path, greedy(num_tokens=num_tokens), module=module, strategy="resizable")
    assert not module.seen
    with pytest.raises(MisconfigurationException, match=r"less than least_cost=0\.9"):
        run(tmp_path, [METHODS["PLD"](), METHODS["random-LTD"](num_tokens=12), Composition(least_cost=0.9)])


def test_also_where_only_size_and_units_change(tmp_path):
    """None of the two looks at sequences by itself, and a plain loader says nothing of them."""
    module = Host()
    methods = [METHODS["multi-level"](), METHODS["MST"](stages=LATE_STAGES), Composition(least_cost=0.95)]
    match = "MultiLevelTraining, MixedSparsityTraining together leave .* less than least_cost=0.95"
    with pytest.raises(MisconfigurationException, match=match):
        run(tmp_path, methods, module=module, strategy="resizable")
    assert not module.seen


@pytest.mark.parametrize(
    "callbacks",
    [
        # On the user's word.
        lambda: [*greedy(), Composition(least_cost=0)],
        lambda: [*greedy(), Composition(least_cost=0.05)],
        # Dense for the most part.
        lambda: [*greedy(), Composition(dense_warmup=0.1, dense_tail=0.4)],
        # One method is its user's own affair.
        lambda: greedy()[1:2],
        lambda: [*greedy()[1:2], RandomLTD(start_tokens=1.0, num_tokens=12), Composition(least_cost=0.9)],
    ],
)
def test_and_allowed(tmp_path, callbacks):
    assert len(run(tmp_path, callbacks(), strategy="resizable").module.seen) == 18


def test_what_it_will_cost_is_said(tmp_path, monkeypatch):
    said = []
    # Not by the log, which others may have silenced in this process.
    monkeypatch.setattr(coordinator, "rank_zero_info", said.append)
    made = run(tmp_path, [METHODS["PLD"](), METHODS["random-LTD"](num_tokens=12)])
    total = made.ledger.phases.total
    assert len(said) == 1
    names, _, share = said[0].partition(" together will cost about ")
    assert names == "ProgressiveLayerDropping, RandomLTD"
    # Of an expectation: the blocks are drawn.
    assert float(share.partition("%")[0]) / 100 == pytest.approx(total.flops / total.dense_flops, abs=0.03)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"dense_warmup": -1}, "dense_warmup is -1; it is a number of optimizer steps"),
        ({"dense_tail": 1.5}, r"dense_tail is 1.5; .* share of the run \(float from 0 to 1\)"),
        ({"dense_warmup": float("nan")}, "dense_warmup is nan; it is a number"),
        ({"least_cost": 1}, "least_cost is 1; it is a share"),
        ({"least_cost": -0.1}, "least_cost is -0.1"),
        ({"least_cost": float("nan")}, "least_cost is nan"),
        ({"drop_levels": [-1]}, r"drop_levels is \[-1\]; it is a list of levels"),
        ({"drop_levels": [0.0]}, r"drop_levels is \[0.0\]"),
        ({"drop_levels": [True]}, r"drop_levels is \[True\]"),
        ({"drop_levels": []}, "drop_levels is empty"),
    ],
)
def test_bad_arguments(given, match):
    with pytest.raises(ValueError, match=match):
        Composition(**given)


def test_two_compositions(tmp_path):
    class Mine(Composition):
        pass

    with pytest.raises(MisconfigurationException, match="Two Composition callbacks would contradict each other"):
        run(tmp_path, [METHODS["PLD"](), Composition(), Mine()])


class StopAfter(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= 5


@pytest.mark.parametrize("reverse", [False, True])
def test_without_an_end_there_is_no_share_of_a_run(tmp_path, reverse):
    callbacks = [METHODS["random-LTD"](growth=4), Composition(dense_tail=0.2)]
    with pytest.raises(MisconfigurationException, match="Composition must know how long the run is"):
        run(tmp_path, callbacks[::-1] if reverse else callbacks, max_steps=-1)


@pytest.mark.parametrize("num_tokens", [None, 12])
def test_without_an_end_methods_that_need_none_go_together(tmp_path, num_tokens):
    """What such a run will cost cannot be said."""
    callbacks = [METHODS["PLD"](), METHODS["random-LTD"](growth=4, num_tokens=num_tokens)]
    made = run(tmp_path, callbacks, max_steps=-1, callbacks=[StopAfter()])
    assert len(made.module.seen) == 5
    assert made.ledger.phases.total.flops < made.ledger.phases.total.dense_flops


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_rehearsal_has_no_room_for_rules_and_does_not_need_it(tmp_path, steps):
    rules = Composition(dense_warmup=0.5, dense_tail=0.5, least_cost=0.9)
    callbacks = [METHODS["PLD"](), METHODS["random-LTD"](growth=0.7, num_tokens=12), rules]
    made = run(tmp_path, callbacks, fast_dev_run=steps, max_steps=-1)
    assert len(made.module.seen) == steps


@pytest.mark.parametrize(
    "rules", [{}, {"dense_warmup": 20, "dense_tail": 30}, {"dense_warmup": 0.1, "dense_tail": 0.2}]
)
def test_a_rehearsal_of_all_that_go_together(tmp_path, rules):
    callbacks = [METHODS[title]() for title in ("SBLD", "random-LTD", "MST")]
    callbacks[2] = METHODS["MST"](stages=[(0.0, 0.0), (0.1, 0.5), (0.8, 0.0)])
    made = run(tmp_path, [*callbacks, Composition(**rules)], fast_dev_run=5, max_steps=-1)
    assert len(made.module.seen) == 5
