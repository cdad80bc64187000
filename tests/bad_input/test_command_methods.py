"""Runs without a length, and methods that cannot act in a run."""

from __future__ import annotations

import pytest

from tests.bad_input.harness import run_command
from tests.bad_input.rows import overrides, wrong

LTD = "--trainer.callbacks+=lit_accel.RandomLTD"
PLD = "--trainer.callbacks+=lit_accel.ProgressiveLayerDropping"
SBLD = "--trainer.callbacks+=lit_accel.SensitivityLayerDropping"
MST = "--trainer.callbacks+=lit_accel.MixedSparsityTraining"
LEVELS = ("--trainer.strategy=resizable", "--trainer.callbacks+=lit_accel.MultiLevelTraining")
LEDGER = "--trainer.callbacks+=lit_accel.ComputeLedger"
COMPOSITION = "--trainer.callbacks+=lit_accel.Composition"


ROWS = [
    # The length of a run
    wrong(
        "no length",
        "--trainer.max_steps=-1",
        "How long is the run? Give --trainer.max_steps, the number of optimizer",
        base="endless",
    ),
    wrong(
        "fewer than no steps",
        "--trainer.max_steps=-5",
        "`max_steps` must be a non-negative integer or -1 (infinite steps). You",
    ),
    wrong(
        "no step", "--trainer.max_steps=0", "A run of 0 steps trains nothing. Give --trainer.max_steps the number of"
    ),
    wrong(
        "a method in a run without an end",
        ("--trainer.max_steps=-1", LTD),
        "RandomLTD must know how long the run is. Give the Trainer max_steps, or",
    ),
    wrong(
        "a plan of a run without an end",
        ("--trainer.max_steps=-1",),
        "A plan must know how long the run is. Give the Trainer max_steps, or",
        subcommand="plan",
    ),
    # Methods in a run
    wrong(
        "a cycle longer than the run",
        (*LEVELS, '--trainer.callbacks.phases=[{"level": 0, "length": 30}, {"level": 1}]'),
        "The phases are longer than the run: phase 0 (level 0) would end at step",
    ),
    wrong(
        "a run too short for its phases",
        (*LEVELS, "--trainer.max_steps=2"),
        "phase 2 (level 0) would have no optimizer step: it starts at step 2 of 2,",
    ),
    wrong(
        "a level that does not exist",
        (*LEVELS, '--trainer.callbacks.phases=[{"level": 0, "length": 1}, {"level": 3, "length": 1}, {"level": 0}]'),
        "phase 1 (level 3): there is no such level; levels are 0 (the full model)",
    ),
    wrong(
        "a level that halves three heads",
        (*LEVELS, overrides(n_embd=18, n_head=3)),
        "The width of this gpt2 model cannot be divided by 2: heads is 3. Choose a",
    ),
    wrong(
        "a level that halves three blocks",
        (*LEVELS, overrides(n_layer=3)),
        "The depth of this gpt2 model, 3 blocks, cannot be divided by 2. Choose a",
    ),
    wrong(
        "a level of negative width",
        (*LEVELS, '--trainer.callbacks.levels=[{"width": -2}]'),
        "width and depth factors must be at least 1; width is -2, depth is 2.",
    ),
    wrong(
        "merged batches that do not divide the accumulation",
        (*LEVELS, '--trainer.callbacks.levels=[{"merge_batches": 2}]'),
        "A level has merge_batches=2, and the Trainer accumulate_grad_batches=1,",
    ),
    wrong(
        "multi-level training without a strategy that resizes",
        LEVELS[1],
        "MultiLevelTraining changes the model's size in mid-training, which",
    ),
    wrong("a method twice", (LTD, LTD), "trainer.callbacks has 2 callbacks RandomLTD, with the same settings or of"),
    wrong(
        "two methods that drop layers",
        (PLD, SBLD),
        "ProgressiveLayerDropping and SensitivityLayerDropping would both drop",
    ),
    wrong(
        "too few blocks to drop",
        (SBLD, overrides(n_layer=2)),
        "kept is 0.78, but with min_keep 0.4 and up to 2 of the 2 blocks never",
    ),
    wrong(
        "a pinned block that is not there",
        (PLD, "--trainer.callbacks.pinned=[9]"),
        "pinned names block 9, but this gpt2 model has 4 blocks: 0 to 3, or -4 to",
    ),
    wrong(
        "scaling that does not fit post-norm",
        (PLD, "--trainer.callbacks.scale=block"),
        'scale="block" does not fit this bert model, whose norms stand after the',
        base="bert",
    ),
    wrong(
        "more tokens at first than there are",
        (LTD, "--trainer.callbacks.start_tokens=100"),
        "start_tokens is 100, and sequences have no more than 8 tokens: nothing",
    ),
    wrong(
        "input tokens of a language model",
        (LTD, "--trainer.callbacks.scope=input"),
        'scope="input" does not bring dropped tokens back, and this gpt2 model',
    ),
    wrong(
        "a pattern on a model that sees later tokens",
        (MST, "--trainer.callbacks.attention_pattern=window"),
        "This bert model attends to later tokens too, and the patterns are of",
        base="bert",
    ),
    wrong(
        "a layer that would be empty",
        (
            MST,
            "--trainer.callbacks.ffn_units=element",
            "--trainer.callbacks.attention_units=element",
            "--trainer.callbacks.stages=[[0, 0.99999]]",
        ),
        "A sparsity of 0.99999 would leave transformer.h.0.mlp.c_fc.weight empty:",
    ),
    wrong(
        "tiles larger than a matrix",
        (MST, "--trainer.callbacks.ffn_units=block"),
        "MixedSparsityTraining: transformer.h.0.mlp.c_fc.weight of this gpt2 model",
    ),
    wrong(
        "an optimizer whose state cannot be switched",
        (MST, "--model.optimizer=torch.optim.Adagrad"),
        "MixedSparsityTraining starts the optimizer state of units anew, and knows",
    ),
    wrong(
        "sparsity on a model that shrinks while it is sparse",
        (*LEVELS, MST),
        "MultiLevelTraining and MixedSparsityTraining do not go together as they",
    ),
    wrong(
        "too little of a run left",
        (PLD, LTD, "--trainer.callbacks.start_tokens=0.01", COMPOSITION, "--trainer.callbacks.least_cost=0.9"),
        "ProgressiveLayerDropping, RandomLTD together leave 82.3% of the FLOPs of a",
    ),
    wrong(
        "dense steps that meet",
        (PLD, COMPOSITION, "--trainer.callbacks.dense_warmup=0.6", "--trainer.callbacks.dense_tail=0.6"),
        "dense_warmup ends at step 2, where dense_tail has begun (at 2): nothing",
    ),
    wrong(
        "dropping at a level that there is not",
        (PLD, COMPOSITION, "--trainer.callbacks.drop_levels=[2]"),
        "drop_levels names level 2, and the levels of this run are 0, the full",
    ),
    wrong(
        "a ledger twice is no mistake, a method in between is",
        (LEDGER, LEDGER, LTD, LTD),
        "trainer.callbacks has 2 callbacks RandomLTD, with the same settings or of",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_before_training(row, tmp_path, monkeypatch, capsys, cache):
    run_command(row, tmp_path, cache, monkeypatch, capsys)
