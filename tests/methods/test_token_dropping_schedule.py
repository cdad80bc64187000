"""How many tokens are kept, and what that comes to over a run: the published counts, and laws of the exact form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_accel.anatomy import anatomy_of
from lit_accel.compute import training_flops
from lit_accel.methods.token_dropping import TokenPlan, TokenSchedule, kept_by_block, layer_tokens
from tests.models import make_model

# DeepSpeed's formula, against the counters that its authors have published.


def test_the_counter_of_the_vit_example():
    schedule = TokenSchedule(32, 3910, compat="deepspeed")
    kept = [schedule.kept_tokens(step, 197) for step in range(5474)]
    assert sum(32 * (2 * 197 + 10 * k) for k in kept) == 305_784_192
    assert (kept[3910], kept[3981], kept[3982]) == (192, 192, 197)
    assert len(set(kept)) == 22
    assert sum(2 * 197 + 10 * k for k in kept) / (5474 * 12 * 197) == pytest.approx(0.738436, abs=5e-7)


def of_the_scripts(kept: int, length: int, num_blocks: int) -> int:
    """What Megatron's and the GPT-2 script count a sequence as."""
    return (2 * length + (num_blocks - 2) * kept) // num_blocks if kept < length else length


@pytest.mark.parametrize(
    ("num_blocks", "micro_steps", "steps", "tokens"), [(12, 1344, 672, 2_148_032), (24, 1373, 686, 2_147_024)]
)
def test_the_counters_of_the_gpt2_tutorials(num_blocks, micro_steps, steps, tokens):
    schedule = TokenSchedule(128, 400, compat="deepspeed")
    consumed = micro_step = 0
    while consumed < 2_146_304:
        kept = schedule.kept_tokens(micro_step // 2, 1024)
        consumed += 2 * of_the_scripts(kept, 1024, num_blocks)
        micro_step += 1
    assert (micro_step, micro_step // 2, consumed) == (micro_steps, steps, tokens)


@pytest.mark.parametrize(
    ("growth", "budget", "num_steps"),
    [(200_000, 300, 372_789), (133_333, 200, 248_526), (100_000, 150, 186_395)],
)
def test_the_lengths_of_the_gpt3_runs(growth, budget, num_steps):
    schedule = TokenSchedule(128, growth, 16, compat="deepspeed")
    while_growing = sum(512 * of_the_scripts(schedule.kept_tokens(step, 2048), 2048, 24) for step in range(growth))
    assert schedule.kept_tokens(growth, 2048) == 2048
    assert growth + math.ceil((budget * 10**9 - while_growing) / (512 * 2048)) == num_steps


# The exact form.


def reference(schedule: TokenSchedule, step: int, num_tokens: int) -> int:
    """The specification's formula in fractions."""
    if step >= schedule.growth_steps:
        return num_tokens
    start = schedule.start
    start = min(num_tokens, max(1, round(start * num_tokens) if isinstance(start, float) else start))
    grown = start + Fraction((num_tokens - start) * step, schedule.growth_steps)
    at_least = math.ceil(Fraction(start, schedule.quantum)) * schedule.quantum
    return min(num_tokens, max(at_least, schedule.quantum * math.floor(grown / schedule.quantum)))


STARTS = st.integers(1, 600) | st.floats(0.001, 1)
LENGTHS = st.integers(1, 600)


NO_LIMIT = st.none()


@st.composite
def schedules(draw: Callable, max_lengths: st.SearchStrategy = NO_LIMIT) -> TokenSchedule:
    return TokenSchedule(draw(STARTS), draw(st.integers(1, 80)), draw(st.integers(1, 64)), draw(max_lengths))


@given(schedules(), LENGTHS)
def test_the_exact_form_is_that_of_the_specification(schedule, num_tokens):
    for step in range(schedule.growth_steps + 2):
        assert schedule.kept_tokens(step, num_tokens) == reference(schedule, step, num_tokens)


def test_shares_of_long_runs_are_exact():
    """Where step / growth_steps as a float falls below what it is."""
    schedule = TokenSchedule(1, 10**6, 1)
    for kept in range(1, 1002):
        step = math.ceil(Fraction((kept - 1) * 10**6, 1000))
        assert schedule.kept_tokens(step, 1001) == kept


@given(schedules(NO_LIMIT | st.integers(2, 12)), LENGTHS)
def test_laws(schedule, num_tokens):
    kept = [schedule.kept_tokens(step, num_tokens) for step in range(schedule.growth_steps + 3)]
    start = round(schedule.start * num_tokens) if isinstance(schedule.start, float) else schedule.start
    assert all(later >= earlier for earlier, later in itertools.pairwise(kept))
    assert all(k % schedule.quantum == 0 for k in kept if k != num_tokens)
    assert all(min(start, num_tokens) <= k <= num_tokens and k >= 1 for k in kept)
    assert kept[schedule.growth_steps :] == [num_tokens] * 3


@given(schedules(st.integers(2, 12)), LENGTHS)
def test_max_lengths_is_a_bound_that_starts_as_low(schedule, num_tokens):
    lengths = sorted({schedule.kept_tokens(step, num_tokens) for step in range(schedule.growth_steps + 1)})
    assert len(lengths) <= schedule.max_lengths
    free = TokenSchedule(schedule.start, schedule.growth_steps, schedule.quantum)
    assert lengths[0] == free.kept_tokens(0, num_tokens)
    # A coarser quantum lags behind, never ahead.
    for step in range(schedule.growth_steps):
        assert schedule.kept_tokens(step, num_tokens) <= free.kept_tokens(step, num_tokens)


def test_max_lengths_uses_what_it_may():
    schedule = TokenSchedule(128, 10_000, 8, max_lengths=8)
    assert sorted({schedule.kept_tokens(step, 1024) for step in range(10_001)}) == [128 * n for n in range(1, 9)]


@pytest.mark.parametrize(("share", "number", "length"), [(0.25, 256, 1024), (0.5, 49, 98), (0.335, 66, 197)])
def test_a_share_is_the_number_that_it_comes_to(share, number, length):
    of_share, of_number = TokenSchedule(share, 77), TokenSchedule(number, 77)
    for step in range(80):
        assert of_share.kept_tokens(step, length) == of_number.kept_tokens(step, length)
    # A share is one of whatever length comes.
    assert of_share.kept_tokens(0, 10 * length) == math.ceil(round(share * 10 * length) / 8) * 8


def test_the_quantum_never_empties_a_block():
    """Rounded down, 8 of a quantum of 16 are none; of DeepSpeed's schedule the last quantum comes late."""
    assert TokenSchedule(8, 100, 16).kept_tokens(0, 64) == 16
    assert TokenSchedule(32, 3910).kept_tokens(3910, 197) == 197
    assert TokenSchedule(4, 100, 16).kept_tokens(0, 12) == 12


def test_the_whole_sequence_from_the_start():
    assert TokenSchedule(8, 0, compat="deepspeed").kept_tokens(0, 31) == 31
    schedule = TokenSchedule(1.0, 0)
    assert [schedule.kept_tokens(step, 31) for step in range(3)] == [31] * 3
    assert [schedule.kept_windows(step, 4) for step in range(3)] == [4] * 3


# Windows


@given(st.floats(0.01, 1), st.integers(20, 200), st.integers(1, 16))
def test_windows_are_kept_in_the_wanted_share_on_average(start, steps_each, num_windows):
    growth = steps_each * num_windows
    schedule = TokenSchedule(start, growth)
    kept = [schedule.kept_windows(step, num_windows) for step in range(growth + 2)]
    assert all(1 <= k <= num_windows for k in kept)
    assert kept[growth:] == [num_windows] * 2
    wanted = [(start + (1 - start) * step / growth) * num_windows for step in range(growth)]
    assert all(abs(k - max(1, w)) < 1 + 1e-9 for k, w in zip(kept, wanted, strict=False))
    if start * num_windows >= 1:
        too_many = itertools.accumulate(k - w for k, w in zip(kept, wanted, strict=False))
        assert all(-1 - 1e-6 < number <= 1e-6 for number in too_many)
    # Where less than one window is wanted, there is one all the same.
    late = [k - w for k, w in zip(kept, wanted, strict=False) if w >= 1]
    # Rounding down would be off by half a window a step. Some growths fall into step with ours, by a sixth at most.
    assert abs(sum(late)) <= 5 + len(late) / 6


def test_windows_of_a_constant_share():
    schedule = TokenSchedule(0.3, 10**9)
    for num_steps in (10, 100, 1000):
        mean = sum(schedule.kept_windows(step, 4) for step in range(num_steps)) / num_steps
        assert mean == pytest.approx(1.2, abs=2 / num_steps)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0}, r"start_tokens is 0; .*at least 1.*\(0, 1\]"),
        ({"start": 0.0}, r"start_tokens is 0\.0"),
        ({"start": -3}, "start_tokens is -3"),
        ({"start": 1.5}, r"start_tokens is 1\.5"),
        ({"start": float("nan")}, "start_tokens is nan"),
        ({"quantum": 0}, "quantum is 0; .*at least 1"),
        ({"max_lengths": 1}, "max_lengths is 1; .*at least 2"),
        ({"compat": "megatron"}, "compat is 'megatron'; allowed are None and 'deepspeed'"),
        ({"compat": "deepspeed", "start": 0.5}, "start_tokens is a number of tokens"),
        ({"compat": "deepspeed", "max_lengths": 4}, "no max_lengths"),
        ({"compat": "deepspeed", "start": 8, "quantum": 16}, r"rounds start_tokens 8 down.*16.*Raise start_tokens"),
    ],
)
def test_values_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenSchedule(**{"start": 32, "growth_steps": 10, **options})


# Whole runs

GPT = {"heads": 2, "head_dim": 8, "ffn": 32}


def plan(name="gpt2-tied", start=0.25, growth=15, steps=21, *, length=24, quantum=4, pinned=(0, -1), **options):
    anatomy = anatomy_of(make_model(name, dtype=torch.float32, blocks=6, **GPT))
    num_blocks = len(anatomy.blocks)
    blocks = tuple(index for index in range(num_blocks) if index not in {p % num_blocks for p in pinned})
    length = anatomy.num_tokens or length
    return TokenPlan(anatomy, blocks, TokenSchedule(start, growth, quantum), steps, length, **options)


def kept_of(plan: TokenPlan, index: int, step: int) -> tuple[int, int, int]:
    """Return the tokens of a block, those that it can attend to with their padding, and those that are kept."""
    if plan.anatomy.family != "swin_v2":
        kept = max(plan.schedule.kept_tokens(step, plan.num_tokens), plan.num_prefix)
        return plan.num_tokens, plan.num_tokens, kept
    # Windows of 2 x 2: nine in the grid of 6 x 6; four in that of 3 x 3, padded to 4 x 4.
    tokens, windows = (36, 9) if index < 2 else (9, 4)
    return tokens, 4 * windows, 4 * plan.schedule.kept_windows(step, windows)


PLANS = {
    "gpt2": {},
    "gpt2-number": {"start": 9},
    "gpt2-all": {"pinned": ()},
    "gpt2-short": {"steps": 10},
    "llama-gqa": {"name": "llama-gqa"},
    "mistral": {"name": "mistral"},
    "bert": {"name": "bert-mlm"},
    "vit-prefix": {"name": "vit-registers", "start": 1, "quantum": 1, "num_prefix": 3},
    "swin": {"name": "swin-padded"},
}


@pytest.mark.parametrize("name", sorted(PLANS))
def test_a_plan_is_the_sum_over_its_steps(name):
    made = plan(**PLANS[name])
    spent, counted, dense = 0, [0], 0
    for step in range(made.num_steps):
        kept, tokens = {}, 0
        for index in range(len(made.anatomy.blocks)):
            all_, attending, some = kept_of(made, index, step)
            dense += all_ if step == 0 else 0
            tokens += some if index in made.blocks and some < all_ else all_
            if index in made.blocks and some < all_:
                kept[index] = some
        assert kept_by_block(made.anatomy, made.blocks, made.schedule, step, made.num_tokens, made.num_prefix) == kept
        assert layer_tokens(made.anatomy, 3, made.num_tokens, kept) == 3 * tokens
        counted.append(counted[-1] + tokens)
        spent += training_flops(made.anatomy, 1, made.num_tokens, kept=kept).total
    assert made.progress() == [total / dense for total in counted]
    full = training_flops(made.anatomy, 1, made.num_tokens).total
    assert made.saved_flops() == 1 - spent / (full * made.num_steps)


@pytest.mark.parametrize("name", ["gpt2-tied", "swin-padded"])
def test_without_dropping_progress_is_the_steps(name):
    made = plan(name, start=1.0, steps=1000)
    assert made.progress() == list(range(1001))
    assert made.saved_flops() == 0


@pytest.mark.parametrize("name", ["gpt2-tied", "vit", "swin", "swin-padded"])
def test_no_step_gets_further_than_a_dense_one(name):
    """Also where windows are padded: nine tokens of a dense block are in four windows of four."""
    reached = plan(name, steps=40, growth=30).progress()
    assert all(later - earlier <= 1 + 1e-12 for earlier, later in itertools.pairwise(reached))


@given(st.floats(0.01, 0.9), st.floats(0.2, 1), st.integers(500, 2000))
def test_the_mean_of_the_schedule_in_closed_form(start, share, num_steps):
    """Saving (l / L) f (1 - r0 / S) / 2 of the layer tokens; rounding moves it by a quantum and by a step."""
    growth, length = round(share * num_steps), 512
    schedule = TokenSchedule(start, growth, 1)
    mean = sum(schedule.kept_tokens(step, length) for step in range(num_steps)) / (num_steps * length)
    assert mean == pytest.approx(1 - growth / num_steps * (1 - start) / 2, abs=1 / length + 1 / num_steps)


@pytest.mark.parametrize("kept", [16, 64, 128, 192])
def test_what_a_block_costs_on_a_part_of_its_tokens(kept):
    """The specification's r(kappa) = kappa (6H + kappa S) / (6H + S), for a feed-forward of 4H and full attention."""
    anatomy = anatomy_of(make_model("vit-pooled", dtype=torch.float32, heads=4, head_dim=4, ffn=64, blocks=2))
    dense = training_flops(anatomy, 1, 256).blocks[1]
    partial = training_flops(anatomy, 1, 256, kept={1: kept}).blocks[1]
    assert partial / dense == pytest.approx(kept / 256 * (6 * 16 + kept) / (6 * 16 + 256), rel=1e-3)
