"""The schedules of PLD, and the draws: laws, tables and statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_accel.methods.layer_dropping import keep_probabilities, sample_blocks, theta_at
from tests.forked import run_forked

CONVENTIONS = ["paper", "deepspeed", "timm"]
thetas = st.floats(0.05, 1.0)


@given(thetas, st.floats(1e-6, 1.0), st.integers(0, 10**6))
def test_theta_follows_the_closed_form(theta, gamma, step):
    present = theta_at(step, theta=theta, gamma=gamma)
    assert present == pytest.approx((1 - theta) * math.exp(-gamma * step) + theta, abs=1e-12)
    assert theta_at(0, theta=theta, gamma=gamma) == pytest.approx(1, abs=1e-15)
    assert theta <= theta_at(step + 1, theta=theta, gamma=gamma) <= present <= 1
    assert theta_at(math.ceil(20 / gamma) + 1, theta=theta, gamma=gamma) == pytest.approx(theta, abs=1e-6)


def test_the_ramp_of_the_papers_rate():
    """With gamma 0.001, 50, 90 and 99 % of the way are done after 693, 2303 and 4605 steps."""
    for share, steps in ((0.5, 693), (0.9, 2303), (0.99, 4605)):
        assert 1 - theta_at(steps, theta=0.5, gamma=1e-3) == pytest.approx(0.5 * share, abs=5e-4)


@given(thetas, st.integers(2, 1000), st.floats(0, 0.9))
def test_decreasing_begins_at_theta_and_ends_fully_active(theta, num_steps, tail):
    release = int(tail * num_steps)
    path = [
        theta_at(step, theta=theta, gamma=1.0, direction="decreasing", release=release, num_steps=num_steps)
        for step in range(num_steps + 1)
    ]
    assert path[0] == pytest.approx(theta)
    assert all(later >= earlier for earlier, later in itertools.pairwise(path))
    assert all(value == 1 for value in path[num_steps - release :])


@given(thetas, st.floats(-6, 0), st.integers(2, 1000), st.floats(0.01, 1))
def test_release_ends_at_one_without_a_jump(theta, log_gamma, num_steps, share):
    gamma, release = 10**log_gamma, max(1, int(share * num_steps))
    path = [theta_at(step, theta=theta, gamma=gamma, release=release, num_steps=num_steps) for step in range(num_steps)]
    assert path[-1] == 1
    assert all(theta <= value <= 1 for value in path)
    assert all(later - earlier <= (1 - theta) / release + 1e-12 for earlier, later in itertools.pairwise(path))
    # Nor down: where the approach is slow, the run is far above theta when the release begins.
    for step in range(num_steps - release, num_steps):
        assert path[step] >= theta_at(step, theta=theta, gamma=gamma)


@pytest.mark.parametrize(("convention", "kept"), [("paper", 8.75), ("deepspeed", 9.25), ("timm", 9.0)])
def test_expected_depth_of_twelve_blocks_at_theta_one_half(convention, kept):
    assert math.fsum(keep_probabilities(0.5, 12, convention)) == pytest.approx(kept, abs=1e-12)


@given(thetas, st.integers(2, 100))
def test_the_papers_depth_rule(theta, num_blocks):
    p = keep_probabilities(theta, num_blocks)
    assert p[0] == pytest.approx(1 - (1 - theta) / num_blocks)
    assert p[-1] == pytest.approx(theta)
    assert sum(p) / num_blocks == pytest.approx(1 - (1 - theta) * (num_blocks + 1) / (2 * num_blocks))


@given(thetas, st.integers(2, 100))
def test_what_is_never_dropped_is_so_exactly(theta, num_blocks):
    for convention in CONVENTIONS:
        assert keep_probabilities(1.0, num_blocks, convention) == [1.0] * num_blocks
    for convention in ("deepspeed", "timm"):
        assert keep_probabilities(theta, num_blocks, convention)[0] == 1
    assert keep_probabilities(theta, num_blocks, "timm")[-1] == pytest.approx(theta)


def test_the_mean_over_a_run_is_the_integral_of_the_paper():
    """The mean keep probability over T steps: 0.756 for T = 10 000 at gamma 0.001, 0.732 for gamma = 100 / T."""
    num_steps, num_blocks, theta = 10_000, 12, 0.5
    for gamma, expected in ((1e-3, 0.756), (100 / num_steps, 0.732)):
        mean = math.fsum(
            math.fsum(keep_probabilities(theta_at(t, theta=theta, gamma=gamma), num_blocks)) / num_blocks
            for t in range(num_steps)
        )
        assert mean / num_steps == pytest.approx(expected, abs=5e-4)


# Draws

probabilities = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=24)


def draws_of(p, sampler, num_steps, seed=0):
    expected, rows = 0.0, []
    for step in range(num_steps):
        rows.append(sample_blocks(p, seed=seed, step=step, sampler=sampler, num_expected=expected))
        expected += math.fsum(p)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("sampler", ["systematic", "bernoulli"])
@pytest.mark.parametrize("p", [keep_probabilities(0.5, 12), [0.5] * 8, [1.0, 0.9, 0.3, 0.55, 1.0, 0.77]])
def test_every_block_is_kept_as_often_as_it_should(sampler, p):
    num_steps = 20_000 if len(p) == 12 else 5_000
    kept = draws_of(p, sampler, num_steps)
    for block, probability in enumerate(p):
        tolerance = 6 * math.sqrt(probability * (1 - probability) / num_steps)
        assert abs(kept[:, block].mean().item() - probability) <= tolerance
    # Across seeds too: one step of many runs.
    of_runs = torch.tensor(
        [sample_blocks(p, seed=seed, step=7, sampler=sampler, num_expected=7 * math.fsum(p)) for seed in range(3_000)]
    ).double()
    for block, probability in enumerate(p):
        assert abs(of_runs[:, block].mean().item() - probability) <= 6 * math.sqrt(
            probability * (1 - probability) / 3_000
        )


def test_bernoulli_blocks_and_steps_are_independent():
    kept = draws_of([0.5, 0.6, 0.7, 0.8], "bernoulli", 20_000)
    blocks = torch.corrcoef(kept.T)
    assert (blocks - torch.eye(4)).abs().max() < 0.03
    for block in range(4):
        assert abs(torch.corrcoef(torch.stack([kept[1:, block], kept[:-1, block]]))[0, 1].item()) < 0.03


def test_systematic_neighbours_are_not_tied_to_each_other():
    kept = draws_of([0.5] * 8, "systematic", 20_000)
    correlation = torch.corrcoef(kept.T) - torch.eye(8)
    # As many are kept in every step, so that the mean correlation must be -1/7; no pair deviates from it.
    assert (correlation + (1 - torch.eye(8)) / 7).abs().max() < 0.03


@settings(max_examples=200)
@given(probabilities, st.integers(0, 2**31), st.integers(0, 10**6), st.floats(0, 1e6))
def test_systematic_keeps_the_rounded_sum_and_never_drops_what_is_certain(p, seed, step, before):
    kept = sample_blocks(p, seed=seed, step=step, num_expected=before)
    total = math.fsum(p)
    assert math.floor(total + 1e-9) <= sum(kept) <= math.ceil(total - 1e-9)
    assert all(keep for keep, probability in zip(kept, p, strict=True) if probability == 1)


@settings(max_examples=50)
@given(st.integers(0, 2**31), thetas, st.sampled_from(CONVENTIONS), st.integers(2, 24), st.integers(1, 200))
def test_systematic_keeps_what_was_planned_for_a_whole_run(seed, theta, convention, num_blocks, num_steps):
    """Exactly, whatever the schedule: to less than one block in one step, over the run."""
    planned, kept = 0.0, 0
    for step in range(num_steps):
        p = keep_probabilities(theta_at(step, theta=theta, gamma=10 / num_steps), num_blocks, convention)
        kept += sum(sample_blocks(p, seed=seed, step=step, num_expected=planned))
        planned += math.fsum(p)
    assert abs(kept - planned) < 1 + 1e-6


def draws():
    return [
        sample_blocks([0.5] * 12, seed=3, step=s, sampler=k) for s in range(40) for k in ("systematic", "bernoulli")
    ]


def print_draws():
    print(draws())


def test_a_draw_is_the_same_in_another_process(tmp_path):
    done = run_forked(tmp_path, print_draws)
    assert (done.returncode, done.stdout.strip()) == (0, str(draws()))


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="'systematic' and 'bernoulli'"):
        sample_blocks([0.5], seed=0, step=0, sampler="uniform")
