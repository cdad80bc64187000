"""The measurement of published models, on one that is none: what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from matplotlib.image import imread

from lit_accel.tasks import CausalLM
from scripts import draw_models, measure_models
from scripts.timed_gpt import KEEP_MEMORY

SMALL = {"n_layer": 12, "n_embd": 48, "n_head": 12, "vocab_size": 50, "n_positions": 32}


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """Two rounds, the second of which another call makes."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        small = measure_models.Model(
            "small", lambda: CausalLM("gpt2", False, SMALL), lambda: measure_models.text(32, 50, False), (2, 2)
        )
        gpu_only = measure_models.Model("large", lambda: pytest.fail("has no batch size here"), dict, (None, None))
        patch.setattr(measure_models, "MODELS", (small, gpu_only))
        patch.setattr(measure_models, "RESULTS", folder / "models.jsonl")
        patch.chdir(folder)
        for name, value in KEEP_MEMORY.items():
            patch.setenv(name, value)
        seen = []
        for number in ("1", "1", "2"):
            patch.setattr("sys.argv", ["measure_models", "--rounds", number, "--steps", "20"])
            measure_models.main()
            seen.append(measure_models.read_rows())
    return seen


def test_rounds_that_are_there_are_not_made_again(rounds):
    assert [len(each) for each in rounds] == [1, 1, 2]
    assert rounds[2][0] == rounds[0][0] == json.loads(json.dumps(rounds[0][0]))


def test_all_arms_are_measured_and_counted(rounds):
    for row in rounds[2]:
        arms = row["arms"]
        assert list(arms) == list(measure_models.ARMS)
        assert all(arm["seconds"] > 0 for arm in arms.values())
        assert len({arm["dense_flops"] for arm in arms.values()}) == 1
        assert arms["dense"]["flops"] == arms["dense"]["dense_flops"]
        assert all(arm["flops"] < arm["dense_flops"] for name, arm in arms.items() if name != "dense")
        for name, arm in arms.items():
            assert len(arm["resize_seconds"]) == (2 if "V-cycle" in name else 0)
    first, second = (row["arms"] for row in rounds[2])
    # The order of the arms changes nothing of what they do.
    assert all(first[name]["flops"] == second[name]["flops"] for name in first)


def test_flops_are_those_of_the_steps_that_are_timed(rounds):
    """A V-cycle is dense in its first step, which does not count, in 8 others, and small in 11 of 20."""
    arms = rounds[0][0]["arms"]
    step = arms["dense"]["flops"] / 19
    small = (arms["V-cycle"]["flops"] - 8 * step) / 11
    assert 0 < small < 0.3 * step
    assert step == int(step)


def test_the_table_says_what_the_rows_do(rounds, monkeypatch):
    monkeypatch.setattr(measure_models, "MODELS", [SimpleNamespace(name="small")])
    rows = rounds[2]
    text = measure_models.table(rows)
    assert "**small**: 20 steps of 2, 2 rounds" in text
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| PLD |")
    ]
    ((_, flops, seconds, share, changes),) = cells
    arm = rows[0]["arms"]["PLD"]
    ratios = sorted(row["arms"]["PLD"]["seconds"] / row["arms"]["dense"]["seconds"] for row in rows)
    assert flops == f"{arm['flops'] / arm['dense_flops']:.3f}"
    assert seconds == f"{sum(ratios) / 2:.2f} ({ratios[0]:.2f} to {ratios[1]:.2f})"
    shares = sorted(math.log(ratio) / math.log(arm["flops"] / arm["dense_flops"]) for ratio in ratios)
    assert share == f"{sum(shares) / 2:.2f} ({shares[0]:.2f} to {shares[1]:.2f})"
    assert changes == ""
    assert "V-cycle" in text
    assert measure_models.table([]) == ""


def test_the_picture_has_a_panel_a_model(rounds, tmp_path, monkeypatch):
    names = [SimpleNamespace(name=name) for name in ("another", "small")]
    monkeypatch.setattr(measure_models, "MODELS", names)
    other = [{**row, "model": "another"} for row in rounds[2]]
    assert [model for model, _ in measure_models.measured(rounds[2] + other)] == ["another", "small"]
    draw_models.draw(rounds[2] + other, tmp_path / "both.png")
    draw_models.draw(rounds[2], tmp_path / "one.png")
    heights, widths = zip(*(imread(tmp_path / f"{name}.png").shape[:2] for name in ("both", "one")), strict=True)
    assert heights[0] == heights[1]
    assert widths[0] > widths[1]
