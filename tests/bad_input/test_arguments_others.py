"""Arguments of mixed sparsity, tasks and data modules in Python: refused where they are given."""

from __future__ import annotations

import math

import pytest

from lit_accel import (
    Composition,
    ComputeLedger,
    MixedSparsityTraining,
)
from lit_accel.data import ImageDataModule, TextDataModule
from lit_accel.tasks import CausalLM, ImageClassification, MaskedLM
from tests.bad_input.harness import run_call
from tests.bad_input.rows import call

ROWS = [
    # Mixed sparsity training
    call(
        "stages that are a number",
        lambda: MixedSparsityTraining(stages=0.9),
        "stages is 0.9; it is a list of pairs of a start and a sparsity: [[0, 0.0],",
    ),
    call(
        "no stage",
        lambda: MixedSparsityTraining(stages=[]),
        "stages is empty. Give at least one pair of a start and a sparsity, such as",
    ),
    call(
        "a stage that is a number",
        lambda: MixedSparsityTraining(stages=[0.5]),
        "stages has the entry 0.5; each is a pair of a start and a sparsity: [0.06,",
    ),
    call(
        "a sparsity of one",
        lambda: MixedSparsityTraining(stages=[(0, 1.0)]),
        "stages has the sparsity 1.0: at 1 every layer would be empty. It is the",
    ),
    call(
        "a stage that begins late",
        lambda: MixedSparsityTraining(stages=[(5, 0.5)]),
        "The first of stages starts at 5; it starts at 0: how sparse is the run",
    ),
    call(
        "stages out of order",
        lambda: MixedSparsityTraining(stages=[(0, 0.0), (9, 0.5), (3, 0.0)]),
        "stages are out of order: they start at [0, 9, 3]. List them by their",
    ),
    call(
        "units that are none",
        lambda: MixedSparsityTraining(ffn_units="neurons"),
        "ffn_units is 'neurons'; it is one of 'neuron', 'element', 'block',",
    ),
    call(
        "all of the neighbours",
        lambda: MixedSparsityTraining(ffn_units="4:4"),
        "ffn_units is '4:4': of 4 neighbours 4 are kept. Keep at least 1 and fewer",
    ),
    call(
        "an update at no time",
        lambda: MixedSparsityTraining(update_every=0),
        "update_every is 0; it is a whole number, at least 1.",
    ),
    call(
        "all units dropped",
        lambda: MixedSparsityTraining(drop_fraction=1),
        "drop_fraction is 1; it is a share, from 0 to below 1.",
    ),
    call(
        "a share of gradients above one",
        lambda: MixedSparsityTraining(gradient_share=2),
        "gradient_share is 2; it is a share, from 0 to 1.",
    ),
    call(
        "a distribution that is none",
        lambda: MixedSparsityTraining(distribution="erdos"),
        "distribution is 'erdos'; it is one of 'uniform', 'er', 'erk'.",
    ),
    call(
        "a pattern that is none",
        lambda: MixedSparsityTraining(attention_pattern="sliding"),
        "attention_pattern is 'sliding'; it is one of 'window', 'strided', 'fixed',",
    ),
    call(
        "a phase of the pattern that ends first",
        lambda: MixedSparsityTraining(attention_phase=(0.9, 0.1)),
        "attention_phase is [0.9, 0.1]: it ends before it begins. Give the first",
    ),
    call(
        "a phase of the pattern that is a number",
        lambda: MixedSparsityTraining(attention_phase=0.5),
        "attention_phase is 0.5; it is a pair: the first step that attends by the",
    ),
    call(
        "an execution that is none",
        lambda: MixedSparsityTraining(execution="sparse"),
        "execution is 'sparse'; it is one of 'compact', 'masked'.",
    ),
    call(
        "a sparsity preset that is none",
        lambda: MixedSparsityTraining(preset="paper"),
        "preset is 'paper'; it is one of 'paper_4x', or None.",
    ),
    # Composition and ledger
    call(
        "a warm-up above the run",
        lambda: Composition(dense_warmup=2.0),
        "dense_warmup is 2.0; it is a number of optimizer steps (int), or a share",
    ),
    call(
        "a tail that is text",
        lambda: Composition(dense_tail="end"),
        "dense_tail is 'end'; it is a number of optimizer steps (int), or a share",
    ),
    call(
        "a level below none",
        lambda: Composition(drop_levels=[-1]),
        "drop_levels is [-1]; it is a list of levels, such as [0].",
    ),
    call(
        "levels to drop at that are a number",
        lambda: Composition(drop_levels=0),
        "drop_levels is 0; it is a list of levels, such as [0].",
    ),
    call(
        "no level to drop at",
        lambda: Composition(drop_levels=[]),
        "drop_levels is empty: nothing would ever be dropped. Leave the methods out",
    ),
    call(
        "a least cost of all",
        lambda: Composition(least_cost=1),
        "least_cost is 1; it is a share of the FLOPs of a dense run, in [0, 1).",
    ),
    call(
        "schedules that are none",
        lambda: Composition(schedules="phase"),
        "schedules is 'phase'; allowed are 'run', 'level'.",
    ),
    call(
        "a monitor that is one name",
        lambda: ComputeLedger(monitor="val/loss"),
        "monitor is 'val/loss'; it is a list of names of logged metrics, such as",
    ),
    # Tasks
    call(
        "a model that is a number",
        lambda: CausalLM(3),
        "model is 3; it is a model type such as 'gpt2', a folder, or a name on the",
    ),
    call(
        "a model without a name",
        lambda: CausalLM(""),
        "model is ''; it is a model type such as 'gpt2', a folder, or a name on the",
    ),
    call(
        "a masked model without a masked head",
        lambda: MaskedLM("gpt2"),
        "model='gpt2' has no head for this task: transformers has no",
    ),
    call("no vocabulary", lambda: CausalLM("gpt2", vocab_size=0), "vocab_size is 0; it is a whole number, at least 1."),
    call(
        "a weight decay that is text",
        lambda: CausalLM("gpt2", weight_decay="some"),
        "weight_decay is 'some'; it is a number, at least 0, or None.",
    ),
    call(
        "a mixing alpha that is NaN",
        lambda: ImageClassification("deit_tiny_patch16_224", mixup=math.nan),
        "mixup must be at least 0, which turns it off, and is nan",
    ),
    call(
        "no class",
        lambda: ImageClassification("deit_tiny_patch16_224", num_classes=0),
        "'deit_tiny_patch16_224' has num_classes=0; classification needs at least",
    ),
    call(
        "images of no pixel",
        lambda: ImageClassification("deit_tiny_patch16_224", image_size=0),
        "timm cannot build 'deit_tiny_patch16_224' from model_kwargs and the shape",
    ),
    # Data
    call(
        "a batch of half a sample",
        lambda: TextDataModule(batch_size=0.5),
        "batch_size must be a whole number, at least 1, and is 0.5",
    ),
    call(
        "a block of true tokens",
        lambda: TextDataModule(block_size=True),
        "block_size must be a whole number, at least 2, a token and the one that",
    ),
    call(
        "an objective that is none",
        lambda: TextDataModule(objective="mlm"),
        'objective must be "causal" or "masked", and is \'mlm\'',
    ),
    call(
        "a held-out share that is NaN",
        lambda: TextDataModule(val_fraction=math.nan),
        "val_fraction must be a number between 0 and 1, and is nan",
    ),
    call(
        "a held-out share that is text",
        lambda: ImageDataModule(val_fraction="some"),
        "val_fraction must be between 0 and 1, and is 'some'",
    ),
    call(
        "a crop that is a number",
        lambda: ImageDataModule(crop_scale=0.5),
        "crop_scale must be two shares of the image, in (0, 1], ascending, and is",
    ),
    call("a seed that is a fraction", lambda: ImageDataModule(seed=0.5), "seed must be a whole number, and is 0.5"),
    call(
        "no held-out batch", lambda: ImageDataModule(val_batches=0), "val_batches must be None or at least 1, and is 0"
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_where_it_is_given(row, tmp_path, monkeypatch):
    run_call(row, tmp_path, monkeypatch)
