"""A first look at what mixed sparsity is worth: a small GPT of 6 blocks, dense and by mixed sparsity training.

Methods train as many steps as the longest dense run and cost less. Beside them stand the controls: dense training for
as many FLOPs, with its own completed learning-rate decay, which is what a method has to beat; the same number of
neurons and heads without choosing them anew; and entries of matrices, which save no second, as the reference of
quality. Runs are appended to ``scripts/results/mixed_sparsity_quality.jsonl`` as they finish; calling the script again
goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_accel import MixedSparsityTraining
from lit_accel.anatomy import anatomy_of
from lit_accel.methods.mixed_sparsity import DEFAULT_STAGES, SparsitySchedule, Targets, spaces_of
from scripts.comparison import Arm, Comparison
from scripts.small_gpt import Setup

SETUP = Setup(num_blocks=6, embed=128, heads=8, vocab_size=1024, block_size=128, batch_size=16, num_steps=800)
UPDATE_EVERY = 20
DENSE = "dense"
ENTRIES = {"ffn_units": "element", "attention_units": "element"}


def cost() -> float:
    """Return what mixed sparsity training of neurons and heads costs in parts of the dense run."""
    with torch.device("meta"):
        anatomy = anatomy_of(SETUP.module().model)
    schedule = SparsitySchedule.of(DEFAULT_STAGES, SETUP.num_steps, UPDATE_EVERY)
    return Targets(anatomy, spaces_of(anatomy, "neuron", "head", "dense"), schedule).shares(SETUP.block_size).dense


def method(**options: Any) -> MixedSparsityTraining:
    """Return the method."""
    return MixedSparsityTraining(update_every=UPDATE_EVERY, **options)


COMPARISON = Comparison(
    title="Held-out loss of a small GPT, dense and by mixed sparsity training",
    results=Path(__file__).parent / "results" / "mixed_sparsity_quality.jsonl",
    setup=SETUP,
    arms={
        DENSE: Arm(),
        "dense, as many FLOPs": Arm(steps=cost()),
        "neurons and heads": Arm(method),
        "neurons and heads, grown at random": Arm(lambda: method(gradient_share=0.0)),
        "neurons and heads, never chosen anew": Arm(lambda: method(drop_fraction=0.0)),
        "entries (no second saved)": Arm(lambda: method(**ENTRIES)),
    },
)


if __name__ == "__main__":
    COMPARISON.main(__doc__)
