"""The ledger through Trainer.fit: what it counts, what it writes, and that nothing else changes."""

from __future__ import annotations

import copy
import csv
import pickle
import time

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, IterableDataset

import lit_accel.strategies  # noqa: F401
from lit_accel.anatomy import AnatomyError, anatomy_of, build_resized, find_transformer
from lit_accel.compute import ComputeLedger, forward_flops, read_ledger, training_flops
from lit_accel.compute.table import FILE_NAME
from lit_accel.resizing import ensure_resizable, replace_transformer
from tests.training import TinyModule, loader, make_trainer

BATCH, TOKENS = 8, 12
FULL, HALF = (1, 1), (2, 2)


class Resize(L.Callback):
    """Resizes at given steps: ``{step: (width factor, depth factor)}``."""

    def __init__(self, plan):
        self.plan = plan

    def setup(self, trainer, pl_module, stage):
        ensure_resizable(pl_module)
        self.full = anatomy_of(find_transformer(pl_module)[1])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        due = [step for step in self.plan if step <= trainer.global_step]
        if not due:
            return
        size = self.full.reduced(*self.plan[max(due)])
        path, transformer = find_transformer(pl_module)
        anatomy = anatomy_of(transformer)

        def rebuild():
            torch.manual_seed(trainer.global_step)
            resized = build_resized(transformer, anatomy, size)
            for parameter in resized.parameters():
                parameter.data.normal_(std=0.02)
            replace_transformer(pl_module, path, resized)

        if anatomy.size != size:
            trainer.strategy.resize(rebuild)


def cost(module, factors=FULL, num_batches=1, **options):
    anatomy = anatomy_of(module.net)
    return num_batches * training_flops(anatomy.at(anatomy.reduced(*factors)), BATCH, TOKENS, **options).total


def rows(folder):
    with (folder / FILE_NAME).open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("ledger_first", [True, False])
def test_each_phase_costs_what_the_closed_form_says(tmp_path, capsys, ledger_first):
    module, full = TinyModule(), TinyModule()
    ledger = ComputeLedger()
    callbacks = [ledger, Resize({3: HALF, 7: FULL})][:: 1 if ledger_first else -1]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=9, log_every_n_steps=1)
    trainer.fit(module, loader(num_samples=80), loader(num_samples=16))

    phases = ledger.phases.list
    assert [phase.steps for phase in phases] == [3, 4, 2]
    assert [phase.tokens for phase in phases] == [steps * BATCH * TOKENS for steps in (3, 4, 2)]
    assert [phase.flops for phase in phases] == [cost(full, FULL, 3), cost(full, HALF, 4), cost(full, FULL, 2)]
    assert [phase.dense_flops for phase in phases] == [cost(full, FULL, n) for n in (3, 4, 2)]
    assert phases[1].num_parameters < phases[0].num_parameters == phases[2].num_parameters
    assert all(phase.seconds > 0 for phase in phases)

    table = read_ledger(tmp_path)
    steps = table.step.tolist()
    assert steps == list(range(1, 10))
    assert table.phase.tolist() == [0] * 3 + [1] * 4 + [2] * 2
    assert table.flops[-1] == ledger.phases.total.flops
    assert table.dense_flops[-1] == cost(full, FULL, 9)
    assert (table.seconds[1:] > table.seconds[:-1]).all()
    printed = capsys.readouterr().out
    assert f"{1 - table.flops[-1] / table.dense_flops[-1]:.1%}" in printed
    assert f"{phases[1].num_parameters / 1e3:.3g}k" in printed


def test_a_model_that_begins_small_has_no_empty_phase(tmp_path):
    ledger = ComputeLedger()
    full = TinyModule()
    trainer = make_trainer(tmp_path, callbacks=[ledger, Resize({0: HALF, 2: FULL})], max_steps=3)
    trainer.fit(TinyModule(), loader())
    assert [phase.flops for phase in ledger.phases.list] == [cost(full, HALF, 2), cost(full)]
    assert ledger.phases.total.dense_flops == cost(full, FULL, 3)


class ManyForwards(TinyModule):
    """Three forward calls a batch, one of them in evaluation mode, and one without gradients."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.loss(batch[:2])
        # What from_pretrained returns is in evaluation mode, and trains all the same.
        self.net.eval()
        loss = self.loss(batch)
        self.net.train()
        return loss + self.loss(batch) + self.loss(batch)


def test_counts_every_forward_call_of_training_batches_and_no_other(tmp_path):
    module, ledger = ManyForwards(), ComputeLedger()
    trainer = make_trainer(tmp_path, callbacks=[ledger], max_steps=2, accumulate_grad_batches=3)
    trainer.fit(module, loader(), loader(num_samples=16))
    batch = 3 * cost(module) + forward_flops(anatomy_of(module.net), 2, TOKENS).total
    (phase,) = ledger.phases.list
    assert (phase.steps, phase.flops, phase.dense_flops) == (2, 6 * batch, 6 * batch)
    assert phase.tokens == 6 * (3 * BATCH + 2) * TOKENS


def test_warns_if_nothing_is_counted(tmp_path):
    class Parts(TinyModule):
        def training_step(self, batch, batch_idx):
            return self.net.lm_head(self.net.transformer(input_ids=batch).last_hidden_state).mean()

    with pytest.warns(UserWarning, match="nothing was counted"):
        make_trainer(tmp_path, callbacks=[ComputeLedger(print_table=False)], max_steps=2).fit(Parts(), loader())


def test_activation_checkpointing_repeats_the_blocks(tmp_path):
    module, ledger = TinyModule(), ComputeLedger()
    module.net.gradient_checkpointing_enable({"use_reentrant": False})
    make_trainer(tmp_path, callbacks=[ledger], max_steps=2).fit(module, loader())
    expected = cost(module, num_batches=2, activation_checkpointing=True)
    assert ledger.phases.total.flops == expected > cost(module, num_batches=2)


# --- the table and resuming

PLAN = {6: HALF, 13: FULL}


def fit(folder, max_epochs, ckpt_path=None, callbacks=(), log_every_n_steps=3, **kwargs):
    """Epochs of five steps with a validation after each; returns the trainer."""
    trainer = make_trainer(
        folder,
        callbacks=[ComputeLedger(print_table=False), Resize(PLAN), *callbacks],
        max_epochs=max_epochs,
        log_every_n_steps=log_every_n_steps,
        **kwargs,
    )
    trainer.fit(TinyModule(), loader(num_samples=40), loader(num_samples=16), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit(folder, max_epochs=4)
    return rows(folder)


def test_rows_hold_the_metrics_where_they_were_measured(uninterrupted):
    # The phase that ends at step 13 has its last row there, although none is due.
    assert [int(row["step"]) for row in uninterrupted] == [3, 5, 6, 9, 10, 12, 13, 15, 15, 18, 20]
    assert [int(row["phase"]) for row in uninterrupted] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    measured = [row["step"] for row in uninterrupted if row["val/loss"]]
    assert measured == ["5", "10", "15", "20"]


def test_what_a_step_costs_is_of_the_steps_since_the_resume(tmp_path):
    """The first that is logged after it: not a mean over the steps of before, which were of another size."""
    fit(tmp_path, max_epochs=2).save_checkpoint(tmp_path / "stopped.ckpt")
    logger, module = CSVLogger(tmp_path, name="", version="resumed"), TinyModule()
    fit(tmp_path, max_epochs=3, ckpt_path=tmp_path / "stopped.ckpt", logger=logger)
    with (tmp_path / "resumed" / "metrics.csv").open() as file:
        logged = [float(row["compute/step_flops"]) for row in csv.DictReader(file) if row["compute/step_flops"]]
    # After steps 12 and 15, of which the small phase has all but the last two.
    assert logged == [cost(module, HALF), (cost(module, HALF) + cost(module, FULL, 2)) / 3]


# Stopped at full size, and in the small phase.
@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("new_folder", [False, True])
def test_a_resumed_run_writes_the_same_table(tmp_path, uninterrupted, stop, new_folder):
    checkpoint = tmp_path / "stopped.ckpt"
    fit(tmp_path, max_epochs=stop).save_checkpoint(checkpoint)
    folder = tmp_path / "resumed" if new_folder else tmp_path
    fit(folder, max_epochs=4, ckpt_path=checkpoint)
    assert rows(folder) == uninterrupted


def test_rows_after_the_resumed_step_are_dropped(tmp_path, uninterrupted):
    """A run that died at step 7 goes on from its checkpoint of step 4."""
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(tmp_path, max_epochs=-1, max_steps=7, callbacks=[saving], enable_checkpointing=True)
    assert [row["step"] for row in rows(tmp_path)] == ["3", "5", "6", "7"]
    fit(tmp_path, max_epochs=4, ckpt_path=tmp_path / "step=4.ckpt")
    # The data of an unfinished epoch is read anew, so losses differ.
    assert [{**row, "val/loss": ""} for row in rows(tmp_path)] == [{**row, "val/loss": ""} for row in uninterrupted]


def test_an_evaluation_within_an_accumulated_step_has_one_row(tmp_path):
    """A run that died after it goes on from before it, and evaluates again."""
    options = {"max_epochs": -1, "accumulate_grad_batches": 4, "val_check_interval": 3, "check_val_every_n_epoch": None}

    class Dies(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            # After the evaluation of six batches, of which the sixth is the first of four of a step.
            if trainer.fit_loop.epoch_loop.total_batch_idx == 6:
                raise KeyboardInterrupt

    saving = ModelCheckpoint(tmp_path / "stopped", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    with pytest.raises(SystemExit):
        fit(tmp_path / "stopped", max_steps=4, callbacks=[saving, Dies()], enable_checkpointing=True, **options)
    assert [row["step"] for row in rows(tmp_path / "stopped")] == ["0", "2"]
    fit(tmp_path / "stopped", max_steps=4, ckpt_path=tmp_path / "stopped" / "step=2.ckpt", **options)
    fit(tmp_path / "whole", max_steps=4, **options)
    whole, stopped = ([(row["step"], row["tokens"]) for row in rows(tmp_path / name)] for name in ("whole", "stopped"))
    assert stopped == whole


def test_a_row_that_only_the_end_of_a_run_wrote_is_dropped_when_it_goes_on(tmp_path):
    fit(tmp_path, max_epochs=-1, max_steps=4).save_checkpoint(tmp_path / "stopped.ckpt")
    assert [row["step"] for row in rows(tmp_path)] == ["3", "4"]
    fit(tmp_path, max_epochs=-1, max_steps=7, ckpt_path=tmp_path / "stopped.ckpt")
    assert [row["step"] for row in rows(tmp_path)] == ["3", "5", "6", "7"]


def test_a_new_run_in_the_same_folder_begins_a_new_table_and_keeps_the_old_one(tmp_path):
    lengths = (2, 3, 4)
    for number, length in enumerate(lengths):
        trainer = make_trainer(tmp_path, callbacks=[ComputeLedger()], max_steps=length)
        if number == 0:
            trainer.fit(TinyModule(), loader())
        else:
            with pytest.warns(UserWarning, match="is of another run; it was moved"):
                trainer.fit(TinyModule(), loader())
    assert [row["step"] for row in rows(tmp_path)] == ["4"]
    assert [rows(tmp_path / f"version_{number}")[0]["step"] for number in (0, 1)] == ["2", "3"]


def test_a_run_that_goes_on_finds_its_own_table(tmp_path):
    """In a folder where another run has written since, and after its folder was moved, with its checkpoints."""
    fit(tmp_path, max_epochs=-1, max_steps=4).save_checkpoint(tmp_path / "stopped.ckpt")
    fit(tmp_path, max_epochs=-1, max_steps=6)
    first, other = rows(tmp_path / "version_0"), rows(tmp_path)
    fit(tmp_path, max_epochs=-1, max_steps=7, ckpt_path=tmp_path / "stopped.ckpt")
    assert rows(tmp_path)[:1] == first[:1]
    assert [row["step"] for row in rows(tmp_path)] == ["3", "5", "6", "7"]
    assert rows(tmp_path / "version_1") == other

    moved = tmp_path.parent / f"{tmp_path.name}_moved"
    tmp_path.rename(moved)
    fit(tmp_path, max_epochs=-1, max_steps=7, ckpt_path=moved / "stopped.ckpt")
    assert [row["step"] for row in rows(tmp_path)] == ["3", "5", "6", "7"]


def test_a_table_that_begins_anew_is_found_later(tmp_path):
    """Gone on with from before its first row, or without the rows of before."""
    fit(tmp_path, max_epochs=-1, max_steps=2).save_checkpoint(tmp_path / "early.ckpt")
    fit(tmp_path, max_epochs=-1, max_steps=4, ckpt_path=tmp_path / "early.ckpt").save_checkpoint(tmp_path / "late.ckpt")
    (tmp_path / FILE_NAME).unlink()
    with pytest.warns(UserWarning, match="neither in"):
        again = fit(tmp_path, max_epochs=-1, max_steps=6, ckpt_path=tmp_path / "late.ckpt")
    again.save_checkpoint(tmp_path / "later.ckpt")
    first = rows(tmp_path)[0]
    fit(tmp_path, max_epochs=-1, max_steps=9, ckpt_path=tmp_path / "later.ckpt")
    assert rows(tmp_path)[0] == first
    assert not (tmp_path / "version_0").exists()


def test_says_if_a_table_is_not_found(tmp_path):
    fit(tmp_path, max_epochs=-1, max_steps=4).save_checkpoint(tmp_path / "stopped.ckpt")
    (tmp_path / FILE_NAME).unlink()
    with pytest.warns(UserWarning, match="neither in .* nor beside"):
        fit(tmp_path, max_epochs=-1, max_steps=7, ckpt_path=tmp_path / "stopped.ckpt")


def test_runs_of_loggers_that_share_a_folder_have_one_each(tmp_path):
    """As those of Weights & Biases and MLflow do."""

    class Shared(Logger):
        save_dir, name = tmp_path / "all", "project"

        def __init__(self, version):
            super().__init__()
            self._version = version

        @property
        def version(self):
            return self._version

        def log_metrics(self, *args, **kwargs):
            pass

        def log_hyperparams(self, *args, **kwargs):
            pass

    for version in ("a1b2", 3):
        trainer = make_trainer(tmp_path, callbacks=[ComputeLedger()], max_steps=2, logger=Shared(version))
        trainer.fit(TinyModule(), loader())
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob(FILE_NAME))
    assert found == [f"all/project/{version}/{FILE_NAME}" for version in ("a1b2", "version_3")]


def test_a_batch_that_failed_is_counted_once(tmp_path):
    class Fails(TinyModule):
        def on_before_zero_grad(self, optimizer):
            if self.trainer.global_step == 3 and not self.has_failed:
                raise ConnectionError

    saver = OnExceptionCheckpoint(tmp_path, "failed")
    modules = Fails(), Fails()
    modules[0].has_failed, modules[1].has_failed = False, True
    ledger = ComputeLedger()
    with pytest.raises(ConnectionError):
        make_trainer(tmp_path, callbacks=[ledger, saver], max_steps=6, enable_checkpointing=True).fit(
            modules[0], loader()
        )
    ledger = ComputeLedger()
    make_trainer(tmp_path, callbacks=[ledger], max_steps=6).fit(
        modules[1], loader(), ckpt_path=tmp_path / "failed.ckpt"
    )
    whole = ComputeLedger()
    make_trainer(tmp_path / "whole", callbacks=[whole], max_steps=6).fit(TinyModule(), loader())
    assert ledger.phases.total.flops == whole.phases.total.flops
    assert ledger.phases.total.steps == whole.phases.total.steps == 6


def test_seconds_leave_out_what_sets_validation_up(tmp_path):
    class SlowToBegin(IterableDataset):
        def __iter__(self):
            time.sleep(0.5)
            yield from loader(num_samples=8).dataset

    ledger = ComputeLedger()
    trainer = make_trainer(tmp_path, callbacks=[ledger], max_steps=4, val_check_interval=1, num_sanity_val_steps=0)
    began = time.perf_counter()
    trainer.fit(TinyModule(), loader(), DataLoader(SlowToBegin(), batch_size=8))
    assert time.perf_counter() - began > 2.0
    assert ledger.phases.total.seconds < 1.0
    # Nothing of it is left in the loop.
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)


def test_a_row_that_was_cut_short_is_no_row(tmp_path):
    fit(tmp_path, max_epochs=-1, max_steps=9)
    path = tmp_path / FILE_NAME
    whole = read_ledger(path).step.tolist()
    for length in (1, 3, 8):
        text = path.read_text()
        path.write_text(text[:-length])
        assert read_ledger(path).step.tolist() == whole[:-1]
        path.write_text(text)


def test_seconds_leave_validation_out(tmp_path):
    class Slow(TinyModule):
        def training_step(self, batch, batch_idx):
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            time.sleep(0.2)
            return super().validation_step(batch, batch_idx)

    ledger = ComputeLedger()
    trainer = make_trainer(tmp_path, callbacks=[ledger], max_epochs=2, num_sanity_val_steps=1)
    begin = time.perf_counter()
    trainer.fit(Slow(), loader(num_samples=32), loader(num_samples=16))
    elapsed = time.perf_counter() - begin
    # 8 training batches; 4 validation batches and one of the sanity check.
    assert 8 * 0.02 <= ledger.phases.total.seconds <= elapsed - 5 * 0.2


# --- what others see of it


def test_training_is_bitwise_what_it_is_without(tmp_path):
    weights = []
    for callbacks in ([], [ComputeLedger()]):
        module = TinyModule()
        trainer = make_trainer(tmp_path, callbacks=[*callbacks, Resize({2: HALF})], max_steps=4)
        trainer.fit(module, loader(), loader(num_samples=16))
        weights.append(module.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


class CopyInTraining(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert pl_module.net._forward_pre_hooks
        self.keys = set(pl_module.state_dict())
        self.copies = [copy.deepcopy(pl_module.net), pickle.loads(pickle.dumps(pl_module.net))]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for net in getattr(self, "copies", ()):
            net(input_ids=batch)


def test_the_module_can_be_copied_and_keeps_no_hook(tmp_path):
    module, ledger, copier = TinyModule(), ComputeLedger(), CopyInTraining()
    keys = set(module.state_dict())
    make_trainer(tmp_path, callbacks=[ledger, copier], max_steps=2).fit(module, loader())
    assert copier.keys == keys
    assert ledger.phases.total.flops == cost(module, num_batches=2)
    assert not module.net._forward_pre_hooks
    assert not torch.nn.modules.module._global_module_registration_hooks
    assert not hasattr(module, "flops_per_batch")


def test_no_hook_is_left_after_an_error(tmp_path):
    class Broken(TinyModule):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    module = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(tmp_path, callbacks=[ComputeLedger()], max_steps=2).fit(module, loader())
    assert not module.net._forward_pre_hooks
    assert not torch.nn.modules.module._global_module_registration_hooks


def test_logs_to_any_logger(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    full = TinyModule()
    trainer = make_trainer(
        tmp_path, callbacks=[ComputeLedger(), Resize({2: HALF})], max_steps=4, logger=logger, log_every_n_steps=2
    )
    trainer.fit(TinyModule(), loader())
    with (tmp_path / "metrics.csv").open() as file:
        everything = list(csv.DictReader(file))
    logged = [row for row in everything if row["compute/flops"]]
    # At the steps of the losses, which self.log counts from zero.
    assert [row["step"] for row in logged] == ["1", "3"]
    assert [row["step"] for row in everything if row["train/loss"]] == ["1", "3"]
    last = {name.removeprefix("compute/"): float(value) for name, value in logged[1].items() if "compute" in name}
    spent, dense = cost(full, FULL, 2) + cost(full, HALF, 2), cost(full, FULL, 4)
    assert (last["flops"], last["dense_flops"], last["step_flops"]) == (spent, dense, cost(full, HALF))
    assert last["saved_share"] == 1 - spent / dense
    assert last["tokens"] == 4 * BATCH * TOKENS
    assert last["seconds"] > 0
    assert (tmp_path / FILE_NAME).is_file()


class Recorder(ThroughputMonitor):
    def __init__(self):
        super().__init__(batch_size_fn=len, window_size=2)
        self.read = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        self.read.append(pl_module.flops_per_batch)


@pytest.mark.parametrize("monitor_first", [True, False])
def test_throughput_monitor_reads_the_present_cost(tmp_path, monitor_first):
    logger, recorder, full = CSVLogger(tmp_path, name="", version=""), Recorder(), TinyModule()
    callbacks = [recorder, ComputeLedger(), Resize({3: HALF})][:: 1 if monitor_first else -1]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=5, logger=logger, log_every_n_steps=1)
    trainer.fit(TinyModule(), loader())
    assert recorder.read == [cost(full)] * 3 + [cost(full, HALF)] * 2
    with (tmp_path / "metrics.csv").open() as file:
        assert any(float(row["train/device/flops_per_sec"] or 0) > 0 for row in csv.DictReader(file))


def test_a_module_keeps_its_own_flops_per_batch(tmp_path):
    class Own(TinyModule):
        @property
        def flops_per_batch(self):
            return 7

    recorder = Recorder()
    make_trainer(tmp_path, callbacks=[recorder, ComputeLedger()], max_steps=2).fit(Own(), loader())
    assert recorder.read == [7, 7]


def test_a_fast_development_run_leaves_no_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path, callbacks=[ComputeLedger()], fast_dev_run=True).fit(TinyModule(), loader(), loader())
    assert not list(tmp_path.rglob(FILE_NAME))


def test_validation_alone_counts_nothing(tmp_path):
    ledger = ComputeLedger()
    make_trainer(tmp_path, callbacks=[ledger]).validate(TinyModule(), loader(num_samples=8), verbose=False)
    assert not ledger.phases.list
    assert not list(tmp_path.rglob(FILE_NAME))


def test_tells_which_metric_is_not_logged(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[ComputeLedger(monitor=["val/los"])], max_epochs=1)
    with pytest.warns(UserWarning, match=r"monitors val/los, .* train/loss, val/loss"):
        trainer.fit(TinyModule(), loader(num_samples=8), loader(num_samples=8))


def test_refuses_a_module_without_a_transformer_at_setup(tmp_path):
    module = TinyModule()
    module.net = torch.nn.Linear(2, 2)
    with pytest.raises(AnatomyError, match="No transformer with a registered anatomy"):
        make_trainer(tmp_path, callbacks=[ComputeLedger()], max_steps=1).fit(module, loader())


def test_goes_on_when_the_same_trainer_fits_again(tmp_path):
    ledger = ComputeLedger()
    trainer = make_trainer(tmp_path, callbacks=[ledger], max_steps=2, log_every_n_steps=3)
    module = TinyModule()
    trainer.fit(module, loader())
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(module, loader())
    assert ledger.phases.total.steps == 5
    assert ledger.phases.total.flops == cost(module, num_batches=5)
    assert [row["step"] for row in rows(tmp_path)] == ["3", "5"]
