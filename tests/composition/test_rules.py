"""What holds for all methods together: dense ends, levels at which nothing is dropped, gradients of all blocks."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as L
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import Composition, LayerTokenLR, Level, MultiLevelTraining, Phase
from lit_accel.anatomy import anatomy_of
from lit_accel.methods.compatibility import MST, MULTI_LEVEL, PLD, RANDOM_LTD, SBLD
from lit_accel.methods.coordinator import coordinator_of
from tests.composition.runs import (
    BATCH,
    COUNTED,
    METHODS,
    STEPS,
    WITH_HEADS,
    Host,
    Saves,
    assert_same,
    counted,
    phases_of,
    run,
    workload_for,
)
from tests.methods.mixed_sparsity import assert_equal

Any = partial(Composition, least_cost=0)


def steps_in_part(made):
    """The steps in which a block or a token was left out."""
    return {
        step
        for step, keep in made.ran.keep.items()
        if not all(keep) or any(tokens != 12 for tokens in made.ran.tokens[step])
    }


# Dense at both ends

DROPPING = {
    PLD: {"gamma": 5.0},
    SBLD: {"warmup": 1, "ramp": 0, "release": 0, "measure_every": 18},
    # To the end of the run.
    RANDOM_LTD: {"growth": 18},
}


def dropping(title):
    return METHODS[title](**DROPPING[title])


@pytest.mark.parametrize("title", sorted(DROPPING))
@pytest.mark.parametrize(
    ("rules", "first", "end"),
    [
        ({"dense_warmup": 6}, 6, 18),
        ({"dense_tail": 5}, 0, 13),
        ({"dense_warmup": 0.25, "dense_tail": 0.5}, 4, 9),
    ],
)
def test_nothing_is_dropped_at_the_dense_ends(tmp_path, title, rules, first, end):
    made = run(tmp_path, [dropping(title), Composition(**rules)])
    steps = steps_in_part(made)
    # Sensitivities are there with the second batch.
    begin = {PLD: 1, SBLD: 2, RANDOM_LTD: 0}[title]
    assert steps <= set(range(max(first, begin), end))
    # And in nearly all others something is: at the end of the growth all tokens are there again.
    assert len(steps) >= min(end, 17) - max(first, begin) - 1
    (method,) = coordinator_of(made.module.kept_trainer).methods
    if title != RANDOM_LTD:
        for call in made.ran.calls:
            if not first <= call["step"] < end:
                assert len(call["rows"]) == 6


def test_planned_and_charged_alike_with_dense_ends(tmp_path):
    rules = Composition(dense_warmup=0.2, dense_tail=4, drop_levels=[0])
    methods = [METHODS[MULTI_LEVEL](phases=[Phase(0, 5), Phase(1, 4), Phase(0)])]
    methods += [dropping(PLD), dropping(RANDOM_LTD), rules]
    made = run(tmp_path, methods, strategy="resizable")
    assert steps_in_part(made) == {4, 9, 10, 11, 12, 13}
    plan = coordinator_of(made.module.kept_trainer).plan(anatomy_of(made.module.net), workload_for(made.module))
    assert counted(plan.phases) == counted(made.ledger.phases.list)


def test_the_learning_rate_follows_the_tokens_that_rules_leave(tmp_path):
    class Scheduled(Host):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = {"scheduler": LayerTokenLR(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    method = METHODS[RANDOM_LTD](growth=18, num_tokens=12)
    made = run(tmp_path, [method, Composition(dense_warmup=4, dense_tail=5)], module=Scheduled())
    spent = [sum(tokens) / (6 * 12) for tokens in made.ran.tokens.values()]
    total = sum(spent)
    assert total < STEPS
    expected = [1e-2 * (1 - sum(spent[:step]) / total) for step in range(STEPS)]
    assert made.module.rates == pytest.approx(expected, rel=1e-9)


def test_each_method_is_planned_as_if_it_were_alone(tmp_path):
    titles = (MULTI_LEVEL, PLD, RANDOM_LTD)
    methods = {title: METHODS[title]() for title in titles}
    made = run(tmp_path, list(methods.values()), strategy="resizable")
    full, work = anatomy_of(made.module.net), workload_for(made.module)
    coordinator = coordinator_of(made.module.kept_trainer)
    nothing = coordinator.plan(full, work, [])
    assert nothing.flops == nothing.dense_flops == made.ledger.phases.total.dense_flops
    for title in titles:
        alone = run(tmp_path, [METHODS[title]()], strategy="resizable")
        assert counted(coordinator.plan(full, work, [methods[title]]).phases) == counted(alone.ledger.phases.list)
    # Of long runs some steps stand for those that follow them.
    coarse = coordinator.plan(full, work, most_steps=9)
    assert (coarse.num_steps, coarse.stride, len(coarse.step_flops)) == (STEPS, 2, 9)
    assert coarse.share == pytest.approx(coordinator.plan(full, work).share, abs=0.05)


@pytest.mark.parametrize(
    ("title", "rules", "match"),
    [
        (
            MULTI_LEVEL,
            {"dense_warmup": 4},
            "dense_warmup wants the whole model in steps 0 to 3, .* 3 to 7. Move its ph",
        ),
        (
            MULTI_LEVEL,
            {"dense_tail": 11},
            "dense_tail wants the whole model in steps from 7 on, .* 3 to 7. Move its ph",
        ),
        (
            MST,
            {"dense_warmup": 0.25},
            "dense_warmup wants .* steps 0 to 3, .* 3 to 5. Move its stages, or shorten dense_w",
        ),
        (
            MST,
            {"dense_tail": 0.3},
            "dense_tail wants .* steps from 13 on, .* 12 to 15. Move its stages, or shorten dense_t",
        ),
    ],
)
def test_sizes_and_units_have_to_make_room(tmp_path, title, rules, match):
    module = Host()
    with pytest.raises(MisconfigurationException, match=match):
        run(tmp_path, [METHODS[title](), Composition(**rules)], module=module, strategy="resizable")
    assert not module.seen
    # As long as what they leave out lies between the two.
    between = {MULTI_LEVEL: (3, 10), MST: (3, 2)}[title]
    rules = Composition(dense_warmup=between[0], dense_tail=between[1])
    assert run(tmp_path, [METHODS[title](), rules], strategy="resizable").module.seen


def test_a_pattern_of_attention_has_to_make_room_too(tmp_path):
    module = Host()
    pattern = {"attention_pattern": "window", "attention_window": 4, "attention_phase": (0.0, 1.0)}
    callbacks = [METHODS[MST](stages=[(0, 0.0)], **pattern), Composition(dense_tail=0.3)]
    with pytest.raises(MisconfigurationException, match="Move its stages or attention_phase, or shorten dense_tail"):
        run(tmp_path, callbacks, module=module)
    assert not module.seen


def test_a_run_that_would_be_dense_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="dense_tail has begun"):
        run(tmp_path, [dropping(PLD), Composition(dense_warmup=0.5, dense_tail=9)])


# Levels


def levels(**given):
    return MultiLevelTraining([Level(), Level(depth=3)], [Phase(0, 2), Phase(1, 4), Phase(2, 3), Phase(0)], **given)


@pytest.mark.parametrize("drop_levels", [[0], [1], [0, 1], None])
def test_nothing_is_dropped_at_other_levels(tmp_path, drop_levels):
    """Also where a level has a single block, from which nothing could be dropped."""
    given = {"least_cost": 0, "drop_levels": drop_levels}
    methods = [levels(), dropping(PLD), dropping(RANDOM_LTD), Composition(**given)]
    if drop_levels is None:
        with pytest.raises(MisconfigurationException, match="At level 2 of MultiLevelTraining"):
            run(tmp_path, methods, strategy="resizable")
        return
    made = run(tmp_path, methods, strategy="resizable")
    depths = {0: 6, 1: 3, 2: 1}
    assert [len(keep) for keep in made.ran.keep.values()] == [6] * 2 + [3] * 4 + [1] * 3 + [6] * 9
    where = {len(made.ran.keep[step]) for step in steps_in_part(made)}
    assert where == {depths[level] for level in drop_levels}
    plan = coordinator_of(made.module.kept_trainer).plan(anatomy_of(made.module.net), workload_for(made.module))
    assert counted(plan.phases) == counted(made.ledger.phases.list)


def test_a_level_that_is_not_there(tmp_path):
    for methods, said in (([METHODS[PLD]()], "are 0, the full model, alone"), ([METHODS[MULTI_LEVEL]()], "are 0 to 1")):
        with pytest.raises(MisconfigurationException, match=f"drop_levels names level 2, and the levels .* {said}"):
            run(tmp_path, [*methods, Composition(drop_levels=[0, 2])], strategy="resizable")


# Gradients of all blocks


class Gradients(L.Callback):
    """Notes the blocks of which a parameter has no gradient, before any other looks. Stands left of the methods."""

    def __init__(self):
        self.without = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        net = pl_module.net
        self.without[trainer.global_step] = [
            index
            for index, block in enumerate(anatomy_of(net).blocks)
            if any(parameter.grad is None for parameter in net.get_submodule(block.path).parameters())
        ]


@pytest.mark.parametrize(("title", "options"), [(PLD, {}), (SBLD, {}), (PLD, {"accumulate_grad_batches": 2})])
@pytest.mark.filterwarnings("ignore:.*in one run")
def test_all_blocks_have_gradients_where_units_are_chosen_by_them(tmp_path, title, options):
    gradients, units = Gradients(), METHODS[MST]()
    methods = [gradients, METHODS[RANDOM_LTD](), dropping(title), units]
    made = run(tmp_path, methods, **options)
    chooses = {step for step in range(STEPS) if units.targets.chooses_by_gradient(step)}
    assert len(chooses) >= 3
    # Of the first stage nothing comes back: what is taken out is chosen by magnitude.
    assert 3 not in chooses
    for step, without in gradients.without.items():
        ran = [index for index, kept in enumerate(made.ran.keep[step]) if not kept]
        assert without == ran
        assert not (without and step in chooses)
    # Otherwise dropped.
    assert len([step for step, without in gradients.without.items() if without]) >= 5
    has_dense = {call["step"] for call in made.ran.calls if call["active"].has_dense_gradients}
    assert has_dense == chooses


# All of it


@given(data=st.data())
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_planned_is_charged_whatever_is_set(tmp_path, data):
    """Schedules of all methods, of which some are there, in any order, with any rules that fit."""
    draw = data.draw
    num_steps = draw(st.integers(9, 14))
    methods = [
        METHODS[PLD](
            theta=draw(st.sampled_from([0.3, 0.6])),
            direction=draw(st.sampled_from(["increasing", "decreasing"])),
            release=draw(st.integers(0, 4)),
            gamma=None,
            pinned=draw(st.sampled_from([[], [0], [-1]])),
            sampler=draw(st.sampled_from(["systematic", "bernoulli"])),
            seed=draw(st.integers(0, 3)),
        ),
        METHODS[RANDOM_LTD](
            start_tokens=draw(st.sampled_from([0.1, 0.5, 5])),
            growth=draw(st.integers(1, num_steps)),
            quantum=draw(st.integers(1, 4)),
            pinned=draw(st.sampled_from([[0], [-1], []])),
            scope=draw(st.sampled_from(["layer", "route"])),
        ),
    ]
    small = draw(st.integers(1, 3))
    if draw(st.booleans()):
        first = draw(st.integers(1, 3))
        phases = [Phase(0, first), Phase(1, small), Phase(0)]
        carried = draw(st.sampled_from(["reset", "project", "second_moment"]))
        methods.append(METHODS[MULTI_LEVEL](phases=phases, optimizer_state=carried))
    if draw(st.booleans()):
        start = draw(st.integers(7, 8))
        stages = [(0, 0.0), (start, draw(st.sampled_from([0.25, 0.5]))), (num_steps - 1, 0.0)]
        methods.append(METHODS[MST](stages=stages, update_every=1, distribution="uniform"))
    methods = draw(st.permutations(methods))
    rules = Any(
        drop_levels=draw(st.sampled_from([None, [0]])),
        dense_tail=draw(st.integers(0, 1)),
        schedules=draw(st.sampled_from(["run", "level"])),
    )
    made = run(tmp_path, [*methods, rules], strategy="resizable", max_steps=num_steps)
    full = anatomy_of(made.module.net)
    plan = coordinator_of(made.module.kept_trainer).plan(full, workload_for(made.module))
    assert counted(plan.phases, (*COUNTED, "num_parameters")) == counted(
        made.ledger.phases.list, (*COUNTED, "num_parameters")
    )
    assert counted(made.ledger.phases.list, WITH_HEADS) == phases_of(made.ran, full)
    assert [decision.level for decision in plan.decisions] == [
        int(len(call["anatomy"].blocks) < 6) for call in made.ran.calls
    ]
    assert made.ledger.phases.total.tokens == num_steps * BATCH * 12


# Resume


def test_rules_survive_an_interruption_and_changed_ones_are_said(tmp_path):
    def callbacks(**rules):
        return [dropping(PLD), dropping(RANDOM_LTD), Composition(**rules)]

    saves = Saves(tmp_path, [8])
    rules = {"dense_warmup": 2, "dense_tail": 0.25, "drop_levels": [0]}
    made = run(tmp_path, callbacks(**rules), callbacks=[saves])
    again = run(tmp_path, callbacks(**rules), resume=saves.path(8))
    assert_equal(again.module, made.module)
    assert again.module.seen == made.module.seen[8:]
    for mine, theirs in zip(again.methods, made.methods, strict=True):
        assert_same(mine.state_dict(), theirs.state_dict())
    about = "with other rules of composition: "
    assert not [warning for warning in again.warnings if about in warning]
    for changed, said in (
        ({**rules, "dense_tail": 3}, "dense_tail 0.25 (now 3)"),
        ({**rules, "dense_warmup": 0.5, "drop_levels": None}, "dense_warmup 2 (now 0.5), drop_levels [0] (now None)"),
    ):
        other = run(tmp_path, callbacks(**changed), resume=saves.path(8))
        assert len([warning for warning in other.warnings if f"{about}{said}." in warning]) == 1
        assert other.module.seen != made.module.seen[8:]
    # What it may cost at least decides about no step.
    cheap = run(tmp_path, callbacks(**rules, least_cost=0), resume=saves.path(8))
    assert not [warning for warning in cheap.warnings if about in warning]
