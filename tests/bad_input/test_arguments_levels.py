"""Arguments of multi-level training, and unknown ones, in Python: refused where they are given."""

from __future__ import annotations

import math

import pytest

from lit_accel import (
    Level,
    MultiLevelTraining,
    Phase,
    ProgressiveLayerDropping,
    RandomLTD,
)
from lit_accel.data import TextDataModule
from lit_accel.tasks import CausalLM
from tests.bad_input.harness import run_call
from tests.bad_input.rows import call, keyword

ROWS = [
    keyword(
        "RandomLTD", lambda: RandomLTD(quantm=3), "RandomLTD.__init__() got an unexpected keyword argument 'quantm'"
    ),
    keyword(
        "ProgressiveLayerDropping",
        lambda: ProgressiveLayerDropping(thetta=0.5),
        "ProgressiveLayerDropping.__init__() got an unexpected keyword argument",
    ),
    keyword(
        "MultiLevelTraining",
        lambda: MultiLevelTraining(level=[]),
        "MultiLevelTraining.__init__() got an unexpected keyword argument 'level'",
    ),
    keyword(
        "CausalLM",
        lambda: CausalLM("gpt2", override={}),
        "LanguageModeling.__init__() got an unexpected keyword argument 'override'",
    ),
    keyword(
        "TextDataModule",
        lambda: TextDataModule(path="x"),
        "TextDataModule.__init__() got an unexpected keyword argument 'path'",
    ),
    keyword("Level", lambda: Level(widht=2), "Level.__init__() got an unexpected keyword argument 'widht'"),
    # Multi-level training
    call(
        "levels that are a number",
        lambda: MultiLevelTraining(levels=2),
        "levels is 2; it is a list, such as [Level(width=2, depth=2)].",
    ),
    call(
        "levels that are text",
        lambda: MultiLevelTraining(levels="two"),
        "levels is 'two'; it is a list, such as [Level(width=2, depth=2)].",
    ),
    call(
        "levels that are a mapping",
        lambda: MultiLevelTraining(levels={"width": 2}),
        "levels is {'width': 2}; it is a list, such as [Level(width=2, depth=2)].",
    ),
    call("no level", lambda: MultiLevelTraining(levels=[]), "levels is empty; give at least one smaller level."),
    call(
        "a level that is a number",
        lambda: MultiLevelTraining(levels=[2]),
        "levels[0]: 2 is no Level; write Level(...), or a mapping of its fields.",
    ),
    call(
        "an unknown field of a level",
        lambda: MultiLevelTraining(levels=[{"widht": 2}]),
        "levels[0]: a Level has no 'widht', but width, depth, merge_batches. Did",
    ),
    call(
        "a level as large as the one above",
        lambda: MultiLevelTraining(levels=[Level(1, 1)]),
        "Level(width=1, depth=1, merge_batches=1) is no smaller than the level",
    ),
    call(
        "a width that is a fraction",
        lambda: MultiLevelTraining(levels=[Level(width=1.5)]),
        "levels[0]: width is 1.5 and depth 2; they are whole numbers by which the",
    ),
    call(
        "a depth that is text",
        lambda: MultiLevelTraining(levels=[Level(depth="half")]),
        "levels[0]: width is 2 and depth 'half'; they are whole numbers by which",
    ),
    call(
        "an empty list of depths",
        lambda: MultiLevelTraining(levels=[Level(depth=[])]),
        "levels[0]: width is 2 and depth []; they are whole numbers by which the",
    ),
    call(
        "no micro-batch to merge",
        lambda: MultiLevelTraining(levels=[Level(merge_batches=0)]),
        "levels[0]: merge_batches is 0; it is a whole number, at least 1.",
    ),
    call(
        "a phase that is a number",
        lambda: MultiLevelTraining(phases=[0, 1, 0]),
        "phases[0]: 0 is no Phase; write Phase(...), or a mapping of its fields.",
    ),
    call(
        "a phase without a level",
        lambda: MultiLevelTraining(phases=[{"length": 0.5}]),
        "phases[0] has no level. Say at which level the phase is; 0 is the full",
    ),
    call(
        "a phase of a level that is a share",
        lambda: MultiLevelTraining(phases=[Phase(0.5)]),
        "phases[0]: level is 0.5; it is a whole number, 0 for the full model.",
    ),
    call(
        "a length that is text",
        lambda: MultiLevelTraining(phases=[Phase(0, "half")]),
        "phases[0]: length is 'half'; it is a number of optimizer steps (int), a",
    ),
    call(
        "a length that is NaN",
        lambda: MultiLevelTraining(phases=[Phase(0, math.nan)]),
        "phases[0]: length is nan; it is a number of optimizer steps (int), a share",
    ),
    call(
        "a length that is true",
        lambda: MultiLevelTraining(phases=[Phase(0, True)]),
        "phases[0]: length is True; it is a number of optimizer steps (int), a",
    ),
    call(
        "an infinite learning-rate scale",
        lambda: MultiLevelTraining(phases=[Phase(0, lr_scale=math.inf)]),
        "phases[0]: lr_scale is inf; it is a positive number.",
    ),
    call(
        "a preset that is none",
        lambda: MultiLevelTraining(preset="papper"),
        "preset is 'papper'; allowed are 'correction', 'paper', 'exact'. Did you",
    ),
    call(
        "alpha beside fine",
        lambda: MultiLevelTraining(alpha=0.5, fine=0.5),
        "alpha is 0.5, coarse is None and fine is 0.5; alpha stands for both",
    ),
    call(
        "alpha above one",
        lambda: MultiLevelTraining(alpha=1.5),
        "alpha is 1.5; it is the weight of the small model, between 0 and 1.",
    ),
    call(
        "alpha that is NaN",
        lambda: MultiLevelTraining(alpha=math.nan),
        "alpha is nan; it is a number, or None for that of the preset.",
    ),
    call(
        "moments that are none",
        lambda: MultiLevelTraining(optimizer_state="keep"),
        "optimizer_state is 'keep'; allowed are None, 'reset', 'project',",
    ),
    call(
        "a start at a level that is not there",
        lambda: MultiLevelTraining(start_level=3),
        "start_level is 3; levels are 0 (the full model) to 1.",
    ),
    call(
        "a start at a fraction of a level",
        lambda: MultiLevelTraining(start_level=0.5),
        "start_level is 0.5; it is a whole number.",
    ),
    call(
        "growth that forgets the small model",
        lambda: MultiLevelTraining(start_level=1, preset="paper"),
        "coarse (or alpha) is 0.25, but with start_level 1 there is no trained",
    ),
    call(
        "a negative deviation",
        lambda: MultiLevelTraining(start_level=1, fresh_std=-1),
        "fresh_std is -1; it is a standard deviation and must not be negative.",
    ),
    call(
        "no step to warm up again",
        lambda: MultiLevelTraining(learning_rate="rewarm", num_rewarm_steps=0),
        "num_rewarm_steps is 0; it is a number of optimizer steps, at least 1.",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_where_it_is_given(row, tmp_path, monkeypatch):
    run_call(row, tmp_path, monkeypatch)
