"""What is planted in a log is what the study finds in it."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from scripts.bench.analysis import Evidence, holm, read_study
from scripts.bench.log import append, read_log
from scripts.bench.study import GPT, NULL_SEEDS
from scripts.bench.verdicts import verdict
from tests.bench.planted import DEVIATION, EXCESS, FLOOR, POWER, SHARES, planted_log

# What a unit of an arm's compute is worth in dense compute; 1 for all others.
WORTH = {"vcycle": 1.8, "pld-paper": 0.8, "mst-units": 0.5, "ltd": 1.3, "smaller-6": 1.6, "smaller-7": 1.6}


@pytest.fixture(scope="module")
def rows():
    return planted_log(WORTH)


@pytest.fixture(scope="module")
def evidence(rows):
    return read_study(rows, num_draws=1000)["gpt"]


@pytest.mark.parametrize("budget", GPT.budgets)
@pytest.mark.parametrize(("arm", "worth"), [("vcycle", 1.8), ("ltd", 1.3), ("pld-paper", 0.8), ("sbld", 1.0)])
def test_a_planted_saving_is_found_within_its_interval(evidence, arm, worth, budget):
    (reading,) = [each for each in evidence.of(arm) if each.budget == budget]
    saving = reading.in_flops
    # One in twenty intervals misses what it is for: here by no more than half of its reach.
    reach = (saving.high - saving.low) / 2
    assert abs(saving.median - (1 - 1 / worth)) < 1.5 * reach
    assert reach < 0.075
    assert saving.share == pytest.approx(1 - 1 / worth, abs=0.06)
    assert reading.flops_share == pytest.approx(SHARES.get(arm, 0.8))


def test_the_null_method_saves_nothing_and_half_the_rate_is_detected(evidence):
    for reading in evidence.of("null"):
        assert reading.in_flops.low <= 0 <= reading.in_flops.high
    for reading in evidence.of("half-lr"):
        assert reading.in_flops.high < 0


def test_seconds_are_a_column_of_their_own(evidence):
    (reading, *_) = evidence.of("mst-entries")
    assert reading.seconds_share[0] == pytest.approx(1.1)
    assert reading.in_flops.share == pytest.approx(0, abs=0.04)
    assert reading.in_seconds.high < -0.2
    assert reading.realised_share[0] == pytest.approx(np.log(1.1) / np.log(0.8))


def test_verdicts_need_both_controls(evidence):
    words = {arm.name: verdict(evidence, arm)[0] for arm in evidence.study.others if arm.role == "method"}
    assert words["vcycle"] == "helps"
    assert words["pld-paper"] == "does not help"
    assert words["mst-units"] == "does not help"
    # It saves a fifth against the frontier and beats B1, but a smaller model of its cost is better still.
    assert words["ltd"] == "does not help"
    assert all(reading.in_flops.low > 0 and reading.b1.high < 0 < reading.b2.low for reading in evidence.of("ltd"))


def test_a_method_that_saves_no_seconds_helps_in_flops_only():
    rows = planted_log({"mst-entries": 1.25})
    evidence = read_study(rows, num_draws=1000)["gpt"]
    (arm,) = [arm for arm in evidence.study.others if arm.name == "mst-entries"]
    assert verdict(evidence, arm)[0] == "helps in FLOPs only"


def test_no_verdict_holds_where_the_null_method_is_told_from_nothing():
    evidence = read_study(planted_log({**WORTH, "null": 0.8}), num_draws=1000)["gpt"]
    (arm,) = [arm for arm in evidence.study.others if arm.name == "vcycle"]
    word, why = verdict(evidence, arm)
    assert word == "undecided"
    assert "null method" in why


def test_no_verdict_holds_where_half_the_learning_rate_is_not_seen():
    evidence = read_study(planted_log({**WORTH, "half-lr": 1.5}), num_draws=1000)["gpt"]
    (arm,) = [arm for arm in evidence.study.others if arm.name == "vcycle"]
    word, why = verdict(evidence, arm)
    assert word == "undecided"
    assert "half the learning rate was not seen" in why


def test_a_method_does_not_help_where_a_cheaper_dense_model_ends_as_low():
    """It beats the neighbours in depth, between which B2 lies; a much smaller model is better still."""
    evidence = read_study(planted_log({"vcycle": 1.4, "smaller-2": 4.0}), num_draws=1000)["gpt"]
    (arm,) = [arm for arm in evidence.study.others if arm.name == "vcycle"]
    for reading in evidence.of("vcycle"):
        assert reading.b2.high < 0
        assert evidence.better_model(reading).arm.name == "smaller-2"
        assert evidence.better_model(reading, "seconds").arm.name == "smaller-2"
    word, why = verdict(evidence, arm)
    assert word == "undecided"
    assert "dense, 2 blocks cost less and end no higher" in why


def test_a_smaller_model_that_saves_more_does_better_though_it_ends_higher():
    """It costs far less."""
    evidence = Evidence(GPT, planted_log({**WORTH, "smaller-2": 3.0}), 100)
    for reading in evidence.of("vcycle"):
        model = evidence.better_model(reading)
        assert (model.arm.name, model.budget) == ("smaller-2", reading.budget)
        assert model.loss[0] > reading.loss[0]
    (arm,) = [arm for arm in evidence.study.others if arm.name == "vcycle"]
    assert "dense, 2 blocks save more" in verdict(evidence, arm)[1]


def test_a_unit_of_seconds_that_changes_from_cell_to_cell_widens_what_is_said_of_seconds(rows, evidence):
    """The seeds of a cell ran one after the other, by one unit: between them nothing is to be seen."""
    rng = np.random.default_rng(0)
    units = {key: np.exp(0.05 * rng.standard_normal()) for key in sorted({(row["arm"], row["budget"]) for row in rows})}
    moved = [{**row, "cpu_seconds": row["cpu_seconds"] * units[row["arm"], row["budget"]]} for row in rows]
    found = Evidence(GPT, moved, 1000)
    assert evidence.unit_error == pytest.approx(0, abs=1e-9)
    assert found.unit_error == pytest.approx(0.05, rel=0.4)
    for before, after in zip(evidence.of("vcycle"), found.of("vcycle"), strict=True):
        assert after.in_seconds.high - after.in_seconds.low > 2 * (before.in_seconds.high - before.in_seconds.low)
        assert after.in_flops.low == before.in_flops.low
        assert after.seconds_share[1] > 0.03


def test_a_cheap_run_that_ends_above_the_frontier_is_no_answer_by_itself():
    """It cost less than every dense run, so that it may well be better than dense training of its cost."""
    rows = [row for row in planted_log({"mst-units": 1.3}) if (row["arm"], row["budget"]) != ("dense", 0.25)]
    evidence = Evidence(GPT, rows, 100)
    (reading, _) = evidence.of("mst-units")
    assert reading.in_flops.outside == "worse"
    assert reading.b1 is None
    (arm,) = [arm for arm in evidence.study.others if arm.name == "mst-units"]
    assert verdict(evidence, arm)[0] == "not finished"


def test_the_scatter_is_that_of_the_seeds(evidence):
    assert evidence.scatter.deviation == pytest.approx(DEVIATION, rel=0.25)
    assert evidence.scatter.num_free > 50
    # It was planted the same everywhere.
    assert evidence.scatter.at([1.7, 2.3]) == pytest.approx(DEVIATION, rel=0.4)


def test_the_frontier_is_the_planted_law(evidence):
    curve = evidence.in_flops.curve
    log_costs = np.linspace(*evidence.in_flops.log_costs, 20)
    np.testing.assert_allclose(
        curve.loss(log_costs), FLOOR + EXCESS * np.exp(-POWER * (log_costs - np.log(1e13))), atol=2 * DEVIATION
    )


def test_reading_a_dense_run_in_midway_saves_without_any_method(evidence):
    found = {(shorter, longer): fake for shorter, longer, fake in evidence.fake_savings()}
    assert found[1.0, 2.0] > 0.1
    assert found[2.0, 4.0] > 0.1


@pytest.mark.parametrize(
    ("missing", "what"),
    [
        ("vcycle", "runs"),
        *((name, "controls") for name in ("dense-0.575", "smaller-4", "smaller-5")),
        ("null", "runs of the null method"),
        ("half-lr", "runs of half the rate"),
    ],
)
def test_a_verdict_waits_for_every_run_of_the_method_and_of_its_controls(rows, missing, what):
    seed = NULL_SEEDS[0] if missing == "null" else 1
    evidence = Evidence(
        GPT, [row for row in rows if (row["arm"], row["budget"], row["seed"]) != (missing, 2.0, seed)], 100
    )
    (arm,) = [arm for arm in evidence.study.others if arm.name == "vcycle"]
    word, why = verdict(evidence, arm)
    assert word == "not finished"
    assert why.endswith(f"{what} at budget x2 are missing")


@given(st.floats(SHARES["smaller-1"], 1))
def test_the_smaller_models_of_a_method_are_its_neighbours_in_cost(evidence, share):
    costs = [SHARES.get(arm.name, 1.0) for arm in evidence.study.smaller_models(share)]
    assert costs == sorted(costs)
    # To a thousandth of a block.
    assert costs[0] - 2e-4 <= share <= costs[-1] + 2e-4
    assert costs[-1] - costs[0] == pytest.approx(0.12 * (len(costs) - 1))


@pytest.mark.parametrize("share", [SHARES["smaller-1"] - 0.01, 1.01])
def test_a_method_that_costs_less_or_more_than_all_models_has_no_neighbours(evidence, share):
    assert evidence.study.smaller_models(share) == []


def test_what_costs_as_much_and_ends_as_low_as_smaller_models_is_not_told_from_them():
    """On a line between two models, wherever it lies: neither the cheaper nor the dearer one decides."""
    # At this worth, models of all depths end as low as the full one; so do the methods.
    worth = {name: 1 / share for name, share in SHARES.items()}
    evidence = Evidence(GPT, planted_log(worth), 100)
    for name in ("vcycle", "ltd", "mst-units"):
        for reading in evidence.of(name):
            assert reading.b2.low < 0 < reading.b2.high
            assert abs(reading.b2.mean) < 3 * DEVIATION


def test_runs_of_another_configuration_are_not_read(rows):
    """An arm that was changed after it ran has no runs: the log keeps them, and the study makes new ones."""
    changed = [copy.copy(row) for row in rows]
    for row in changed:
        if row["arm"] == "sbld":
            row["config"] = "0" * 16
    assert Evidence(GPT, changed, 100).of("sbld") == []


def test_runs_on_other_data_are_refused(tmp_path, rows):
    path = tmp_path / "log.jsonl"
    append(rows[0], path)
    append({**rows[1], "data": "another"}, path)
    with pytest.raises(ValueError, match="2 different data"):
        read_log(path)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_the_single_p_value_and_bonferroni(p_values):
    adjusted = np.array(holm(p_values))
    assert (adjusted >= np.array(p_values)).all()
    assert (adjusted <= np.minimum(1, len(p_values) * np.array(p_values)) + 1e-12).all()
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
    # Control of the family's error rate is stricter than that of the share of false discoveries.
    assert (adjusted >= false_discovery_control(p_values) - 1e-12).all()
