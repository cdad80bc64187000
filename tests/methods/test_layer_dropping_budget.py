import itertools
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_accel.methods.layer_dropping.budget import allocate, floor_of, noise, robust
from lit_accel.methods.layer_dropping.kept_schedule import kept_share
from lit_accel.methods.layer_dropping.protection import BlockList

ALLOCATIONS = ["sensitivity", "depth", "uniform"]
SKEWED = [2.3, 0.05, 0.04, 0.4, 0.06, 0.02, 0.03, 0.05, 0.01, 0.02, 0.1, 0.9]
SENSITIVITIES = st.one_of(st.just(0.0), st.floats(1e-300, 1e300), st.floats(1e-3, 10))
MEASURED = st.one_of(st.floats(), st.floats(1e-6, 1e3), st.just(0.0))
SHARES = st.floats(0, 1, exclude_min=True)


def share_of(keep, costs):
    return sum(c * p for c, p in zip(costs, keep, strict=True)) / sum(costs)


@st.composite
def problems(draw, sensitivity=SENSITIVITIES):
    num_blocks = draw(st.integers(1, 30))
    costs = draw(st.lists(st.floats(0.01, 100), min_size=num_blocks, max_size=num_blocks))
    sensitivities = draw(st.lists(sensitivity, min_size=num_blocks, max_size=num_blocks))
    always = draw(st.sets(st.integers(0, num_blocks - 1)))
    return costs, {"sensitivities": sensitivities, "min_keep": draw(st.floats(0.05, 1)), "always": always}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@given(problem=problems(), kept=SHARES)
def test_budget_is_met_within_the_bounds_or_the_floor_is_returned(problem, kept, allocation):
    costs, options = problem
    keep = allocate(kept, costs, allocation=allocation, **options)
    floor = floor_of(costs, options["min_keep"], options["always"])
    assert all(options["min_keep"] <= p <= 1 for p in keep)
    assert all(keep[index] == 1 for index in options["always"])
    assert share_of(keep, costs) == pytest.approx(max(kept, floor), abs=1e-6)
    if kept < floor:
        assert keep == [1.0 if index in options["always"] else options["min_keep"] for index in range(len(costs))]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@given(problem=problems())
def test_a_full_budget_drops_nothing(problem, allocation):
    costs, options = problem
    assert allocate(1.0, costs, allocation=allocation, **options) == [1.0] * len(costs)


@given(problems(), SHARES)
def test_keep_probability_rises_with_sensitivity_over_cost(problem, kept):
    costs, options = problem
    keep = allocate(kept, costs, **options)
    ratios = [s / c for s, c in zip(options["sensitivities"], costs, strict=True)]
    droppable = [index for index in range(len(costs)) if index not in options["always"]]
    by_ratio = sorted(droppable, key=lambda index: ratios[index])
    for lower, higher in itertools.pairwise(by_ratio):
        assert keep[lower] <= keep[higher] + 1e-9


@given(problems(st.floats(1e-6, 1e3)), SHARES, st.floats(1e-6, 1e6))
def test_only_ratios_of_sensitivities_and_of_costs_matter(problem, kept, scale):
    costs, options = problem
    keep = allocate(kept, costs, **options)
    scaled = options | {"sensitivities": [scale * s for s in options["sensitivities"]]}
    assert allocate(kept, costs, **scaled) == pytest.approx(keep, abs=1e-9)
    assert allocate(kept, [scale * c for c in costs], **options) == pytest.approx(keep, abs=1e-9)


@given(problems(), SHARES, st.floats(1e-3, 1e3), st.sampled_from([0.0, 1e-300, 1e-9, 1.0]))
def test_equal_blocks_are_kept_alike(problem, kept, cost, sensitivity):
    costs, options = problem
    costs = [cost] * len(costs)
    options["sensitivities"] = [sensitivity] * len(costs)
    uniform = allocate(kept, costs, allocation="uniform", **options)
    assert allocate(kept, costs, **options) == pytest.approx(uniform, abs=1e-9)


@given(problems(), SHARES)
def test_without_any_sensitivity_the_allocation_is_uniform_whatever_the_costs(problem, kept):
    costs, options = problem
    options["sensitivities"] = [0.0] * len(costs)
    uniform = allocate(kept, costs, allocation="uniform", **options)
    assert allocate(kept, costs, **options) == pytest.approx(uniform, abs=1e-9)


@given(problems(st.floats(1e-3, 1e3)), SHARES, st.integers(0, 2**32))
def test_no_exchange_between_two_blocks_lowers_the_noise(problem, kept, seed):
    costs, options = problem
    sensitivities, always = options["sensitivities"], options["always"]
    keep = allocate(kept, costs, **options)
    best = noise(sensitivities, keep)
    droppable = [index for index in range(len(costs)) if index not in always]
    generator = random.Random(seed)
    for _ in range(100 if len(droppable) > 1 else 0):
        more, less = generator.sample(droppable, 2)
        amount = generator.uniform(0, 1) ** 4 * min(
            (1 - keep[more]) * costs[more], (keep[less] - options["min_keep"]) * costs[less]
        )
        other = list(keep)
        other[more] += amount / costs[more]
        other[less] -= amount / costs[less]
        assert noise(sensitivities, other) >= best - 1e-9 * sum(sensitivities)


@given(problems(st.floats(1e-3, 1e3)), SHARES)
def test_allocation_by_sensitivity_has_the_least_noise(problem, kept):
    costs, options = problem
    noises = {
        allocation: noise(options["sensitivities"], allocate(kept, costs, allocation=allocation, **options))
        for allocation in ALLOCATIONS
    }
    assert noises["sensitivity"] <= min(noises.values()) + 1e-9 * sum(options["sensitivities"])


def test_skewed_sensitivities_make_the_allocation_worth_it():
    by_sensitivity, by_depth, uniform = (
        noise(SKEWED, allocate(0.75, [1.0] * 12, sensitivities=SKEWED, min_keep=0.4, allocation=allocation))
        for allocation in ALLOCATIONS
    )
    assert by_sensitivity < 0.4 * min(by_depth, uniform)


def test_allocation_by_sensitivity_by_hand():
    # sqrt(s / c) is 2, 1, 0.1; the first is clipped to 1, the last to 0.4, the budget of 2 leaves 0.6.
    keep = allocate(2 / 3, [1.0, 1.0, 1.0], sensitivities=[4.0, 1.0, 0.01], min_keep=0.4)
    assert keep == pytest.approx([1.0, 0.6, 0.4], abs=1e-12)


def test_blocks_without_sensitivity_take_what_the_others_cannot():
    keep = allocate(0.8, [1.0, 1.0, 1.0, 2.0], sensitivities=[1.0, 1.0, 0.0, 0.0], min_keep=0.4)
    assert keep == pytest.approx([1.0, 1.0, 2 / 3, 2 / 3], abs=1e-9)


def test_allocation_by_depth_is_progressive_layer_dropping():
    theta, num_blocks = 0.5, 12
    progressive = [1 - (1 - theta) * i / num_blocks for i in range(1, num_blocks + 1)]
    keep = allocate(8.75 / 12, [1.0] * num_blocks, min_keep=0.4, allocation="depth")
    assert keep == pytest.approx(progressive, abs=1e-12)


@given(problems(), SHARES)
def test_allocation_by_depth_only_falls(problem, kept):
    costs, options = problem
    keep = allocate(kept, costs, allocation="depth", **options)
    droppable = [p for index, p in enumerate(keep) if index not in options["always"]]
    assert droppable == sorted(droppable, reverse=True)


def test_floor_by_hand():
    assert floor_of([2.0, 1.0, 1.0], 0.5, {0}) == 0.75
    assert floor_of([0.1, 0.2, 0.3], 0.43) == 0.43
    assert floor_of([0.1, 0.2], 0.43, {0, 1}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"costs": []}, "costs is empty"),
        ({"costs": [1.0, 0.0]}, "Block 1 costs 0.0"),
        ({"costs": [math.nan, 1.0]}, "Block 0 costs nan"),
        ({"costs": [1.0, math.inf]}, "Block 1 costs inf"),
        ({"kept": 0.0}, "kept is 0.0"),
        ({"kept": 1.1}, r"\(0, 1\]"),
        ({"kept": math.nan}, "kept is nan"),
        ({"min_keep": 0.0}, "min_keep is 0.0"),
        ({"min_keep": 1.5}, "min_keep is 1.5"),
        ({"always": {1, 2, -1}}, r"\[-1, 2\]; there are 2, 0 to 1"),
        ({"sensitivities": [1.0]}, "1 sensitivities for 2 costs"),
        ({"sensitivities": None}, "Measure them"),
        ({"sensitivities": [1.0, -1.0]}, "block 1 is -1.0"),
        ({"sensitivities": [math.nan, 1.0]}, "robust"),
        ({"sensitivities": [math.inf, 1.0]}, "block 0 is inf"),
        ({"allocation": "depths"}, "'depths'"),
    ],
)
def test_impossible_budgets_are_refused(change, message):
    options = {"kept": 0.8, "costs": [1.0, 1.0], "sensitivities": [1.0, 2.0], "min_keep": 0.4} | change
    with pytest.raises(ValueError, match=message):
        allocate(options.pop("kept"), options.pop("costs"), **options)


@given(st.lists(MEASURED, min_size=1, max_size=30), SHARES)
def test_any_measurement_becomes_an_allocation(measured, kept):
    sensitivities = robust(measured)
    if sensitivities is None:
        assert not any(math.isfinite(s) and s > 0 for s in measured)
    else:
        assert len(sensitivities) == len(measured)
        keep = allocate(kept, [1.0] * len(measured), sensitivities=sensitivities, min_keep=0.4)
        assert share_of(keep, [1.0] * len(measured)) == pytest.approx(max(kept, 0.4), abs=1e-6)


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e3)), min_size=1, max_size=30), st.integers(-30, 30))
def test_scale_of_a_measurement_does_not_matter(measured, exponent):
    # Powers of two scale without rounding, which could move a value across the limit of 20 medians.
    assert robust([s * 2.0**exponent for s in measured]) == robust(measured)


@given(st.lists(st.floats(-1, 1e3), min_size=1, max_size=30))
def test_order_of_a_measurement_stays_and_its_skew_is_limited(measured):
    sensitivities = robust(measured)
    if sensitivities is not None:
        pairs = sorted(zip(measured, sensitivities, strict=True))
        assert [s for _, s in pairs] == sorted(sensitivities)
        assert min(sensitivities) > 0
        assert max(sensitivities) == 1


def test_robust_by_hand():
    assert robust([1.0, 2.0, 4.0]) == [0.25, 0.5, 1.0]
    assert robust([1.0, math.nan, math.inf, -math.inf, -3.0]) == [1.0, 0.01, 0.01, 0.01, 0.01]
    assert robust([400.0, 1.0, 4.0, 1.0]) == pytest.approx([1.0, 0.05, 0.1, 0.05])
    # The median of the positive values: the many zeros do not make everything else an outlier.
    assert robust([0.0, 0.0, 0.0, 0.0, 2.0, 4.0]) == pytest.approx([0.0075] * 4 + [0.5, 1.0])
    assert robust([1e308, 1e308, 1e-308]) == pytest.approx([1.0, 1.0, 0.01])
    assert robust([0.0, 0.0, -1.0]) is None


def test_noise_by_hand():
    assert noise([1.0, 2.0, 3.0], [1.0, 0.5, 0.25]) == 11
    with pytest.raises(ValueError, match="shorter"):
        noise([1.0, 2.0], [1.0])


def sensitivities_with(num_blocks, *sensitive):
    return [2.0 if index in sensitive else 1.0 for index in range(num_blocks)]


def test_first_last_and_pinned_blocks_are_members_before_any_measurement():
    assert BlockList(8, units=range(8), share=0.5).members == {0, 7}
    assert BlockList(8, units=[3, 4, 5], share=0.5, pinned=[4, 7]).members == {3, 4, 5, 7}


def test_most_sensitive_blocks_enter_at_once_and_leave_after_two_updates_below():
    protected = BlockList(10, units=range(10), share=0.1)
    assert protected.update(sensitivities_with(10, 3)) == {0, 9, 3}
    assert protected.update(sensitivities_with(10, 5)) == {0, 9, 3, 5}
    assert protected.update(sensitivities_with(10, 3)) == {0, 9, 3, 5}
    assert protected.update(sensitivities_with(10, 3)) == {0, 9, 3}
    assert protected.update(sensitivities_with(10, 0)) == {0, 9, 3}
    assert protected.update(sensitivities_with(10, 0)) == {0, 9} == protected.members


@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(st.integers(0, n - 1), min_size=1, unique=True),
            st.sets(st.integers(0, n - 1)),
            st.lists(st.lists(st.floats(0, 10), min_size=n, max_size=n), min_size=1, max_size=5),
        )
    ),
    st.floats(0, 1, exclude_max=True),
    st.data(),
)
def test_members_and_the_state_round_trip(case, share, data):
    num_blocks, units, pinned, measurements = case
    protected = BlockList(num_blocks, units=units, share=share, pinned=pinned)
    num_seen = data.draw(st.integers(0, len(measurements)))
    for sensitivities in measurements[:num_seen]:
        protected.update(sensitivities)
    resumed = BlockList(num_blocks, units=units, share=share, pinned=pinned)
    resumed.load_state_dict(json.loads(json.dumps(protected.state_dict())))
    assert resumed.members == protected.members
    permanent = {min(units), max(units)} | pinned
    for sensitivities in measurements[num_seen:]:
        members = protected.update(sensitivities)
        assert resumed.update(sensitivities) == members == protected.members
        assert permanent <= members <= set(units) | pinned
        droppable = [sensitivities[unit] for unit in set(units) - members]
        num_sensitive = sum(s >= max(droppable, default=0.0) for s in (sensitivities[unit] for unit in units))
        assert num_sensitive >= math.ceil(share * len(units) - 1e-9)


def test_equal_sensitivities_protect_the_earlier_blocks():
    assert BlockList(20, units=range(20), share=0.15).update([1.0] * 20) == {0, 1, 2, 19}


def test_rounding_errors_do_not_protect_another_block():
    assert 0.28 * 25 > 7
    assert BlockList(25, units=range(25), share=0.28).update([1.0] * 25) == {*range(7), 24}


def test_state_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="for 6 blocks, this model has 8"):
        BlockList(8, units=range(8), share=0.1).load_state_dict(BlockList(6, units=range(6), share=0.1).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 1.0}, "share is 1.0"),
        ({"share": -0.1}, "share is -0.1"),
        ({"units": []}, "units is empty"),
        ({"units": [0, 4]}, r"units names the blocks \[4\]; there are 4, 0 to 3"),
        ({"pinned": [-1]}, r"pinned names the blocks \[-1\]"),
    ],
)
def test_impossible_block_lists_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BlockList(4, **({"units": range(4), "share": 0.15} | change))


def test_measurements_without_a_rank_are_refused():
    protected = BlockList(4, units=[0, 1, 3], share=0.5)
    with pytest.raises(ValueError, match=r"blocks \[1\] is NaN"):
        protected.update([1.0, math.nan, math.nan, 1.0])
    with pytest.raises(ValueError, match="3 sensitivities for 4 blocks"):
        protected.update([1.0, 1.0, 1.0])
    assert protected.update([1.0, 2.0, math.nan, 3.0]) == {0, 1, 3}


@st.composite
def schedules(draw):
    warmup, ramp, hold, release = (draw(st.integers(0, 10**6)) for _ in range(4))
    num_steps = max(warmup + ramp + hold + release, 1)
    return {"num_steps": num_steps, "kept": draw(SHARES), "warmup": warmup, "ramp": ramp, "release": release}


@given(schedules(), st.integers(0, 5 * 10**6))
def test_share_lies_between_kept_and_one(schedule, step):
    assert schedule["kept"] <= kept_share(step, **schedule) <= 1


@given(schedules(), st.data())
def test_everything_is_kept_at_both_ends(schedule, data):
    if schedule["warmup"]:
        assert kept_share(data.draw(st.integers(0, schedule["warmup"] - 1)), **schedule) == 1
    if schedule["release"]:
        assert kept_share(schedule["num_steps"] - 1 + data.draw(st.integers(0, 100)), **schedule) == 1


@given(schedules(), st.data())
def test_release_is_the_larger_of_the_rest_of_the_ramp_and_a_line_to_one(schedule, data):
    num_steps, release, kept = schedule["num_steps"], schedule["release"], schedule["kept"]
    step = data.draw(st.integers(0, num_steps - 1))
    without, after = (kept_share(s, **(schedule | {"release": 0})) for s in (step, step + 1))
    assert after <= without
    # The step before the release is the last one on the floor of the line, the last of the run is at its top.
    line = kept + (1 - kept) * max(step - (num_steps - 1 - release), 0) / max(release, 1)
    assert kept_share(step, **schedule) == pytest.approx(max(without, line), abs=1e-12)


@given(schedules().filter(lambda schedule: schedule["ramp"] and schedule["release"]), st.data())
def test_share_has_no_jumps(schedule, data):
    step = data.draw(st.integers(0, schedule["num_steps"]))
    steepest = max(math.log(100) / schedule["ramp"], 1 / schedule["release"])
    change = kept_share(step + 1, **schedule) - kept_share(step, **schedule)
    assert abs(change) <= (1 - schedule["kept"]) * steepest + 1e-12


@given(schedules().filter(lambda schedule: schedule["ramp"]))
def test_the_ramp_goes_99_percent_of_the_way(schedule):
    schedule["release"] = 0
    kept = schedule["kept"]
    after_ramp = kept_share(schedule["warmup"] + schedule["ramp"], **schedule)
    assert after_ramp == pytest.approx(kept + 0.01 * (1 - kept), abs=1e-12)
    assert kept_share(schedule["warmup"], **schedule) == pytest.approx(1)


@given(schedules())
def test_without_ramp_and_release_the_share_is_held_to_the_end(schedule):
    schedule |= {"ramp": 0, "release": 0}
    assert kept_share(schedule["warmup"], **schedule) == schedule["kept"]
    assert kept_share(schedule["num_steps"] + 10, **schedule) == schedule["kept"]


def test_schedule_by_hand():
    shares_by_hand = [kept_share(step, 8, kept=0.5, warmup=2, ramp=1, release=2) for step in range(9)]
    assert shares_by_hand == pytest.approx([1, 1, 1, 0.505, 0.50005, 0.5000005, 0.75, 1, 1], abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": 0.0}, "kept is 0.0"),
        ({"kept": 1.5}, r"\(0, 1\]"),
        ({"ramp": -1}, "none may be negative"),
        ({"warmup": 60}, r"60 \+ 20 \+ 30 optimizer steps, the run has 100"),
    ],
)
def test_impossible_schedules_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kept_share(0, 100, **({"kept": 0.8, "warmup": 10, "ramp": 20, "release": 30} | change))
