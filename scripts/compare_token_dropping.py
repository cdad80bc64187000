"""A first look at what token dropping is worth: a small GPT of 12 blocks, dense and with tokens dropped.

Methods train as many steps as the longest dense run and cost less. Beside them stand the controls that tell what does
it: dense training for as many FLOPs, with its own completed learning-rate decay; dense training with the learning rates
of the LayerToken schedule; and dropping the same tokens in every block. Runs are appended to
``scripts/results/token_dropping_quality.jsonl`` as they finish; calling the script again goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from lit_accel import LayerTokenLR, RandomLTD
from lit_accel.anatomy import anatomy_of
from lit_accel.methods.token_dropping import TokenPlan, TokenSchedule
from scripts.comparison import Arm, Comparison
from scripts.small_gpt import Setup

SETUP = Setup(num_blocks=12, embed=64, heads=4, vocab_size=1024, block_size=128, batch_size=16, num_steps=800)
START, GROWTH = 0.25, 0.7
DENSE = "dense"


def plan() -> TokenPlan:
    """Return what random-LTD does over the run."""
    with torch.device("meta"):
        anatomy = anatomy_of(SETUP.module().model)
    schedule = TokenSchedule(START, round(GROWTH * SETUP.num_steps))
    return TokenPlan(anatomy, tuple(range(1, SETUP.num_blocks - 1)), schedule, SETUP.num_steps, SETUP.block_size)


def layer_token_lr(optimizer: Optimizer) -> LayerTokenLR:
    """Return the schedule that a RandomLTD callback tells how far each step gets."""
    return LayerTokenLR(optimizer, num_warmup_steps=0.05)


def the_same_rates(optimizer: Optimizer) -> LayerTokenLR:
    """Return the schedule with the rates that it has beside random-LTD, for a run without it."""
    scheduler = layer_token_lr(optimizer)
    scheduler.follow(plan().progress())
    return scheduler


def random_ltd(**options: Any) -> RandomLTD:
    """Return the method."""
    return RandomLTD(START, GROWTH, **options)


COMPARISON = Comparison(
    title="Held-out loss of a small GPT with and without dropped tokens",
    results=Path(__file__).parent / "results" / "token_dropping_quality.jsonl",
    setup=SETUP,
    arms={
        DENSE: Arm(),
        "dense, as many FLOPs": Arm(steps=1 - plan().saved_flops()),
        "dense, LayerToken rates": Arm(scheduler=the_same_rates),
        "random-LTD": Arm(random_ltd, scheduler=layer_token_lr),
        "random-LTD, rates by steps": Arm(random_ltd),
        "one draw for all blocks": Arm(lambda: random_ltd(scope="route"), scheduler=layer_token_lr),
    },
)


if __name__ == "__main__":
    COMPARISON.main(__doc__)
