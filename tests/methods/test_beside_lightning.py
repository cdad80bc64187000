"""Methods beside what Lightning offers: loaders with a state, tuners, manual optimization, several fits, pickling."""

from __future__ import annotations

import pickle

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lit_accel import (
    Composition,
    ComputeLedger,
    Level,
    MixedSparsityMixin,
    MixedSparsityTraining,
    MultiLevelMixin,
    MultiLevelTraining,
    Phase,
    ProgressiveLayerDropping,
    ProgressiveLayerDroppingMixin,
    RandomLTD,
    RandomLTDMixin,
    SensitivityLayerDropping,
    SensitivityLayerDroppingMixin,
)
from lit_accel.anatomy import anatomy_of
from lit_accel.compute.flops import training_flops
from lit_accel.methods.guard import NonFiniteError, TrainingGuard
from lit_accel.run_length import length_of_run
from lit_accel.tasks import WarmupDecay
from tests.models import ALL_MODELS, make_model
from tests.training import SIZE, TinyModule, Tokens, loader, make_trainer

LTD = {"start_tokens": 4, "growth": 0.7, "quantum": 2}
MADE = {
    "multi-level": lambda: MultiLevelTraining(phases=[Phase(0, 2), Phase(1, 0.5), Phase(0)]),
    "pld": ProgressiveLayerDropping,
    "sbld": lambda: SensitivityLayerDropping(kept=0.9, protected=0.0, estimator="ratio"),
    "random-ltd": lambda: RandomLTD(**LTD),
    "mst": MixedSparsityTraining,
}
EACH = pytest.mark.parametrize("name", MADE)


class Stateful(DataLoader):
    """Has a place in the data of its own, as torchdata's loaders do."""

    start = place = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.place = index + 1
                yield batch

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state_dict):
        self.start = state_dict["place"]


class Seen(TinyModule):
    """Remembers its batches, and in which epoch it was asked for its data."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.seen: list[list[int]] = []
        self.asked: list[int] = []

    def train_dataloader(self):
        self.asked.append(self.trainer.current_epoch)
        return Stateful(Tokens(64), batch_size=8)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[:, 0].tolist())
        return super().training_step(batch, batch_idx)


class Scheduled(Seen):
    """Asks for the length of the run as the tasks do."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = WarmupDecay(optimizer, num_warmup_steps=2)
        scheduler.bind(length_of_run(self.trainer, "WarmupDecay"))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("name", ["no method", *MADE])
@pytest.mark.parametrize(("step", "epoch"), [(3, 0), (11, 1)])
def test_loaders_with_a_state_go_on_where_they_were(name, step, epoch, tmp_path):
    """Counting the steps of a run in epochs asks for its loader, before a checkpoint is there to give it its state."""

    def run(module, **options):
        callbacks = [MADE[name]()] if name in MADE else []
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        options = {"max_epochs": 2, "enable_checkpointing": True, **options}
        ckpt_path = options.pop("ckpt_path", None)
        make_trainer(tmp_path, callbacks=[*callbacks, saver], **options).fit(module, ckpt_path=ckpt_path)
        return module

    kind = Seen if name in MADE else Scheduled
    whole, resumed = run(kind()), kind()
    run(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert len(whole.seen) == 16
    assert resumed.seen == whole.seen[step:]
    assert resumed.asked[-1] == epoch
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(Tokens(64).ids)


@EACH
def test_whichever_of_two_limits_ends_a_run_is_known(name, tmp_path):
    module = TinyModule()
    trainer = make_trainer(tmp_path, callbacks=[MADE[name]()], max_steps=200, max_epochs=2)
    with pytest.raises(MisconfigurationException, match=r"max_steps=200 or max_epochs=2 ends it.*max_epochs=-1"):
        trainer.fit(module, DataLoader(Endless(), batch_size=8))
    assert module.losses == []


class Manual(TinyModule):
    """Steps on every second batch, with an optimizer that it may keep."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.keeps = keeps

    def on_train_start(self):
        self.kept = self.optimizers()

    def training_step(self, batch, batch_idx):
        optimizer = self.kept if self.keeps else self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", ["multi-level", "pld-decreasing", "sbld", "random-ltd"])
def test_manual_optimization_has_no_length_in_epochs(name, tmp_path):
    made = {**MADE, "pld-decreasing": lambda: ProgressiveLayerDropping(direction="decreasing")}
    module = Manual(keeps=False)
    with pytest.raises(MisconfigurationException, match=r"nobody but the module knows.*max_steps and max_epochs=-1"):
        make_trainer(tmp_path, callbacks=[made[name]()], max_epochs=2).fit(module, loader())
    assert module.losses == []
    make_trainer(tmp_path, callbacks=[made[name]()], max_steps=8, max_epochs=-1).fit(module, loader())
    assert len(module.losses) == 16


@pytest.mark.parametrize("keeps", [False, True])
def test_an_optimizer_of_the_former_model_is_told(keeps, tmp_path):
    """It would step what nobody trains any more, and the run would never end."""
    module = Manual(keeps)
    phases = [Phase(0, 2), Phase(1, 2), Phase(0)]
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=phases)], max_steps=8, max_epochs=-1)
    if keeps:
        with pytest.raises(MisconfigurationException, match=r"made before the model changed.*self\.optimizers\(\)"):
            trainer.fit(module, loader())
        assert len(module.losses) == 6
    else:
        trainer.fit(module, loader())
        assert len(module.losses) == 16


class Fetching(TinyModule):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss


def test_steps_that_fetch_their_batches_cannot_be_merged(tmp_path):
    def fit(merge):
        module = Fetching()
        method = MultiLevelTraining([Level(merge_batches=merge)], [Phase(0, 1), Phase(1, 2), Phase(0)])
        trainer = make_trainer(tmp_path, callbacks=[method], max_steps=4, accumulate_grad_batches=2)
        trainer.fit(module, loader())
        return module.losses

    with pytest.raises(MisconfigurationException, match=r"dataloader_iter by itself.*merge_batches=1"):
        fit(2)
    assert len(fit(1)) == 8


@pytest.mark.parametrize(("callback", "model"), [("one", "another"), ("another", "one"), ("another", "another")])
def test_a_small_model_grows_whatever_grew_before(callback, model, tmp_path):
    method, module = MultiLevelTraining(start_level=1), TinyModule()
    for blocks in (8, 16):
        if model == "another":
            module = TinyModule(net=make_model("gpt2-tied", **{**SIZE, "blocks": blocks // 2}).float())
        if callback == "another":
            method = MultiLevelTraining(start_level=1)
        trainer = make_trainer(tmp_path, callbacks=[method], max_steps=2)
        trainer.fit(module, loader())
        assert module.net.config.n_layer == blocks
        trainer.test(module, loader(), verbose=False)
        assert module.net.config.n_layer == blocks
    # One that goes on does not grow again.
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, loader())
    assert module.net.config.n_layer == 16


@pytest.mark.parametrize("make", [MADE["pld"], MADE["sbld"]], ids=["pld", "sbld"])
def test_optimizers_that_move_what_has_no_gradient_are_refused(make, tmp_path):
    module = TinyModule(optimizer=torch.optim.LBFGS)
    with pytest.raises(MisconfigurationException, match="LBFGS takes it for zero"):
        make_trainer(tmp_path, callbacks=[make()], strategy="auto", max_steps=4).fit(module, loader())
    assert module.losses == []


class Breaks(TinyModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == 4 else loss


def test_a_roll_back_beside_averaged_weights_brings_back_the_weights(tmp_path):
    def weights(kind, steps, callbacks):
        module, sparing = kind(), [RandomLTD(**LTD), Composition(dense_warmup=2)]
        trainer = make_trainer(tmp_path, callbacks=[*sparing, WeightAveraging(), *callbacks], max_steps=steps)
        if kind is Breaks:
            with pytest.raises(NonFiniteError):
                trainer.fit(module, loader())
        else:
            # What is swapped into the module at the end is the average: look before.
            class Look(L.Callback):
                def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                    if trainer.global_step == saved:
                        module.kept = [parameter.detach().clone() for parameter in pl_module.parameters()]

            trainer.callbacks.append(Look())
            trainer.fit(module, loader())
        return module

    broken = weights(Breaks, 10, [TrainingGuard(roll_back=True)])
    saved = torch.load(tmp_path / "before_transition.ckpt", weights_only=False)["global_step"]
    assert saved == 2
    whole = weights(TinyModule, 10, [])
    assert all(torch.equal(a, b) for a, b in zip(broken.parameters(), whole.kept, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda number: [ProgressiveLayerDropping(theta=number)],
        lambda number: [SensitivityLayerDropping(kept=number + 0.4, protected=0.0)],
        lambda number: [RandomLTD(start_tokens=number, growth=number, quantum=2)],
        lambda number: [MultiLevelTraining(alpha=number)],
        lambda number: [MixedSparsityTraining(drop_fraction=number)],
        lambda number: [ProgressiveLayerDropping(), Composition(dense_tail=number)],
    ],
    ids=["pld", "sbld", "random-ltd", "multi-level", "mst", "composition"],
)
def test_numbers_of_a_sweep_do_not_spoil_checkpoints(make, tmp_path):
    """``weights_only`` reads no class of NumPy's, and a float of NumPy's is a float."""

    def fit(steps, ckpt_path=None):
        module = TinyModule()
        trainer = make_trainer(tmp_path, callbacks=[*make(np.float64(0.5)), ComputeLedger()], max_steps=steps)
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        return trainer, module

    trainer, _ = fit(20)
    path = tmp_path / "of_numpy.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    trainer, module = fit(22, path)
    assert (trainer.global_step, len(module.losses)) == (22, 2)


class ByBlock(TinyModule):
    """Its parameter groups depend on the depth, which a V-cycle changes."""

    def configure_optimizers(self):
        return torch.optim.AdamW([{"params": list(block.parameters())} for block in self.net.transformer.h], lr=1e-3)

    def train_dataloader(self):
        return loader()


class Looped(TinyModule):
    def train_dataloader(self):
        return loader()


def test_a_tuner_keeps_nobody_from_rehearsing(tmp_path):
    module = ByBlock()
    for parameter in [*module.net.transformer.wte.parameters(), *module.net.transformer.wpe.parameters()]:
        parameter.requires_grad_(False)
    module.net.transformer.ln_f.requires_grad_(False)
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    method = MultiLevelTraining(phases=[Phase(0, 8), Phase(1, 4), Phase(0)])
    trainer = make_trainer(tmp_path, callbacks=[finder, method], max_steps=20, max_epochs=-1)
    with pytest.raises((MisconfigurationException, ValueError), match="group"):
        trainer.fit(module)
    assert trainer.global_step == 0


@EACH
def test_a_tuners_checkpoint_is_no_run_with_other_rules(name, tmp_path, recwarn):
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    trainer = make_trainer(tmp_path, callbacks=[finder, MADE[name]()], max_steps=12)
    trainer.fit(Looped())
    assert [str(each.message) for each in recwarn if "trained with other rules" in str(each.message)] == []


class WithLevels(MultiLevelMixin, TinyModule):
    pass


class WithDropping(ProgressiveLayerDroppingMixin, TinyModule):
    pass


class WithSensitivity(SensitivityLayerDroppingMixin, TinyModule):
    def __init__(self) -> None:
        super().__init__(sbld_kept=0.9, sbld_protected=0.0)


class WithTokens(RandomLTDMixin, TinyModule):
    def __init__(self) -> None:
        super().__init__(ltd_quantum=2, ltd_start_tokens=4)


class WithMasks(MixedSparsityMixin, TinyModule):
    pass


@pytest.mark.parametrize("kind", [WithLevels, WithDropping, WithSensitivity, WithTokens, WithMasks])
def test_modules_and_methods_can_be_pickled_after_a_fit(kind, tmp_path):
    module, ledger = kind(), ComputeLedger()
    make_trainer(tmp_path, callbacks=[ledger], max_steps=20).fit(module, loader())
    again = pickle.loads(pickle.dumps(module))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    pickle.dumps(ledger)
    make_trainer(tmp_path, max_steps=20).fit(again, loader())
    assert len(again.losses) > len(module.losses)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_anatomies_can_be_pickled(name):
    anatomy = anatomy_of(make_model(name))
    again = pickle.loads(pickle.dumps(anatomy))
    assert (again.size, again.parameters) == (anatomy.size, anatomy.parameters)
    num_tokens = anatomy.num_tokens or 16
    assert training_flops(again, 2, num_tokens) == training_flops(anatomy, 2, num_tokens)
    for place, rows in anatomy.places.items():
        assert again.places[place](3, num_tokens) == rows(3, num_tokens)


def test_another_module_can_be_tested_with_the_trainer_of_a_run(tmp_path):
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(12, 1)

        def test_step(self, batch, batch_idx):
            self.log("loss", self.layer(batch.float()).mean())

    trainer = make_trainer(tmp_path, callbacks=[MADE["multi-level"]()], max_steps=20)
    trainer.fit(TinyModule(), loader())
    assert "loss" in trainer.test(Plain(), loader(), verbose=False)[0]


class LeavesOut(TinyModule):
    """Ends an epoch early, and looks at its model after it."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None

    def on_train_epoch_end(self):
        with torch.no_grad():
            self.loss(Tokens(8).ids)


def test_what_runs_after_a_batch_that_was_left_out_is_not_booked(tmp_path):
    ledger = ComputeLedger()
    make_trainer(tmp_path, callbacks=[ledger], strategy="auto", max_steps=6).fit(LeavesOut(), loader())
    assert ledger.phases.total.tokens == 6 * 8 * 12
