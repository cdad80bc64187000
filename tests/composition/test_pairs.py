"""Each two methods that go together, and more of them: they train, cost what was planned, and resume bit for bit."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from lit_accel.anatomy import anatomy_of
from lit_accel.methods.compatibility import MST, PAIRS, PLD, SBLD, pair_of
from lit_accel.methods.coordinator import coordinator_of
from lit_accel.methods.layer_dropping.refusals import droppable_blocks
from tests.composition.pairs import CASES, FAMILIES, callbacks, resumed_after
from tests.composition.runs import (
    BATCH,
    COUNTED,
    STEPS,
    WITH_HEADS,
    Host,
    Saves,
    assert_same,
    counted,
    phases_of,
    probe_costs,
    run,
    workload_for,
)
from tests.methods.dropping import intercepted
from tests.methods.mixed_sparsity import assert_equal, assert_same_moments

IDS = [f"{'+'.join(titles)} {family}" for titles, family in CASES]
cases = pytest.mark.parametrize(("titles", "family"), CASES, ids=IDS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the uninterrupted run of a case, and its checkpoints."""

    @cache
    def of(titles, family):
        saves = Saves(tmp_path_factory.mktemp("whole"), resumed_after(titles, family))
        made = run(saves.folder, callbacks(titles, family), family, strategy="resizable", callbacks=[saves])
        return made, saves

    return of


def sensitivity_of(made):
    return next((method for method in made.methods if method.title == SBLD), None)


@cases
def test_it_learns_with_every_method_at_work(whole, titles, family):
    made, _ = whole(titles, family)
    seen = torch.tensor(made.module.seen)
    assert len(seen) == STEPS
    assert torch.isfinite(seen).all()
    rows = torch.arange(256)
    with torch.no_grad():
        before, after = (module.eval().loss(rows).item() for module in (Host(family), made.module))
    assert after < before
    assert not intercepted(made.module)
    num_blocks = len(anatomy_of(made.module.net).blocks)
    keep, tokens, calls = made.ran.keep, made.ran.tokens, made.ran.calls
    assert len(keep) == STEPS
    if PLD in titles or SBLD in titles:
        assert sum(not all(kept) for kept in keep.values()) >= 4
    if "random-LTD" in titles:
        assert len({tuple(sorted(set(each))) for each in tokens.values()}) >= 4
    if "multi-level" in titles:
        small = [step for step, kept in keep.items() if len(kept) < num_blocks]
        assert small == [3, 4, 5, 6, 7]
    if MST in titles:
        assert len({call["active"].stage for call in calls}) >= 3


@cases
def test_the_books_say_what_ran(whole, titles, family):
    """The cost of a step is what is outside of the blocks, and each block on the tokens and units that it had."""
    made, _ = whole(titles, family)
    method = sensitivity_of(made)
    probes = {}
    if method is not None:
        shape = made.ran.calls[0]["shape"]
        probes = probe_costs(made.module.probes, lambda anatomy: droppable_blocks(anatomy, [], ""), shape)
        assert bool(probes) == (method.estimator == "ablate")
        assert len(method.history.measured_at) >= 3
    full = anatomy_of(Host(family).net)
    assert counted(made.ledger.phases.list, WITH_HEADS) == phases_of(made.ran, full, probes)


@cases
def test_it_costs_what_was_planned(whole, titles, family):
    made, _ = whole(titles, family)
    plan = coordinator_of(made.module.kept_trainer).plan(anatomy_of(Host(family).net), workload_for(made.module))
    phases = made.ledger.phases
    if sensitivity_of(made) is None:
        names = (*COUNTED, "num_parameters")
        assert counted(plan.phases, names) == counted(phases.list, names)
        assert plan.flops == phases.total.flops
        return
    # Which blocks run is measured, how much of them is planned; measurements come on top.
    names = ("size", "steps", "tokens", "dense_flops", "num_parameters")
    assert counted(plan.phases, names) == counted(phases.list, names)
    trained = sum(phase["flops"] for phase in phases_of(made.ran, anatomy_of(Host(family).net)))
    assert trained <= phases.total.flops
    assert plan.flops == pytest.approx(trained, rel=0.1)


@pytest.mark.parametrize(
    ("titles", "family", "step"),
    [(*case, step) for case in CASES for step in resumed_after(*case)],
)
def test_resumed_it_is_the_uninterrupted_run(whole, tmp_path, titles, family, step):
    made, saves = whole(titles, family)
    again = run(
        tmp_path,
        callbacks(titles, family),
        family,
        module=Host(family, seed=step),
        strategy="resizable",
        resume=saves.path(step),
    )
    assert again.module.seen == made.module.seen[step:]
    assert_equal(again.module, made.module)
    assert_same_moments(again.module, made.module)
    assert counted(again.ledger.phases.list, WITH_HEADS) == counted(made.ledger.phases.list, WITH_HEADS)
    for mine, theirs in zip(again.methods, made.methods, strict=True):
        assert_same(mine.state_dict(), theirs.state_dict(), mine.title)


@cases
def test_what_speaks_against_it_is_said_once(whole, titles, family):
    made, _ = whole(titles, family)
    said = [warning for warning in made.warnings if " in one run: " in warning]
    expected = [pair.reason for pair in PAIRS if {pair.first, pair.second} <= set(titles) and pair.verdict == "warn"]
    assert len(said) == len(expected)
    for reason in expected:
        assert sum(reason in warning for warning in said) == 1


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.first}+{pair.second}")
def test_every_pair_that_is_not_refused_is_tried_here(pair):
    assert pair_of(pair.second, pair.first) is pair
    tried = [families for titles, families in FAMILIES.items() if set(titles) == {pair.first, pair.second}]
    assert len(tried) == (0 if pair.verdict == "refuse" else 1)
    for families in tried:
        assert "gpt2-tied" in families
        assert len(families) > 1


def test_micro_batches_of_three_methods_and_their_resume(tmp_path):
    titles = ("multi-level", "PLD", "random-LTD")
    options = {"strategy": "resizable", "accumulate_grad_batches": 2}
    saves = Saves(tmp_path, (6, 9))
    made = run(tmp_path, callbacks(titles), callbacks=[saves], **options)
    assert len(made.module.seen) == 2 * STEPS
    # One decision for both micro-batches.
    pairs = zip(made.ran.calls[::2], made.ran.calls[1::2], strict=True)
    assert all(first["rows"] == second["rows"] for first, second in pairs)
    plan = coordinator_of(made.module.kept_trainer).plan(
        anatomy_of(made.module.net), workload_for(made.module, num_micro_batches=2)
    )
    assert counted(plan.phases) == counted(made.ledger.phases.list)
    assert made.ledger.phases.total.tokens == 2 * STEPS * BATCH * 12
    for step in saves.steps:
        again = run(tmp_path / "again", callbacks(titles), module=Host(seed=1), resume=saves.path(step), **options)
        assert again.module.seen == made.module.seen[2 * step :]
        assert_equal(again.module, made.module)
        assert_same_moments(again.module, made.module)
        assert counted(again.ledger.phases.list) == counted(made.ledger.phases.list)
        for mine, theirs in zip(again.methods, made.methods, strict=True):
            assert_same(mine.state_dict(), theirs.state_dict(), mine.title)


def test_the_three_together_cost_less_than_any_two(whole):
    """And not less than what the rule of products would leave of the smallest part."""

    def share(*titles):
        total = whole(titles, "gpt2-tied")[0].ledger.phases.total
        return total.flops / total.dense_flops

    three = share("multi-level", "PLD", "random-LTD")
    twos = [share("multi-level", "PLD"), share("multi-level", "random-LTD"), share("PLD", "random-LTD")]
    assert three < min(twos)
    assert math.prod(twos) < three


def test_given_the_other_way_round_it_is_the_same_run(whole, tmp_path):
    titles = ("multi-level", "SBLD", "random-LTD", "MST")
    made, saves = whole(titles, "gpt2-tied")
    for step in (None, 6):
        resume = None if step is None else saves.path(step)
        again = run(tmp_path, callbacks(titles)[::-1], strategy="resizable", resume=resume)
        assert again.module.seen == made.module.seen[step or 0 :]
        assert_equal(again.module, made.module)
        assert counted(again.ledger.phases.list) == counted(made.ledger.phases.list)
        for mine, theirs in zip(again.methods[::-1], made.methods, strict=True):
            assert_same(mine.state_dict(), theirs.state_dict(), mine.title)
