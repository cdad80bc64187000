"""The table of pairs: it is complete, and what it says of order holds for the callbacks of a run."""

from __future__ import annotations

import itertools

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_accel import (
    Composition,
    ComputeLedger,
    LayerTokenLR,
    MultiLevelMixin,
    ProgressiveLayerDroppingMixin,
    RandomLTDMixin,
)
from lit_accel.methods.compatibility import (
    CLASHES,
    MST,
    MULTI_LEVEL,
    ORDER,
    PAIRS,
    PLD,
    RANDOM_LTD,
    SBLD,
    TITLES,
    pair_of,
)
from lit_accel.methods.coordinator import coordinator_of
from lit_accel.methods.method import Method
from tests.composition.runs import METHODS, NEUTRAL, PHASES, Host, run
from tests.methods.dropping import intercepted
from tests.methods.mixed_sparsity import assert_equal, assert_same_moments
from tests.training import make_trainer


def test_each_two_methods_are_in_it_once():
    expected = {frozenset(pair) for pair in itertools.combinations(TITLES, 2)}
    listed = [frozenset((pair.first, pair.second)) for pair in PAIRS]
    assert len(listed) == len(set(listed)) == 10
    assert set(listed) == expected
    for first, second in itertools.permutations(TITLES, 2):
        assert {pair_of(first, second).first, pair_of(first, second).second} == {first, second}
    for unknown in ((PLD, PLD), (PLD, "lottery")):
        with pytest.raises(KeyError, match="methods are multi-level, PLD, SBLD, random-LTD, MST"):
            pair_of(*unknown)


def test_each_pair_has_a_verdict_and_a_reason():
    assert {pair.verdict for pair in PAIRS} == {"ok", "warn", "refuse"}
    assert all(pair.reason and not pair.reason.endswith(".") for pair in PAIRS)
    verdicts = {frozenset((pair.first, pair.second)): pair.verdict for pair in PAIRS}
    not_ok = {each: verdict for each, verdict in verdicts.items() if verdict != "ok"}
    assert not_ok == {
        frozenset((PLD, SBLD)): "refuse",
        frozenset((MULTI_LEVEL, MST)): "warn",
        frozenset((PLD, MST)): "warn",
        frozenset((SBLD, MST)): "warn",
    }


def test_clashes_are_of_pairs_that_go_together():
    assert {clash.first for clash in CLASHES} | {clash.second for clash in CLASHES} <= set(TITLES)
    assert all(pair_of(clash.first, clash.second).verdict != "refuse" for clash in CLASHES)


def test_every_method_says_what_it_decides():
    decided = {title: METHODS[title]().decides for title in TITLES}
    assert decided == {MULTI_LEVEL: "size", MST: "units", PLD: "layers", SBLD: "layers", RANDOM_LTD: "tokens"}
    assert ORDER == ("size", "units", "layers", "tokens")
    for title in TITLES:
        method, neutral = METHODS[title](), NEUTRAL[title]()
        assert (method.title, neutral.title) == (title, title)
        assert neutral.is_neutral and not method.is_neutral
        assert method.leaves_parameters_unused == (title in (PLD, SBLD))
        assert method.changes_size == (title == MULTI_LEVEL)
        assert method.measures_blocks == (title == SBLD)
        assert method.chooses_by_gradient == (title == MST)


class EnoughError(Exception):
    pass


class Stop(L.Callback):
    """Ends a run before its first batch."""

    def on_train_start(self, trainer, pl_module):
        raise EnoughError


def begin(folder, callbacks, **options):
    trainer = make_trainer(folder, callbacks=[*callbacks, Stop()], max_steps=18, max_epochs=-1, **options)
    with pytest.raises(EnoughError):
        trainer.fit(Host(), DataLoader(range(256), batch_size=4))
    return trainer


IN_ORDER = (MULTI_LEVEL, MST, PLD, RANDOM_LTD)
# Sparse only after the model is large again.
GIVEN = {MST: {"stages": [(0, 0.0), (9, 0.5), (14, 0.0)]}}


@pytest.mark.parametrize("titles", list(itertools.permutations(IN_ORDER)), ids="-".join)
@pytest.mark.filterwarnings("ignore:.*in one run")
def test_they_act_in_order_whatever_the_order_they_are_given_in(tmp_path, titles):
    methods = {title: METHODS[title](**GIVEN.get(title, {})) for title in titles}
    own, ledger, checkpoint = L.Callback(), ComputeLedger(print_table=False), ModelCheckpoint(tmp_path)
    first, *rest = methods.values()
    trainer = begin(tmp_path, [own, first, ledger, *rest, checkpoint], enable_checkpointing=True)
    present = trainer.callbacks
    assert [each.title for each in present if isinstance(each, Method)] == list(IN_ORDER)
    assert {id(each) for each in present if isinstance(each, Method)} == {id(method) for method in methods.values()}
    # The others are where they were; Lightning itself puts checkpoints last.
    assert [present.index(each) for each in (own, ledger)] == [0, 2]
    assert [isinstance(each, Method) for each in present[:6]] == [False, True, False, True, True, True]
    assert present[-1] is checkpoint
    assert coordinator_of(trainer).methods == [methods[title] for title in IN_ORDER]


@pytest.mark.filterwarnings("ignore:.*in one run")
def test_sensitivities_take_the_place_of_depth(tmp_path):
    titles = (RANDOM_LTD, SBLD, MST, MULTI_LEVEL)
    trainer = begin(tmp_path, [METHODS[title](**GIVEN.get(title, {})) for title in titles])
    expected = [MULTI_LEVEL, MST, SBLD, RANDOM_LTD]
    assert [each.title for each in trainer.callbacks if isinstance(each, Method)] == expected


def test_one_coordinator_for_a_trainer(tmp_path):
    one, other = (make_trainer(tmp_path) for _ in range(2))
    assert coordinator_of(one) is coordinator_of(one)
    assert coordinator_of(one) is not coordinator_of(other)
    assert coordinator_of(one).trainer is one


# Neutral settings


def train(folder, callbacks, strategy="resizable"):
    L.seed_everything(0, verbose=False)
    module = Host()
    # Draws of dropout would show if anything took from the global generator.
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.2
    trainer = make_trainer(folder, callbacks=callbacks, strategy=strategy, max_steps=8, max_epochs=-1)
    trainer.fit(module, DataLoader(range(256), batch_size=4))
    return module


def test_all_five_at_neutral_settings_change_nothing(tmp_path, recwarn):
    plain = train(tmp_path, [])
    assert len(set(plain.seen)) == 8
    methods = [NEUTRAL[title]() for title in TITLES]
    neutral = train(tmp_path, [*methods, Composition(), ComputeLedger(print_table=False)])
    assert neutral.seen == plain.seen
    assert_equal(neutral, plain)
    assert_same_moments(neutral, plain)
    assert not intercepted(neutral)
    assert not [warning for warning in recwarn if "in one run" in str(warning.message)]


@pytest.mark.parametrize("title", TITLES)
def test_a_neutral_method_does_not_stand_beside_another(tmp_path, title, recwarn):
    """Also where the two, both at work, would be refused or warned about."""
    others = [NEUTRAL[other]() for other in TITLES if other != title]
    trainer = begin(tmp_path, [*others, METHODS[title]()])
    assert [method.title for method in coordinator_of(trainer).methods] == [title]
    assert not [warning for warning in recwarn if "in one run" in str(warning.message)]


def test_the_learning_rate_of_a_neutral_run_follows_its_steps(tmp_path):
    class Scheduled(Host):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = {"scheduler": LayerTokenLR(optimizer, num_warmup_steps=2), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    rates = {}
    for kind, methods in (("neutral", [NEUTRAL[title]() for title in TITLES]), ("alone", [NEUTRAL[RANDOM_LTD]()])):
        module = Scheduled()
        trainer = make_trainer(tmp_path, callbacks=methods, max_steps=6, max_epochs=-1)
        trainer.fit(module, DataLoader(range(256), batch_size=4))
        rates[kind] = module.rates
    assert rates["neutral"] == rates["alone"]
    assert len(set(rates["alone"])) > 3


class WithMethods(MultiLevelMixin, RandomLTDMixin, ProgressiveLayerDroppingMixin, Host):
    """A module that brings its methods along."""


def test_methods_that_a_module_brings_along_act_in_the_same_order(tmp_path):
    """Beside one that is given to the Trainer, and is first to decide but for the size."""
    units = METHODS[MST](**GIVEN[MST])
    module = WithMethods(pld_gamma=0.5, ltd_start_tokens=0.5, ltd_growth=9, ltd_quantum=1, multilevel_phases=PHASES)
    L.seed_everything(0, verbose=False)
    trainer = make_trainer(tmp_path, callbacks=[units], max_steps=18, max_epochs=-1)
    with pytest.warns(UserWarning, match="MixedSparsityTraining and ProgressiveLayerDropping in one run"):
        trainer.fit(module, DataLoader(range(256), batch_size=4))
    assert [each.title for each in trainer.callbacks if isinstance(each, Method)] == list(IN_ORDER)
    given = [
        METHODS[RANDOM_LTD](start_tokens=0.5, growth=9),
        METHODS[PLD](),
        METHODS[MULTI_LEVEL](optimizer_state=None),
        METHODS[MST](**GIVEN[MST]),
    ]
    assert run(tmp_path, given, strategy="resizable").module.seen == module.seen
