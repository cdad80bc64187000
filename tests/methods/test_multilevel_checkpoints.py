"""Checkpoints of any phase: the size is right before the weights are loaded, wherever they are loaded."""

from __future__ import annotations

import logging
import warnings
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import (
    ComputeLedger,
    Level,
    MultiLevelMixin,
    MultiLevelTraining,
    Phase,
    ResizableMixin,
    SensitivityLayerDropping,
)
from lit_accel.anatomy import AnatomyError, anatomy_of
from lit_accel.resizing import full_size
from tests.models import make_model
from tests.training import SIZE, TinyModule, loader, make_trainer

PHASES = [Phase(0, 3), Phase(1, 6), Phase(0)]
SMALL_STEP = 6


class OwnHooks(ResizableMixin, TinyModule):
    """A user's module whose class can load checkpoints of any size by itself."""


@pytest.fixture(scope="module", params=[True, False], ids=["weights-only", "full"])
def small_checkpoint(tmp_path_factory, request):
    """A checkpoint from the small phase, and the weights that were saved into it."""
    folder = tmp_path_factory.mktemp("small")
    weights = {}

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == SMALL_STEP:
                weights.update({key: value.clone() for key, value in pl_module.state_dict().items()})

    save = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=request.param
    )
    trainer = make_trainer(
        folder,
        callbacks=[MultiLevelTraining(phases=PHASES), save, Keep()],
        enable_checkpointing=True,
        max_steps=12,
    )
    trainer.fit(TinyModule(), loader())
    return folder / f"step={SMALL_STEP}.ckpt", weights


def assert_is_small(module, weights):
    assert module.net.config.n_layer == 2
    state = module.state_dict()
    assert state.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(state[key], value)


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
@pytest.mark.parametrize("module_class", [TinyModule, OwnHooks])
def test_evaluation_of_a_small_phase(tmp_path, small_checkpoint, method, module_class, monkeypatch, caplog):
    # Lightning decides when it is imported whether its loggers pass on what they are given.
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    path, weights = small_checkpoint
    module = module_class()
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES)])
    with caplog.at_level("INFO"):
        getattr(trainer, method)(module, loader(num_samples=16), ckpt_path=path)
    assert_is_small(module, weights)
    assert "this is the model of level 1" in caplog.text


def test_evaluation_with_a_stock_trainer(tmp_path, small_checkpoint):
    path, weights = small_checkpoint
    module = OwnHooks()
    make_trainer(tmp_path, strategy="auto").validate(module, loader(num_samples=16), ckpt_path=path)
    assert_is_small(module, weights)


def test_load_from_checkpoint(small_checkpoint):
    path, weights = small_checkpoint
    assert_is_small(OwnHooks.load_from_checkpoint(path), weights)


class LeavesOut(OwnHooks):
    """Does not save what is frozen, as Lightning allows: at its own size the constructor makes it again."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.net.transformer.wpe.requires_grad_(False)

    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}


@pytest.fixture(scope="module")
def checkpoints_without_frozen(tmp_path_factory):
    """Checkpoints of a cycle, of which each lacks the weights that are frozen."""
    folder = tmp_path_factory.mktemp("frozen")
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [MultiLevelTraining(phases=PHASES), save]
    make_trainer(folder, callbacks=callbacks, enable_checkpointing=True, max_steps=12).fit(LeavesOut(), loader())
    return folder


@pytest.mark.parametrize("use", ["fit", "test", "load_from_checkpoint"])
def test_a_small_checkpoint_without_some_weights_is_refused(tmp_path, checkpoints_without_frozen, use):
    """What is only allocated would take their place."""
    path, module = checkpoints_without_frozen / f"step={SMALL_STEP}.ckpt", LeavesOut()
    net = module.net
    if use == "load_from_checkpoint":
        load = partial(LeavesOut.load_from_checkpoint, path, strict=False)
    else:
        trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES)], max_steps=12)
        load = partial(getattr(trainer, use), module, loader(num_samples=16), ckpt_path=path)
    with pytest.raises(MisconfigurationException, match=r"lacks 1 of its parameters: net\.transformer\.wpe\.weight\."):
        load()
    assert module.net is net


def test_a_checkpoint_of_the_size_that_is_there_may_leave_weights_out(tmp_path, checkpoints_without_frozen):
    module = LeavesOut()
    frozen = module.net.transformer.wpe.weight.clone()
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=[Phase(0)])])
    trainer.test(module, loader(num_samples=16), ckpt_path=checkpoints_without_frozen / "step=3.ckpt")
    assert torch.equal(module.net.transformer.wpe.weight, frozen)


@pytest.mark.parametrize("left_out", ["net.lm_head.weight", "net.transformer.wte.weight"])
def test_a_tied_weight_is_needed_once(tmp_path, small_checkpoint, left_out):
    path, weights = small_checkpoint
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"][left_out]
    torch.save(checkpoint, tmp_path / "once.ckpt")
    assert_is_small(OwnHooks.load_from_checkpoint(tmp_path / "once.ckpt", strict=False), weights)


def test_the_record_is_primitive_and_versioned(small_checkpoint):
    path, _ = small_checkpoint
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["lit_accel"]["version"] == 1
    assert checkpoint["lit_accel"]["size"]["depths"] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "Update lit-accel"),
        ({"family": "bert"}, "holds a bert model"),
        ({"vocab": 100}, "vocab 100"),
    ],
)
def test_a_foreign_checkpoint_is_refused(tmp_path, small_checkpoint, change, message):
    path, _ = small_checkpoint
    checkpoint = torch.load(path, weights_only=True)
    record = checkpoint["lit_accel"]
    if "vocab" in change:
        record["size"]["axes"].update(change)
    else:
        record.update(change)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises((AnatomyError, MisconfigurationException), match=message):
        OwnHooks.load_from_checkpoint(tmp_path / "changed.ckpt")


def test_a_small_model_is_not_taken_for_the_full_one(tmp_path, small_checkpoint):
    """Loaded small and then resumed, the run grows back to the full size that the checkpoint tells of."""
    path, weights = small_checkpoint
    module = OwnHooks.load_from_checkpoint(path)
    make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES)]).test(module, loader(num_samples=8))
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES)], max_steps=12)
    if "optimizer_states" in torch.load(path, weights_only=True):
        trainer.fit(module, loader(), ckpt_path=path)
        assert module.net.config.n_layer == 4


def test_a_small_model_is_trained_for_itself(tmp_path, small_checkpoint):
    """Loaded small and not resumed, it is what the run has: the cost of a dense run is its own, and so are levels."""
    path, _ = small_checkpoint
    module = OwnHooks.load_from_checkpoint(path)
    with pytest.warns(UserWarning, match="takes the present model for the full one"):
        flops, dense_flops = ledger_of_a_fit(tmp_path, module)
    assert flops == dense_flops
    method = MultiLevelTraining(phases=PHASES)
    make_trainer(tmp_path, callbacks=[method], max_steps=12).fit(module, loader())
    assert module.net.config.n_layer == 2
    assert method.maps[0].large.size == anatomy_of(module.net).size
    assert min(module.sizes[-12:]) < max(module.sizes[-12:]) == module.sizes[-1]


@pytest.mark.parametrize("ledger_first", [True, False])
def test_a_cycle_on_a_loaded_small_model_can_be_resumed(tmp_path, small_checkpoint, ledger_first):
    """Also by a module that is built at the size of the model which was once the full one."""
    path, _ = small_checkpoint
    for module, steps, checkpoint in (
        (OwnHooks.load_from_checkpoint(path), SMALL_STEP, None),
        (OwnHooks(), 12, tmp_path / "cycle.ckpt"),
    ):
        ledger = ComputeLedger(folder=str(tmp_path), print_table=False)
        callbacks = [ledger, MultiLevelTraining(phases=PHASES)][:: 1 if ledger_first else -1]
        trainer = make_trainer(tmp_path, callbacks=[*callbacks, StopAt(steps)], max_epochs=12)
        trainer.fit(module, loader(num_samples=8), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "cycle.ckpt")
        assert module.net.config.n_layer == (1 if steps == SMALL_STEP else 2)
    total = ledger.phases.total
    assert 0.5 < total.flops / total.dense_flops < 1


def test_a_loaded_small_model_drops_its_own_layers(tmp_path):
    """Whatever the checkpoint says of a larger one: what is measured is of the blocks that there are."""

    class Deep(OwnHooks):
        def __init__(self):
            super().__init__(net=make_model("gpt2-tied", dtype=torch.float32, **{**SIZE, "blocks": 12}))

    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES), StopAt(SMALL_STEP)], max_epochs=12)
    trainer.fit(Deep(), loader(num_samples=8))
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    module, method = Deep.load_from_checkpoint(tmp_path / "small.ckpt"), SensitivityLayerDropping(folder=str(tmp_path))
    make_trainer(tmp_path, strategy="auto", callbacks=[method], max_steps=30).fit(module, loader())
    assert method.history.measured_at
    assert len(method.sensitivities) == 6 == full_size(module).depths[0]


def test_what_a_run_ended_with_is_what_the_next_one_has(tmp_path):
    """A run that ended small, and a new one that does not resume it; the same Trainer goes on instead."""
    module = TinyModule()
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=[Phase(0, 3), Phase(1)])], max_steps=6)
    trainer.fit(module, loader())
    trainer.test(module, loader(num_samples=8))
    assert full_size(module).depths == (4,)
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(module, loader())
    assert full_size(module).depths == (4,)
    assert anatomy_of(module.net).size.depths == (2,)
    flops, dense_flops = ledger_of_a_fit(tmp_path, module)
    assert flops == dense_flops


def test_another_model_is_not_taken_for_a_level_of_the_first(tmp_path):
    """Put in the place of the one that was trained, it has a full size of its own, with a checkpoint and without."""
    module = TinyModule()
    ledger_of_a_fit(tmp_path, module)
    module.net = make_model("gpt2-tied", dtype=torch.float32, **{**SIZE, "blocks": 8, "heads": 8}).train()
    flops, dense_flops = ledger_of_a_fit(tmp_path, module)
    assert flops == dense_flops
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [MultiLevelTraining(phases=PHASES), save]
    make_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, max_steps=12).fit(module, loader())
    assert module.net.config.n_layer == 8
    again = TinyModule()
    ledger_of_a_fit(tmp_path, again)
    again.net = make_model("gpt2-tied", dtype=torch.float32, **{**SIZE, "blocks": 8, "heads": 8}).train()
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES)], max_steps=12)
    trainer.fit(again, loader(), ckpt_path=tmp_path / f"step={SMALL_STEP}.ckpt")
    assert again.net.config.n_layer == 8


def ledger_of_a_fit(folder, module):
    """Train for two steps; return what they cost, and what they would have cost the full model."""
    ledger = ComputeLedger(folder=str(folder), print_table=False)
    make_trainer(folder, callbacks=[ledger], max_steps=2).fit(module, loader())
    return ledger.phases.total.flops, ledger.phases.total.dense_flops


@pytest.mark.parametrize("change", [{"width_grouping": "adjacent"}, {"depth_mode": "ode"}])
def test_other_maps_than_the_stored_weights_were_made_with(tmp_path, change):
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES), StopAt(6)], max_epochs=12)
    trainer.fit(TinyModule(), loader(num_samples=8))
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES, **change)], max_epochs=12)
    (name,) = change
    with pytest.raises(MisconfigurationException, match=f"multi-level training: {name} .* could not grow back"):
        trainer.fit(TinyModule(), loader(num_samples=8), ckpt_path=tmp_path / "small.ckpt")


def test_a_small_model_without_the_weights_that_it_must_grow_back_into(tmp_path):
    """They would be drawn, as for a level that never existed."""
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES), StopAt(6)], max_epochs=12)
    trainer.fit(TinyModule(), loader(num_samples=8))
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    checkpoint = torch.load(tmp_path / "small.ckpt", weights_only=True)
    del checkpoint["callbacks"]["MultiLevelTraining"]["stored"][0]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES)], max_epochs=12)
    with pytest.raises(MisconfigurationException, match="at level 1, but the stored weights of level 0"):
        trainer.fit(TinyModule(), loader(num_samples=8), ckpt_path=tmp_path / "without.ckpt")


def test_other_rules_than_before_are_warned_about(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES), StopAt(6)], max_epochs=12)
    trainer.fit(TinyModule(), loader(num_samples=8))
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES, alpha=0.5)], max_epochs=12)
    with pytest.warns(UserWarning, match="other rules of multi-level training: coarse 1.0 "):
        trainer.fit(TinyModule(), loader(num_samples=8), ckpt_path=tmp_path / "small.ckpt")


SCALED = [Phase(0, 3), Phase(1, 6, lr_scale=4.0), Phase(0)]


@pytest.mark.parametrize(
    ("before", "scheduler"),
    [
        ({"phases": SCALED}, "linear"),
        ({"phases": SCALED}, None),
        ({"phases": PHASES, "learning_rate": "rewarm", "num_rewarm_steps": 8}, "onecycle"),
        ({"phases": PHASES, "learning_rate": "paper"}, None),
    ],
    ids=["lr_scale", "lr_scale-no-scheduler", "rewarm", "paper"],
)
def test_a_factor_goes_with_the_rule_that_it_is_of(tmp_path, before, scheduler):
    """Resumed without the rule, the run has the rates of one that never had it."""

    def run(settings, checkpoint=None, steps=12):
        module, callbacks = TinyModule(scheduler=scheduler), [MultiLevelTraining(**settings), StopAt(steps)]
        trainer = make_trainer(tmp_path, callbacks=callbacks, max_epochs=12)
        trainer.fit(module, loader(num_samples=8), ckpt_path=checkpoint)
        return module, trainer

    without = {"phases": PHASES, "learning_rate": "continue"}
    never, _ = run(without)
    changed, trainer = run(before, steps=5)
    assert changed.rates != never.rates[:5]
    trainer.save_checkpoint(tmp_path / "changed.ckpt")
    resumed, trainer = run(without, tmp_path / "changed.ckpt")
    assert resumed.rates == pytest.approx(never.rates[5:], rel=1e-12)
    assert all("lit_accel_scheduled_lr" not in group for group in trainer.optimizers[0].param_groups)


def test_a_checkpoint_from_before_the_rules_of_the_learning_rate_were_in_it(tmp_path):
    def run(steps, checkpoint=None):
        method = MultiLevelTraining(phases=SCALED, learning_rate="rewarm", num_rewarm_steps=8)
        module, trainer = TinyModule(), make_trainer(tmp_path, callbacks=[method, StopAt(steps)], max_epochs=12)
        trainer.fit(module, loader(num_samples=8), ckpt_path=checkpoint)
        return module, trainer

    _, trainer = run(6)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    for name in ("lr_scale", "num_rewarm_steps"):
        del checkpoint["callbacks"]["MultiLevelTraining"]["rules"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed, _ = run(12, tmp_path / "old.ckpt")
    assert not [each for each in caught if "other rules of" in str(each.message)]
    assert resumed.rates == run(12)[0].rates[6:]


@pytest.mark.parametrize(
    ("before", "after", "dtype"), [("bf16-true", "32-true", torch.float32), ("32-true", "bf16-true", torch.bfloat16)]
)
@pytest.mark.parametrize("state", ["reset", "project"])
def test_a_run_goes_on_in_the_precision_that_it_is_resumed_with(tmp_path, before, after, dtype, state):
    """Not, once it has grown, in that of the stored level."""

    def run(steps, precision, checkpoint=None):
        callback = MultiLevelTraining(phases=PHASES, alpha=0.5, optimizer_state=state)
        callbacks = [callback, StopAt(steps)]
        trainer = make_trainer(tmp_path, callbacks=callbacks, max_epochs=12, precision=precision)
        module = TinyModule()
        trainer.fit(module, loader(num_samples=8), ckpt_path=checkpoint)
        return module, trainer

    run(SMALL_STEP, before)[1].save_checkpoint(tmp_path / "small.ckpt")
    module, trainer = run(12, after, tmp_path / "small.ckpt")
    assert module.net.config.n_layer == 4
    assert {parameter.dtype for parameter in module.net.parameters()} == {dtype}
    (optimizer,) = trainer.optimizers
    moments = {entry[key].dtype for entry in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")}
    assert moments == {dtype}


def test_phases_among_hyper_parameters_can_be_read_back(tmp_path):
    class Module(MultiLevelMixin, TinyModule):
        def __init__(self, betas=(0.9, 0.95), **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters()

    trainer = make_trainer(tmp_path, max_steps=5)
    levels, phases = [Level(width=2, depth=2)], [Phase(0, 3), Phase(1)]
    module = Module(multilevel_levels=levels, multilevel_phases=phases)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    # Of the run itself nothing is changed.
    assert (module.hparams.multilevel_levels, module.hparams.multilevel_phases) == (levels, phases)
    saved = torch.load(tmp_path / "module.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["multilevel_levels"] == [{"width": 2, "depth": 2, "merge_batches": 1}]
    assert [type(each) for each in saved["multilevel_phases"]] == [dict, dict]
    assert saved["betas"] == (0.9, 0.95)
    loaded = Module.load_from_checkpoint(tmp_path / "module.ckpt")
    (method,) = loaded.configure_callbacks()
    assert (method.levels, method.phases) == (levels, phases)
    assert loaded.net.config.n_layer == 2


def test_a_failed_growth_can_be_resumed(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES)], max_epochs=12)

    def out_of_memory(*args):
        raise MemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr("lit_accel.methods.multilevel.stored.interpolate", out_of_memory)
        with pytest.raises(MemoryError):
            trainer.fit(TinyModule(), loader(num_samples=8))
    trainer.save_checkpoint(tmp_path / "failed.ckpt")
    module = TinyModule()
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES)], max_epochs=12)
    trainer.fit(module, loader(num_samples=8), ckpt_path=tmp_path / "failed.ckpt")
    assert module.net.config.n_layer == 4


def test_growth_out_of_a_checkpoint_needs_a_strategy_too(tmp_path):
    """Phases that keep the size are for any strategy, but not where a checkpoint has brought a small model."""
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=PHASES), StopAt(6)], max_epochs=12)
    trainer.fit(TinyModule(), loader(num_samples=8))
    trainer.save_checkpoint(tmp_path / "small.ckpt")

    def grow(strategy):
        module, method = TinyModule(), MultiLevelTraining(phases=[Phase(0)])
        trainer = make_trainer(tmp_path, callbacks=[method], strategy=strategy, max_epochs=12)
        trainer.fit(module, loader(num_samples=8), ckpt_path=tmp_path / "small.ckpt")
        return module

    with pytest.raises(MisconfigurationException, match=r'SingleDeviceStrategy cannot. .*strategy="resizable"'):
        grow("auto")
    assert grow("resizable").net.config.n_layer == 4


def test_a_checkpoint_without_record_loads_as_it_is(tmp_path):
    module = OwnHooks()
    trainer = make_trainer(tmp_path, strategy="auto", max_steps=1)
    trainer.fit(TinyModule(), loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    make_trainer(tmp_path, strategy="auto").validate(module, loader(num_samples=16), ckpt_path=tmp_path / "plain.ckpt")
    assert module.net.config.n_layer == 4


@pytest.mark.parametrize("stop", range(1, 12))
@pytest.mark.parametrize("state", ["reset", "project"])
def test_a_run_resumed_at_any_step_is_bitwise_the_uninterrupted_one(tmp_path, stop, state):
    """Every step of the run, so each phase and each switch exactly; one batch an epoch keeps the data in step."""

    def run(steps, checkpoint=None):
        module = TinyModule(scheduler="cosine" if state == "reset" else "linear")
        # The whole run's schedule, whatever step it stops at.
        callback = MultiLevelTraining(
            [Level()], PHASES, alpha=0.5, optimizer_state=state, learning_rate="rewarm", num_rewarm_steps=2
        )
        trainer = make_trainer(tmp_path, callbacks=[callback, StopAt(steps)], max_epochs=12)
        trainer.fit(module, loader(num_samples=8), ckpt_path=checkpoint)
        return module, trainer

    _, trainer = run(stop)
    path = tmp_path / f"{stop}.ckpt"
    trainer.save_checkpoint(path)
    resumed, _ = run(12, path)
    whole, _ = run(12)
    assert resumed.rates == whole.rates[stop:]
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)


class StopAt(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.global_step >= self.step
