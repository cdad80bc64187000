"""A run of mixed sparsity training that was interrupted in any phase is the uninterrupted one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lit_accel import ComputeLedger
from tests.data.saving import SaveAlways
from tests.distributed.launch import CONTEXT
from tests.methods.mixed_sparsity import (
    ELEMENTS,
    STEPS,
    UNITS,
    AnyFamily,
    Watch,
    assert_equal,
    assert_same_moments,
    fit,
    method,
    rows,
    units_for,
)

# The number of steps done: in the dense start, before and after the first and later updates, in the middle of
# ultra-sparsification, before and in restoration, and in the dense end.
PHASES = [2, 3, 4, 5, 6, 8, 9, 13, 14, 16, 19, 21]
# A pattern of attention that begins and ends between them.
ATTENTION = {"attention_pattern": "union", "attention_phase": (5, 15)}


class Run:
    """A run with everything that must be the same afterwards."""

    def __init__(self, folder, *, name="gpt2-tied", module_seed=0, resume=None, saves=(), trainer=None, **given):
        self.method = method(**given)
        self.watch, self.ledger = Watch(self.method), ComputeLedger(print_table=False)
        callbacks = [self.method, self.watch, self.ledger, *saves]
        options = {"log_every_n_steps": 1, "enable_checkpointing": True, "gradient_clip_val": 0.5, **(trainer or {})}
        if not any(isinstance(each, ModelCheckpoint) for each in saves):
            options["enable_checkpointing"] = False
        self.module = fit(folder, callbacks, AnyFamily(name, seed=module_seed), resume=resume, **options)
        with open(Path(folder) / "compute_ledger.csv") as file:
            self.table = [{key: row[key] for key in row if key != "seconds"} for row in csv.DictReader(file)]
        self.phases = [(p.size, p.steps, p.tokens, p.flops, p.head_masked_flops) for p in self.ledger.phases.list]

    def assert_is_rest_of(self, whole, steps, micro_batches=1):
        assert self.module.seen == whole.module.seen[micro_batches * steps :]
        assert_equal(self.module, whole.module)
        assert_same_moments(self.module, whole.module)
        for step in range(steps, STEPS):
            assert_equal(self.watch.masks[step], whole.watch.masks[step])
        assert self.watch.digests == {s: d for s, d in whole.watch.digests.items() if s >= steps}
        mine, theirs = (each.method.state_dict() for each in (self, whole))
        assert mine["rules"] == theirs["rules"]
        assert_equal(mine["units"]["masks"], theirs["units"]["masks"])
        assert mine["units"]["num_replaced"] == theirs["units"]["num_replaced"]
        total, expected = self.ledger.phases.total, whole.ledger.phases.total
        for key in ("steps", "tokens", "flops", "dense_flops", "head_masked_flops", "head_excluded_flops"):
            assert getattr(total, key) == getattr(expected, key)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    made = {}

    def get(units, **more):
        key = (units, *sorted(more))
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[key] = Run(folder, saves=[SaveAlways(folder)], **UNITS[units], **more), folder
        return made[key]

    return get


@pytest.mark.parametrize("steps", PHASES)
@pytest.mark.parametrize("units", sorted(UNITS))
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, whole_runs, units, steps):
    whole, folder = whole_runs(units, **ATTENTION)
    again = Run(tmp_path, module_seed=steps, resume=folder / f"batch-{steps}.ckpt", **UNITS[units], **ATTENTION)
    again.assert_is_rest_of(whole, steps)


@pytest.mark.parametrize("steps", [5, 9, 16])
def test_the_books_of_a_resumed_run_are_those_of_the_uninterrupted_one(tmp_path, whole_runs, steps):
    """Phase by phase, and row by row: resuming opens no phase of its own."""
    whole, folder = whole_runs("neurons and heads", **ATTENTION)
    again = Run(tmp_path, resume=folder / f"batch-{steps}.ckpt", **ATTENTION)
    assert again.phases == whole.phases
    assert again.table == whole.table


@pytest.mark.parametrize("steps", [3, 9, 16])
def test_masked_execution_resumes_too(tmp_path, whole_runs, steps):
    whole, folder = whole_runs("neurons and heads", execution="masked")
    again = Run(tmp_path, module_seed=5, resume=folder / f"batch-{steps}.ckpt", execution="masked")
    again.assert_is_rest_of(whole, steps)


@pytest.mark.parametrize("name", ["llama-gqa", "bert-mlm", "vit", "swin"])
def test_every_family_resumes(tmp_path, name):
    given = {"name": name, **units_for(name)}
    whole = Run(tmp_path, saves=[SaveAlways(tmp_path)], **given)
    for steps in (4, 11):
        again = Run(tmp_path / "again", module_seed=5, resume=tmp_path / f"batch-{steps}.ckpt", **given)
        again.assert_is_rest_of(whole, steps)


@pytest.mark.parametrize("units", ["neurons and heads", "elements", "tiles"])
def test_from_what_model_checkpoint_saves(tmp_path, units):
    def saves():
        return ModelCheckpoint(
            tmp_path / "saved", save_last=True, every_n_train_steps=1, save_top_k=-1, filename="{step}"
        )

    whole = Run(tmp_path, saves=[saves()], **UNITS[units])
    for steps in (4, 9, 15):
        path = tmp_path / f"saved/step={steps}.ckpt"
        again = Run(tmp_path / "again", module_seed=1, resume=path, **UNITS[units])
        again.assert_is_rest_of(whole, steps)
    last = torch.load(tmp_path / "saved/last.ckpt", weights_only=False)
    assert last["global_step"] == STEPS


@pytest.mark.parametrize("steps", [3, 4, 8, 13])
def test_with_validation_and_accumulation(tmp_path, steps):
    trainer = {"accumulate_grad_batches": 3, "val_check_interval": 6, "check_val_every_n_epoch": None}
    data = {"data": rows(num_batches=3 * STEPS)}
    whole = Run(tmp_path, saves=[SaveAlways(tmp_path)], trainer={**trainer, **data}, **ELEMENTS)
    path = tmp_path / f"batch-{3 * steps}.ckpt"
    again = Run(tmp_path / "again", module_seed=1, resume=path, trainer={**trainer, **data}, **ELEMENTS)
    again.assert_is_rest_of(whole, steps, micro_batches=3)
    # Within a step, in which the topology has changed already or is about to: the rest of the step is the same.
    for micro_batch in (1, 2):
        path = tmp_path / f"batch-{3 * steps + micro_batch}.ckpt"
        within = Run(tmp_path / "within", module_seed=1, resume=path, trainer={**trainer, **data}, **ELEMENTS)
        rest = 3 - micro_batch
        assert within.module.seen[:rest] == whole.module.seen[3 * steps + micro_batch :][:rest]
        counts = whole.method.targets.counts
        assert within.watch.num_on(STEPS - 1) == {name: [number] for name, number in counts(STEPS - 1).items()}
        if steps == 3:
            # Its units were dropped before its first micro-batch, and must not be dropped once more.
            assert_equal(within.watch.masks[steps], whole.watch.masks[steps])


def test_over_epochs(tmp_path):
    trainer = {"max_epochs": 4, "max_steps": -1, "data": rows(num_batches=6)}
    whole = Run(tmp_path, saves=[SaveAlways(tmp_path)], trainer=trainer)
    assert whole.watch.changes[0] == 3
    for path in (tmp_path / "epoch-12.ckpt", tmp_path / "batch-10.ckpt"):
        steps = int(path.stem.split("-")[1])
        again = Run(tmp_path / "again", module_seed=1, resume=path, trainer=trainer)
        again.assert_is_rest_of(whole, steps)


@pytest.mark.parametrize("order", ["left", "right"])
def test_what_is_saved_when_a_run_breaks_is_whole_and_resumes(tmp_path, order):
    whole = Run(tmp_path / "whole")

    class Breaks(AnyFamily):
        def training_step(self, batch, batch_idx):
            if batch_idx == 11:
                raise RuntimeError("broken on purpose")
            return super().training_step(batch, batch_idx)

    saves = OnExceptionCheckpoint(tmp_path, "broken")
    callbacks = [saves, method()] if order == "left" else [method(), saves]
    with pytest.raises(RuntimeError, match="broken on purpose"):
        fit(tmp_path, callbacks, Breaks(), gradient_clip_val=0.5, enable_checkpointing=True)
    again = AnyFamily(seed=3)
    fit(tmp_path, [method()], again, resume=tmp_path / "broken.ckpt", gradient_clip_val=0.5)
    assert again.seen == whole.module.seen[11:]
    assert_equal(again, whole.module)


def _resumed(folder, steps, results):
    torch.set_num_threads(1)
    torch.manual_seed(1234)
    again = Run(folder / "again", module_seed=77, resume=folder / f"batch-{steps}.ckpt", **ATTENTION)
    weights = {name: value.numpy() for name, value in again.module.state_dict().items()}
    results.put((again.module.seen, again.watch.digests, weights, again.ledger.phases.total.flops))


@pytest.mark.processes
def test_in_another_process(whole_runs):
    whole, folder = whole_runs("neurons and heads", **ATTENTION)
    results = CONTEXT.Queue()
    process = CONTEXT.Process(target=_resumed, args=(folder, 9, results))
    process.start()
    seen, digests, weights, flops = results.get(timeout=120)
    process.join()
    assert seen == whole.module.seen[9:]
    assert digests == {step: digest for step, digest in whole.watch.digests.items() if step >= 9}
    for name, value in whole.module.state_dict().items():
        assert torch.equal(torch.from_numpy(weights[name]), value), name
    assert flops == whole.ledger.phases.total.flops


# What cannot be resumed


@pytest.mark.parametrize("changed", [ELEMENTS, {"ffn_units": "dense"}, {"block_size": 8, **UNITS["tiles"]}])
def test_other_units_than_the_checkpoints_are_refused(tmp_path, whole_runs, changed):
    _, folder = whole_runs("tiles" if "block_size" in changed else "neurons and heads", **ATTENTION)
    with pytest.raises(
        MisconfigurationException, match=f"other rules of mixed sparsity: {next(iter(changed))} .*Its masks say"
    ):
        Run(tmp_path, resume=folder / "batch-9.ckpt", **ATTENTION, **changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"update_every": 3, "seed": 4}, "update_every 2 (now 3), seed 0 (now 4)"),
        ({"execution": "masked"}, "execution compact (now masked)"),
        ({"attention_phase": (5, 16)}, "phase [5, 15] (now [5, 16])"),
    ],
)
def test_other_rules_than_the_checkpoints_are_warned_about(tmp_path, whole_runs, changed, said, recwarn):
    whole, folder = whole_runs("neurons and heads", **ATTENTION)
    again = Run(tmp_path, resume=folder / "batch-9.ckpt", **{**ATTENTION, **changed})
    warnings = [str(warning.message) for warning in recwarn if "rules of mixed sparsity" in str(warning.message)]
    expected = f"The checkpoint was trained with other rules of mixed sparsity: {said}. Those of now hold."
    assert warnings == ([] if said is None else [expected])
    assert again.watch.num_on(STEPS - 1) == whole.watch.num_on(STEPS - 1)


def test_a_plain_run_goes_on_sparse_and_a_sparse_one_plain(tmp_path, whole_runs):
    """The callback has no part in the weights: a checkpoint of either is one of the other."""
    fit(tmp_path, [SaveAlways(tmp_path)])
    callback = method()
    watch = Watch(callback)
    fit(tmp_path, [callback, watch], resume=tmp_path / "batch-9.ckpt")
    # In mid-schedule all units are on; with the next step as many are as there should be.
    assert watch.changes[0] == 9
    for step in range(9, STEPS):
        assert watch.num_on(step) == {name: [number] for name, number in callback.targets.counts(step).items()}
    _, folder = whole_runs("neurons and heads", **ATTENTION)
    module = fit(tmp_path, [], resume=folder / "batch-9.ckpt", data=DataLoader(range(512), batch_size=8))
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
