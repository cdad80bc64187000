"""A model that changes its size while blocks are dropped: some of them have never run when it does."""

from __future__ import annotations

import pytest
import torch

from lit_accel import Composition, Level, MultiLevelTraining, Phase, ProgressiveLayerDropping
from tests.composition.runs import METHODS, Saves, run
from tests.methods.mixed_sparsity import assert_equal


def methods(phases, policy="project"):
    """From the first step on, few blocks run: an optimizer has no state of those that have never run."""
    levels = MultiLevelTraining([Level()], phases, optimizer_state=policy, coarse=0.5, fine=0.5)
    return [levels, ProgressiveLayerDropping(theta=0.2, direction="decreasing", release=1)]


@pytest.mark.parametrize("policy", ["project", "second_moment", "reset"])
@pytest.mark.parametrize(
    "phases",
    [
        # Of two blocks that are merged one has run, or one of those that a block is grown into.
        [Phase(0, 1), Phase(1, 6), Phase(0)],
        [Phase(0, 2), Phase(1, 1), Phase(0)],
        [Phase(0, 1), Phase(1, 1), Phase(0, 1), Phase(1, 1), Phase(0)],
        [Phase(1, 1), Phase(0)],
    ],
    ids=["short full phase", "short small phase", "short phases", "small from the start"],
)
def test_blocks_that_have_never_run_are_resized(tmp_path, policy, phases):
    saves = Saves(tmp_path, [2])
    made = run(tmp_path, methods(phases, policy), strategy="resizable", max_steps=12, callbacks=[saves])
    assert torch.isfinite(torch.tensor(made.module.seen)).all()
    depths = [len(keep) for keep in made.ran.keep.values()]
    assert {3, 6} == set(depths)
    assert not all(made.ran.keep[0])
    again = run(tmp_path, methods(phases, policy), strategy="resizable", max_steps=12, resume=saves.path(2))
    assert again.module.seen == made.module.seen[2:]
    assert_equal(again.module, made.module)


@pytest.mark.parametrize("title", ["PLD", "SBLD"])
def test_a_rehearsal_goes_through_all_phases(tmp_path, title):
    dropping = {"PLD": lambda: METHODS["PLD"](direction="decreasing", theta=0.2), "SBLD": METHODS["SBLD"]}[title]()
    rules = Composition(dense_warmup=0.1, dense_tail=0.2, drop_levels=[0])
    # One step each: at the levels 0, 1, 0.
    callbacks = [METHODS["multi-level"](), dropping, METHODS["random-LTD"](growth=0.7), rules]
    made = run(tmp_path, callbacks, strategy="resizable", fast_dev_run=3, max_steps=-1)
    assert [len(keep) for keep in made.ran.keep.values()] == [6, 3, 6]
