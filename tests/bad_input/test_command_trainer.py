"""Settings of the Trainer, strategies and other callbacks that the command refuses."""

from __future__ import annotations

import pytest

from tests.bad_input.harness import run_command
from tests.bad_input.rows import wrong

LTD = "--trainer.callbacks+=lit_accel.RandomLTD"
PLD = "--trainer.callbacks+=lit_accel.ProgressiveLayerDropping"
MST = "--trainer.callbacks+=lit_accel.MixedSparsityTraining"
LEVELS = "--trainer.callbacks+=lit_accel.MultiLevelTraining"
RESIZABLE = "--trainer.strategy=resizable"
LIGHTNING = "--trainer.callbacks+=lightning.pytorch.callbacks."


ROWS = [
    wrong(
        "a strategy that is none",
        "--trainer.strategy=resizble",
        "trainer.strategy is 'resizble', which is no strategy. Did you mean",
    ),
    wrong(
        "a sharded strategy that is none",
        "--trainer.strategy=resizable_fsdp",
        "trainer.strategy is 'resizable_fsdp', which is no strategy. Did you mean",
    ),
    wrong(
        "an accelerator that is none",
        "--trainer.accelerator=gpuu",
        "The Trainer refuses its settings: You selected an invalid accelerator",
    ),
    wrong(
        "a TPU that is not there",
        "--trainer.accelerator=tpu",
        "trainer.accelerator is 'tpu', and torch finds none on this machine. Set it",
    ),
    wrong(
        "no device", "--trainer.devices=0", "`Trainer(devices='0')` value is not a valid input using cpu accelerator."
    ),
    wrong(
        "devices that are none",
        "--trainer.devices=many",
        "The Trainer refuses its settings: `devices` selected with `CPUAccelerator`",
    ),
    wrong(
        "no node", "--trainer.num_nodes=0", "The Trainer refuses its settings: `num_nodes` must be a positive integer,"
    ),
    wrong(
        "no batch to accumulate",
        "--trainer.accumulate_grad_batches=0",
        "trainer.accumulate_grad_batches is 0; it is a number, at least 1.",
    ),
    wrong(
        "fewer than no epochs",
        "--trainer.max_epochs=-3",
        "`max_epochs` must be a non-negative integer or -1. You passed in -3.",
    ),
    wrong(
        "a share of batches above one",
        "--trainer.limit_train_batches=1.5",
        "You have passed invalid value 1.5 for limit_train_batches, it has to be in",
    ),
    wrong(
        "a negative number of batches",
        "--trainer.limit_val_batches=-1",
        "You have passed invalid value -1 for limit_val_batches, it has to be in",
    ),
    wrong(
        "no training batch",
        "--trainer.limit_train_batches=0",
        "trainer.limit_train_batches is 0: nothing would be trained. Give a number",
    ),
    wrong(
        "an interval of validation above the epoch",
        "--trainer.val_check_interval=1000000",
        "`val_check_interval` (1000000) must be less than or equal to the number of",
    ),
    wrong(
        "a negative gradient norm",
        "--trainer.gradient_clip_val=-1",
        "trainer.gradient_clip_val is -1; it is a number, at least 0.",
    ),
    wrong(
        "a clipping that is none",
        ("--trainer.gradient_clip_val=1", "--trainer.gradient_clip_algorithm=nrom"),
        "`gradient_clip_algorithm` nrom is invalid. Allowed algorithms: ['value',",
    ),
    wrong(
        "a time that is none",
        "--trainer.max_time=soon",
        "`Timer(duration='soon')` is not a valid duration. Expected a string in the",
    ),
    wrong(
        "rows never logged",
        "--trainer.log_every_n_steps=-1",
        "trainer.log_every_n_steps is -1; it is a number, at least 0.",
    ),
    wrong(
        "sanity steps below minus one",
        "--trainer.num_sanity_val_steps=-2",
        "trainer.num_sanity_val_steps is -2; it is a number, at least -1.",
    ),
    wrong(
        "a plugin that is none",
        "--trainer.plugins=nope",
        "trainer.plugins is 'nope'; it must be a list or null.",
        code=2,
    ),
    wrong(
        "a profiler that is none",
        "--trainer.profiler=nope",
        "When passing string value for the `profiler` parameter of `Trainer`, it",
    ),
    wrong(
        "a learning-rate monitor without a logger",
        f"{LIGHTNING}LearningRateMonitor",
        "Cannot use `LearningRateMonitor` callback with `Trainer` that has no",
    ),
    wrong(
        "checkpoints beside switched-off checkpoints",
        f"{LIGHTNING}ModelCheckpoint",
        "Trainer was configured with `enable_checkpointing=False` but found",
    ),
    wrong(
        "a checkpoint of fewer than none",
        ("--trainer.enable_checkpointing=true", f"{LIGHTNING}ModelCheckpoint", "--trainer.callbacks.save_top_k=-2"),
        "Invalid value for save_top_k=-2. Must be >= -1",
    ),
    wrong(
        "weights averaged while the size changes",
        (RESIZABLE, LEVELS, f"{LIGHTNING}StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"),
        "StochasticWeightAveraging averages weights of one size, and",
    ),
    wrong(
        "an EMA while the size changes",
        (RESIZABLE, LEVELS, f"{LIGHTNING}EMAWeightAveraging"),
        "EMAWeightAveraging averages weights of one size, and MultiLevelTraining",
    ),
    wrong(
        "an EMA beside sparsity",
        (MST, f"{LIGHTNING}EMAWeightAveraging"),
        "EMAWeightAveraging averages weights of one shape, which",
    ),
    wrong(
        "pruning beside sparsity",
        (MST, f"{LIGHTNING}ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured"),
        "ModelPruning masks the same weights, which MixedSparsityTraining takes out",
    ),
    wrong(
        "thawing beside levels",
        (RESIZABLE, LEVELS, f"{LIGHTNING}BackboneFinetuning"),
        "BackboneFinetuning moves named parameters between groups, and",
    ),
    wrong(
        "levels under DDP that cannot resize",
        ("--trainer.strategy=ddp", LEVELS),
        "MultiLevelTraining changes the model's size in mid-training, which",
    ),
    wrong(
        "levels under FSDP that cannot resize",
        ("--trainer.strategy=fsdp", LEVELS),
        "The Trainer refuses its settings: The strategy `fsdp` requires a GPU",
    ),
    wrong(
        "dropped layers under plain DDP",
        ("--trainer.strategy=ddp", PLD),
        "ProgressiveLayerDropping leaves parameters without a gradient, and DDP",
    ),
    wrong(
        "dropped layers under FSDP",
        ("--trainer.strategy=fsdp", PLD),
        "The Trainer refuses its settings: The strategy `fsdp` requires a GPU",
    ),
    wrong(
        "sparsity under sharded parameters",
        ("--trainer.strategy=model_parallel", MST),
        "trainer.strategy is 'model_parallel', which is no strategy. Did you mean",
    ),
    wrong(
        "DeepSpeed where it is not installed",
        "--trainer.strategy=deepspeed",
        "To use the `DeepSpeedStrategy`, you must have DeepSpeed installed. Install",
    ),
    wrong(
        "a method of layers and one of input tokens",
        (PLD, LTD, "--trainer.callbacks.scope=input"),
        "ProgressiveLayerDropping and RandomLTD do not go together as they are set:",
        base="vit",
    ),
    wrong(
        "two rules of composition",
        ("--trainer.callbacks+=lit_accel.Composition", "--trainer.callbacks+=lit_accel.Composition"),
        "trainer.callbacks has 2 callbacks Composition, with the same settings or",
    ),
    wrong(
        "a pattern while tokens are dropped",
        (LTD, MST, "--trainer.callbacks.attention_pattern=window"),
        "RandomLTD and MixedSparsityTraining do not go together as they are set: in",
    ),
    wrong(
        "a level's own schedule that ends too late",
        (
            RESIZABLE,
            LEVELS,
            '--trainer.callbacks.phases=[{"level": 0, "length": 1}, {"level": 1, "length": 1}]',
            "--trainer.max_steps=10",
        ),
        "The phases are shorter than the run: phase 1 (level 1) would end at step",
    ),
    wrong(
        "the paper's learning rate beside a schedule",
        (RESIZABLE, LEVELS, "--trainer.callbacks.preset=paper", "--model.lr_scheduler=lit_accel.tasks.WarmupDecay"),
        'learning_rate="paper" sets a schedule of its own in each phase, but',
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_before_training(row, tmp_path, monkeypatch, capsys, cache):
    run_command(row, tmp_path, cache, monkeypatch, capsys)
