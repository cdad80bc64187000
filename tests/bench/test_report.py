"""The page has a place for everything that is generated, and its pictures are drawn."""

import re

import pytest
import torch

import lit_accel.tasks
from scripts.bench import pictures, report, tables
from scripts.bench.analysis import read_study
from scripts.bench.study import ARMS, RUNGS
from tests.bench.planted import planted_log


@pytest.fixture(scope="module")
def found():
    return read_study(planted_log({"vcycle": 1.4, "smaller-6": 1.6}), num_draws=200)


def test_every_rung_has_a_frontier_and_every_arm_a_reading_once_all_is_run(found):
    assert list(found) == list(RUNGS)
    for name, evidence in found.items():
        assert {reading.arm.name for reading in evidence.readings} == {arm.name for arm in ARMS[name][1:]}


def test_every_block_has_its_place(found, monkeypatch):
    monkeypatch.setattr(report, "evidence", lambda: found)
    for path, blocks in report.blocks().items():
        text = path.read_text()
        for name, content in blocks.items():
            assert f"<!-- {name} -->\n" in text, (path.name, name)
            assert f"<!-- /{name} -->" in text
            assert "nan" not in content, (path.name, name)


def test_tables_are_whole(found):
    for evidence in found.values():
        for text in (
            tables.frontier_table(evidence),
            tables.checks_table(evidence),
            tables.verdicts_table(evidence),
            tables.tuning_table(evidence),
            *(tables.costs_table(evidence, budget) for budget in evidence.rung.budgets),
            *(tables.savings_table(evidence, budget) for budget in evidence.rung.budgets),
            *(tables.depths_table(evidence, budget) for budget in evidence.rung.budgets),
        ):
            lines = [line for line in text.splitlines() if line.startswith("|")]
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
            assert len(lines) > 2


def test_in_short_every_method_is_counted_once(found):
    lines = tables.in_short(found).splitlines()
    assert len(lines) == len(found)
    for line, evidence in zip(lines, found.values(), strict=True):
        number = int(re.search(r", (\d+) methods and variants", line)[1])
        assert number == sum(arm.role == "method" for arm in evidence.study.others)
        assert sum(map(int, re.findall(r"\*\* (\d+)", line))) == number


def test_smaller_models_stand_beside_the_full_one_cheapest_first(found):
    evidence = found["gpt"]
    rows = [line.split(" | ") for line in tables.depths_table(evidence, 1.0).splitlines()[2:]]
    costs = [float(flops) for _, _, flops, *_ in rows]
    assert rows[-1][0] == "| dense"
    assert costs[-1] == 1
    assert costs == sorted(costs)
    written = dict(zip([name for name, *_ in rows], rows, strict=True))
    # As planted.
    assert written["| dense, 6 blocks"][1:4] == ["3", "0.760", "0.76 ± 0.00"]


def test_what_a_smaller_model_saves_is_said_beside_what_methods_save(found):
    """It was planted that six of eight blocks are worth more than anything else."""
    savings = {reading.arm.name: reading.in_flops.share for reading in found["gpt"].smaller_models}
    assert max(savings, key=savings.get) == "smaller-6"
    assert savings["smaller-6"] > 0.3
    assert "What fewer blocks do without any method: dense, 6 blocks, at x1 +" in tables.regime(found["gpt"])


def test_pictures_are_drawn(found, tmp_path):
    drawn = pictures.draw(found["vit"], tmp_path)
    assert [path.name for path in drawn] == [f"vit_{what}.png" for what in ("frontier", "savings", "tuning")]
    assert all(path.exists() for path in drawn)


@pytest.mark.parametrize("rung", RUNGS.values(), ids=lambda rung: rung.name)
def test_the_parameters_in_blocks_are_those_of_the_model(rung):
    with torch.device("meta"):
        model = getattr(lit_accel.tasks, rung.task)(**rung.model).model
    blocks = model.get_submodule({"gpt": "transformer.h", "vit": "blocks", "bert": "bert.encoder.layer"}[rung.name])
    assert sum(parameter.numel() for parameter in blocks.parameters()) == rung.body


def test_the_summary_has_every_method_once_with_seconds_in_a_column_of_their_own(found):
    for evidence in found.values():
        lines = tables.summary_table(evidence).splitlines()
        header, _, smaller, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        at = " / ".join(f"x{budget:g}" for budget in evidence.rung.budgets)
        assert header == ["method", "verdict", f"FLOPs saved, {at}", f"seconds saved, {at}", "B1", "B2"]
        assert smaller[1] == "*no method*"
        methods = [arm for arm in evidence.study.others if arm.role == "method"]
        assert [row[0] for row in rows] == [arm.title for arm in methods]
        for arm, row in zip(methods, rows, strict=True):
            readings = evidence.of(arm.name)
            for cell, cost in zip(row[2:4], ("flops", "seconds"), strict=True):
                savings = [reading.saving(cost).share for reading in readings]
                assert None in savings or cell == " / ".join(f"{share:+.0%}" for share in savings)
            gaps = [*(reading.b1 for reading in readings), *(reading.b2 for reading in readings)]
            words = [word for cell in row[4:] for word in cell.split(" / ")]
            assert [word == "beats" for word in words] == [gap.high < 0 for gap in gaps]
    # As planted: on the GPT six of eight blocks are worth more than anything else.
    assert "| *dense, 6 blocks* |" in tables.summary_table(found["gpt"])
