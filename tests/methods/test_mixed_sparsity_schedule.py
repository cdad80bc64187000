"""When a run is how sparse, when its topology changes and by how much, and how sparsity is spread over layers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lit_accel.methods.mixed_sparsity import DEFAULT_STAGES, SparsitySchedule, densities, planned_change

SPARSITIES = st.sampled_from([0.0, 0.25, 0.5, 0.8, 0.9])


@st.composite
def schedules(draw):
    """Any stages: rising, falling, repeated, falling on one step."""
    num_steps = draw(st.integers(10, 300))
    starts = [0, *sorted(draw(st.lists(st.integers(1, num_steps), max_size=6)))]
    stages = [(start, draw(SPARSITIES)) for start in starts]
    return SparsitySchedule.of(stages, num_steps, draw(st.integers(1, 40)), draw(st.sampled_from([0.0, 0.3, 0.9])))


def default(num_steps=10_000, **options):
    return SparsitySchedule.of(DEFAULT_STAGES, num_steps, **options)


# Stages


def test_the_default_stages_step_by_step():
    schedule = default()
    by_hand = {100: (0.0, 0.3), 200: (0.3, 0.6), 400: (0.6, 0.8), 600: (0.8, 0.9)}
    by_hand |= {8000: (0.9, 0.8), 8500: (0.8, 0.6), 9000: (0.6, 0.3), 9500: (0.3, 0.0)}
    for start, (before, after) in by_hand.items():
        around = [schedule.sparsity(step) for step in (start - 1, start, start + 1)]
        assert around == [before, after, after]
    assert schedule.sparsity(0) == schedule.sparsity(9_999) == schedule.sparsity(10_000) == 0
    assert [schedule.stage(step) for step in (0, 99, 100, 599, 600, 9_999)] == [0, 0, 1, 3, 4, 8]
    assert schedule.restoration_start == 8000


def test_the_default_stages_leave_about_a_fifth_on_average():
    schedule = default()
    average = sum(1 - schedule.sparsity(step) for step in range(10_000)) / 10_000
    assert round(average, 3) == 0.218


def test_starts_are_steps_or_shares_of_the_run():
    by_step = SparsitySchedule.of([(0, 0.0), (50, 0.5), (180, 0.0)], 200)
    by_share = SparsitySchedule.of([(0.0, 0.0), (0.25, 0.5), (0.9, 0.0)], 200)
    mixed = SparsitySchedule.of([(0, 0.0), (50, 0.5), (0.9, 0.0)], 200)
    assert by_step == by_share == mixed
    assert by_step.starts == (0, 50, 180)
    # The integer 1 is a step, the float is the whole run.
    assert SparsitySchedule.of([(0, 0.5), (1, 0.0)], 200).starts == (0, 1)
    assert SparsitySchedule.of([(0, 0.5), (1.0, 0.0)], 200).starts == (0, 200)


def test_of_stages_on_one_step_the_last_one_holds():
    schedule = SparsitySchedule.of([(0.0, 0.0), (0.01, 0.3), (0.02, 0.6), (0.5, 0.0)], 20)
    assert schedule.starts == (0, 10)
    assert [schedule.sparsity(step) for step in (0, 9, 10)] == [0.6, 0.6, 0.0]


@pytest.mark.parametrize("stages", [[(0, 0.0), (30, 0.5), (20, 0.0)], [(0, 0.0), (0.5, 0.5), (99, 0.0)]])
def test_stages_out_of_order_are_refused(stages):
    with pytest.raises(ValueError, match="out of order"):
        SparsitySchedule.of(stages, 200)


@given(schedules())
def test_every_step_is_in_the_last_stage_that_has_started(schedule):
    for step in range(schedule.num_steps + 1):
        started = [s for start, s in zip(schedule.starts, schedule.sparsities, strict=True) if start <= step]
        assert schedule.sparsity(step) == started[-1]


# Events


@given(schedules())
def test_the_topology_changes_where_sparsity_does_and_at_multiples_before_restoration(schedule):
    """A new sparsity does not wait for the next multiple, as it does in the published code."""
    slopes = {step: schedule.sparsity(step) - schedule.sparsity(step - 1) for step in range(1, schedule.num_steps + 1)}
    last_rise = max((step for step, slope in slopes.items() if slope > 0), default=0)
    # Where sparsity rises once more, units are still dropped.
    falls = [step for step, slope in slopes.items() if slope < 0 and step > last_rise]
    assert schedule.restoration_start == (falls[0] if falls else None)
    end = falls[0] if falls else schedule.num_steps
    for step in range(schedule.num_steps):
        before = schedule.sparsity(step - 1) if step else 0.0
        changes = schedule.sparsity(step) != before
        replaces = step < end and step % schedule.update_every == 0 and schedule.sparsity(step) > 0
        assert schedule.is_event(step) == (changes or (replaces and schedule.drop_fraction > 0))


def test_the_start_of_a_stage_as_sparse_as_the_one_before_is_a_step_like_any_other():
    plain = SparsitySchedule.of([(0, 0.0), (10, 0.5), (90, 0.0)], 100, update_every=20)
    split = SparsitySchedule.of([(0, 0.0), (10, 0.5), (40, 0.5), (50, 0.5), (90, 0.0)], 100, update_every=20)
    events = [[step for step in range(100) if schedule.is_event(step)] for schedule in (plain, split)]
    assert events[0] == [10, 20, 40, 60, 80, 90]
    assert events[1] == events[0]


def test_events_of_the_default_stages():
    schedule = default()
    events = [step for step in range(10_000) if schedule.is_event(step)]
    assert events == [*range(100, 8_000, 100), 8_000, 8_500, 9_000, 9_500]
    # A shorter run has its whole warm-up between two multiples.
    short = [step for step in range(1_000) if default(1_000).is_event(step)]
    assert short == [10, 20, 40, 60, *range(100, 800, 100), 800, 850, 900, 950]


def test_a_run_that_begins_sparse_begins_with_an_event():
    assert SparsitySchedule.of([(0, 0.5)], 50, update_every=7).is_event(0)
    assert not SparsitySchedule.of([(0, 0.0)], 50, update_every=7).is_event(0)


def test_nothing_is_dropped_in_restoration():
    schedule, num_units = default(1_000, drop_fraction=0.9), 50
    active = [round((1 - schedule.sparsity(step)) * num_units) for step in range(1_000)]
    for step in range(800, 1_000):
        change = planned_change(num_units, active[step - 1], active[step], schedule.drop_fraction_at(step))
        assert change.num_dropped == 0
        assert (change.num_grown > 0) == schedule.is_event(step)


def test_between_two_rises_units_are_replaced_and_dropped():
    schedule = SparsitySchedule.of([(0, 0.8), (20, 0.4), (40, 0.8), (80, 0.0)], 100, update_every=10)
    assert schedule.restoration_start == 80
    assert [step for step in range(100) if schedule.is_event(step)] == list(range(0, 90, 10))
    assert SparsitySchedule.of([(0, 0.8), (20, 0.4), (40, 0.8)], 100).restoration_start is None
    assert SparsitySchedule.of([(0, 0.8), (20, 0.4), (40, 0.4), (60, 0.0)], 100).restoration_start == 20


# Shares that are replaced


@given(schedules())
def test_the_share_falls_from_its_first_value_to_zero_along_a_cosine(schedule):
    end = schedule.restoration_start or schedule.num_steps
    shares = [schedule.drop_fraction_at(step) for step in range(schedule.num_steps + 1)]
    assert shares[0] == schedule.drop_fraction
    assert all(later <= earlier for earlier, later in pairwise(shares))
    assert not any(shares[end:])
    for step in range(end):
        assert shares[step] == pytest.approx(schedule.drop_fraction * math.cos(math.pi * step / end / 2) ** 2)


def test_shares_by_hand():
    schedule = default(drop_fraction=0.3)
    shares = [schedule.drop_fraction_at(step) for step in (0, 2_000, 4_000, 6_000, 8_000)]
    half = math.sqrt(0.5)
    assert shares == pytest.approx([0.3, 0.15 * (1 + half), 0.15, 0.15 * (1 - half), 0])
    assert shares[0] == 0.3 and shares[4] == 0


# Densities


def gpt2_small(with_head):
    shapes = {}
    for block in range(12):
        shapes |= {f"{block}.qkv": (2304, 768), f"{block}.out": (768, 768)}
        shapes |= {f"{block}.up": (3072, 768), f"{block}.down": (768, 3072)}
    return shapes | ({"head": (50304, 768)} if with_head else {})


@pytest.mark.parametrize(
    ("sparsity", "with_head", "expected"),
    [
        (0.80, True, {"qkv": 0.216, "out": 0.324, "up": 0.203, "down": 0.203, "head": 0.165, "body": 0.216}),
        (0.90, True, {"qkv": 0.108, "out": 0.162, "up": 0.101, "down": 0.101, "head": 0.082, "body": 0.108}),
        (0.95, True, {"qkv": 0.054, "out": 0.081, "up": 0.051, "down": 0.051, "head": 0.041, "body": 0.054}),
        (0.90, False, {"qkv": 0.100, "out": 0.150, "up": 0.094, "down": 0.094, "body": 0.100}),
    ],
)
def test_densities_of_gpt2_small(sparsity, with_head, expected):
    shapes = gpt2_small(with_head)
    density = densities(shapes, sparsity, "er")
    for block in range(12):
        assert {kind: round(density[f"{block}.{kind}"], 3) for kind in ("qkv", "out", "up", "down")} == {
            kind: expected[kind] for kind in ("qkv", "out", "up", "down")
        }
    if with_head:
        assert round(density["head"], 3) == expected["head"]
    body = {name: math.prod(shape) for name, shape in shapes.items() if name != "head"}
    on = sum(density[name] * size for name, size in body.items())
    assert round(on / sum(body.values()), 3) == expected["body"]


SHAPES = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.one_of(
        st.tuples(st.integers(1, 200), st.integers(1, 200)),
        st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=6,
)
DISTRIBUTIONS = st.sampled_from(["uniform", "er", "erk"])


@given(SHAPES, st.floats(0, 0.99), DISTRIBUTIONS, st.data())
def test_densities_are_shares_and_leave_the_wanted_number_on(shapes, sparsity, distribution, data):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    # Neurons switch entries of several matrices at once.
    switched = {name: size * data.draw(st.integers(1, 4)) for name, size in sizes.items()}
    for counted in (None, switched):
        density = densities(shapes, sparsity, distribution, counted)
        assert density.keys() == shapes.keys()
        assert all(0 < share <= 1 for share in density.values())
        on = sum(density[name] * size for name, size in (counted or sizes).items())
        assert on == pytest.approx((1 - sparsity) * sum((counted or sizes).values()))


@given(SHAPES, st.floats(0, 0.99))
def test_uniform_is_the_same_for_all(shapes, sparsity):
    assert set(densities(shapes, sparsity, "uniform").values()) == {1 - sparsity}


@given(SHAPES, st.floats(0.01, 0.99), st.sampled_from(["er", "erk"]))
def test_densities_are_in_proportion_to_their_rule_but_where_they_would_exceed_one(shapes, sparsity, distribution):
    density = densities(shapes, sparsity, distribution)
    used = {name: shape if distribution == "erk" else shape[:2] for name, shape in shapes.items()}
    rule = {name: sum(shape) / math.prod(shape) for name, shape in used.items()}
    assume(not all(share == 1 for share in density.values()))
    factor = next(share / rule[name] for name, share in density.items() if share < 1)
    for name, share in density.items():
        if share < 1:
            assert share == pytest.approx(factor * rule[name])
        else:
            assert factor * rule[name] >= 1 - 1e-9


@given(SHAPES, st.floats(0, 0.99))
def test_the_two_rules_agree_on_matrices(shapes, sparsity):
    matrices = {name: shape[:2] for name, shape in shapes.items()}
    assert densities(matrices, sparsity, "erk") == densities(matrices, sparsity, "er")


def test_and_differ_on_convolutions():
    shapes = {"convolution": (64, 64, 3, 3), "matrix": (256, 256)}
    er, erk = (densities(shapes, 0.9, rule) for rule in ("er", "erk"))
    # By hand: eps * 2/64 and eps * 2/256 of 36864 and 65536 entries are 10240.
    eps = 10_240 / (36_864 * 2 / 64 + 65_536 * 2 / 256)
    assert er == pytest.approx({"convolution": eps * 2 / 64, "matrix": eps * 2 / 256})
    # The kernel's sizes are among those that are added and multiplied.
    eps = 10_240 / (64 + 64 + 3 + 3 + 256 + 256)
    assert erk == pytest.approx({"convolution": eps * 134 / 36_864, "matrix": eps * 512 / 65_536})


def test_a_layer_that_would_exceed_one_is_dense_and_the_others_share_the_rest():
    shapes = {"narrow": (2, 100), "wide": (100, 100)}
    density = densities(shapes, 0.5, "er")
    assert density == pytest.approx({"narrow": 1.0, "wide": (5_100 - 200) / 10_000})
