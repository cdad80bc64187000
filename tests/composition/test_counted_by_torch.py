"""What runs with several methods really compute, by torch's own counter; and what they are charged, by hand."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as L
import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_accel.anatomy import anatomy_of
from lit_accel.compute import training_flops
from lit_accel.compute.active import Active
from lit_accel.compute.plan import StepCosts, StepDecision, Workload
from lit_accel.methods.compatibility import MST, MULTI_LEVEL, PLD, RANDOM_LTD, SBLD
from tests.composition.pairs import settings
from tests.composition.runs import METHODS, cost_of, run

# In a full phase and in a small one, where units are chosen by gradient, and where they are off.
COUNTED_AT = (2, 4, 6, 9, 11, 13, 17)
CASES = {
    (MULTI_LEVEL, PLD): "gpt2-tied",
    (MULTI_LEVEL, SBLD): "vit",
    (MULTI_LEVEL, RANDOM_LTD): "llama-gqa",
    (MULTI_LEVEL, MST): "gpt2-tied",
    (PLD, RANDOM_LTD): "deit-distilled",
    (SBLD, RANDOM_LTD): "gpt2-tied",
    (PLD, MST): "bert-mlm",
    (SBLD, MST): "gpt2-tied",
    (RANDOM_LTD, MST): "gpt2-tied",
    (MULTI_LEVEL, PLD, RANDOM_LTD, MST): "gpt2-tied",
}


class CountedByTorch(L.Callback):
    """Counts forward and backward of some training batches. Stands right of all that measures."""

    def __init__(self):
        self.flops = {}

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step in COUNTED_AT:
            self.mode = FlopCounterMode(display=False)
            self.mode.__enter__()

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step in COUNTED_AT:
            self.mode.__exit__(None, None, None)
            self.flops[trainer.global_step] = self.mode.get_total_flops()


def given(title, titles, family):
    if title == PLD:
        # Where the first block is skipped before any has run, one is run for the form of its output.
        return {**settings(title, titles, family), "pinned": [0]}
    if title == MST:
        # Units that can be taken out of the model: what is masked is multiplied all the same.
        stages = {"stages": [(0, 0.0), (9, 0.5), (14, 0.25), (16, 0.0)]} if MULTI_LEVEL in titles else {}
        return {**stages, "ffn_units": "neuron", "attention_units": "head"}
    return settings(title, titles, family)


@pytest.mark.parametrize(("titles", "family"), CASES.items(), ids=["+".join(titles) for titles in CASES])
@pytest.mark.filterwarnings("ignore:.*in one run")
def test_each_step_computes_what_it_is_charged(tmp_path, titles, family):
    """Attention in whole squares: that is how this kernel computes it, the only one that torch counts everywhere."""
    torch_counts = CountedByTorch()
    methods = [METHODS[title](**given(title, titles, family)) for title in titles]
    with sdpa_kernel(SDPBackend.MATH):
        made = run(tmp_path, methods, family, strategy="resizable", callbacks=[torch_counts])
    charged = {call["step"]: cost_of(call, attention="full") for call in made.ran.calls if call["step"] in COUNTED_AT}
    assert len(set(charged.values())) >= 3
    # What is left is not counted, such as positions; a block or a token too many would be far more.
    assert torch_counts.flops == pytest.approx(charged, rel=0.01)
    assert min(charged.values()) < 0.8 * max(charged.values())


# By hand


def gpt2(**given):
    with torch.device("meta"):
        config = {"n_layer": 4, "n_embd": 8, "n_head": 2, "vocab_size": 10, "n_positions": 16, "n_inner": 32}
        return anatomy_of(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **given})))


def test_a_step_of_all_four_written_out():
    """Half of the width, two of four blocks run, one of them on 5 of 12 tokens and one with half of its neurons."""
    small = gpt2(n_embd=4, n_inner=16, n_head=1)
    active = Active(entries={"transformer.h.3.mlp.c_fc.weight": 32, "transformer.h.3.mlp.c_proj.weight": 32})
    decision = StepDecision(level=1, keep=(0, 1, 0, 1), kept_tokens={1: 5}, active=active)
    costs = StepCosts([gpt2(), small], Workload(3, 12))
    # Width 4: 48 + 16 + 64 + 64 weights of matrices, each twice a token; scores and values of 15 pairs.
    on_five = 3 * (2 * 5 * 192 + 4 * 4 * 15)
    half_of_neurons = 3 * (2 * 12 * (64 + 64) + 4 * 4 * 78)
    head = 3 * 2 * 12 * 4 * 10
    assert costs.of(decision) == 3 * (on_five + half_of_neurons + head)
    assert costs.dense(0) == training_flops(gpt2(), 3, 12).total


@pytest.mark.parametrize("kept", [{}, {1: 5, 2: 7}])
@pytest.mark.parametrize("keep", [None, (1, 1, 1, 1), (1, 0, 1, 1), (0, 0, 0, 0), (1.0, 0.25, 0.5, 0.75)])
@pytest.mark.parametrize("merged", [{}, {0: 2}])
def test_the_cost_is_the_sum_of_the_parts(keep, kept, merged):
    anatomy = gpt2()
    active = Active(entries={"transformer.h.2.mlp.c_fc.weight": 100}, widths={2: 4})
    work = Workload(3, 12, num_micro_batches=4, num_merged=merged)
    cost = StepCosts([anatomy], work).of(StepDecision(keep=keep, kept_tokens=kept, active=active))
    part = partial(training_flops, anatomy, 12, 12)
    expected = part().outside_blocks
    for index in range(4):
        alone = part(kept={index: kept[index]} if index in kept else None, active=active if index == 2 else None)
        expected += alone.blocks[index] * (1 if keep is None else keep[index])
    assert cost == expected


def test_a_block_that_is_dropped_saves_its_tokens_and_units_too():
    """Never less than nothing is charged where methods meet in one block."""
    anatomy = gpt2()
    costs = StepCosts([anatomy], Workload(1, 12))
    active = Active(entries={"transformer.h.1.mlp.c_fc.weight": 10})
    dropped = StepDecision(keep=(1, 0, 1, 1), kept_tokens={1: 3}, active=active)
    assert costs.of(dropped) == costs.of(StepDecision(keep=(1, 0, 1, 1)))
    assert costs.of(dropped) < costs.of(StepDecision(kept_tokens={1: 3}, active=active)) < costs.dense(0)
