"""Layer dropping through Trainer.fit, on models of every family."""

from __future__ import annotations

import csv

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lit_accel import (
    ComputeLedger,
    ProgressiveLayerDropping,
    ProgressiveLayerDroppingMixin,
    SensitivityLayerDropping,
    SensitivityLayerDroppingMixin,
)
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import forward_flops, training_flops
from lit_accel.methods.layer_dropping.sbld import FILE_NAME
from lit_accel.routing import Order, hidden_states_of, routing_of
from tests.models import make_model
from tests.training import TinyModule, loader, make_trainer
from tests.vision import IMAGE_SIZE, VISION_ZOO

DEEP = {"heads": 2, "head_dim": 8, "ffn": 32, "blocks": 8, "vocab": 64}


class Deep(TinyModule):
    """Eight blocks, of any family."""

    def __init__(self, name="gpt2-tied", lr=3e-3, dropout=0.0):
        super().__init__(lr=lr)
        self.is_vision = name in VISION_ZOO
        size = {key: value for key, value in DEEP.items() if not (self.is_vision and key == "vocab")}
        self.net = make_model(name, dtype=torch.float32, **size).train()
        for module in self.net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout

    def loss(self, batch):
        if not self.is_vision:
            return super().loss(batch)
        images, targets = batch
        logits = self.net(images)
        return torch.nn.functional.cross_entropy(logits[0] if isinstance(logits, tuple) else logits, targets)

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0]) if self.is_vision else super().predict_step(batch, batch_idx)


def data_for(module, num_samples=256):
    if not module.is_vision:
        return loader(num_samples=num_samples)
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(num_samples) % 5
    noise = torch.randn(num_samples, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return DataLoader(TensorDataset(noise * 0.1 + targets[:, None, None, None] / 5, targets), batch_size=8)


def fit(tmp_path, callbacks, module=None, max_steps=20, **options):
    L.seed_everything(0, verbose=False)
    module = module or Deep()
    options = {"strategy": "auto", "max_steps": max_steps, "max_epochs": -1, **options}
    trainer = make_trainer(tmp_path, callbacks=callbacks, **options)
    trainer.fit(module, data_for(module), data_for(module, 32) if options.get("val_check_interval") else None)
    return trainer, module


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class Masks(L.Callback):
    """Notes the mask of every step. Stands right of the method."""

    def __init__(self, method):
        self.method = method
        self.masks, self.probabilities = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.masks.append(list(self.method.keep))
        self.probabilities.append(list(self.method.keep_probabilities))


# Neutral settings

NEUTRAL = {
    "pld": lambda: ProgressiveLayerDropping(theta=1.0),
    "sbld": lambda: SensitivityLayerDropping(kept=1.0),
    # Intercepted, with every block kept in every step.
    "pld-attached": lambda: ProgressiveLayerDropping(theta=0.5, gamma=1e-300),
    "sbld-attached": lambda: SensitivityLayerDropping(warmup=1.0, ramp=0, release=0),
}


@pytest.mark.parametrize("name", ["gpt2-tied", "bert-mlm", "llama-gqa"])
@pytest.mark.parametrize("neutral", sorted(NEUTRAL))
def test_a_neutral_setting_is_bitwise_no_callback_with_dropout_on(tmp_path, neutral, name):
    options = {"max_steps": 6, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    _, plain = fit(tmp_path, [], Deep(name, dropout=0.2), **options)
    _, module = fit(tmp_path, [NEUTRAL[neutral]()], Deep(name, dropout=0.2), **options)
    assert module.losses == plain.losses
    assert_equal(weights(module), weights(plain))


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
def test_nothing_is_amplified_by_default(tmp_path, direction):
    def trained(**scale):
        rate = {"gamma": 0.5} if direction == "increasing" else {}
        method = ProgressiveLayerDropping(direction=direction, **scale, **rate)
        return weights(fit(tmp_path, [method], max_steps=6)[1])

    default, block = trained(), trained(scale="block")
    assert_equal(default, trained(scale="none"))
    assert any(not torch.equal(default[name], block[name]) for name in default)


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("paper", [15 / 16, 14 / 16, 13 / 16, 12 / 16, 11 / 16, 10 / 16, 9 / 16, 8 / 16]),
        ("deepspeed", [1, 15 / 16, 14 / 16, 13 / 16, 12 / 16, 11 / 16, 10 / 16, 9 / 16]),
        ("timm", [1, 13 / 14, 12 / 14, 11 / 14, 10 / 14, 9 / 14, 8 / 14, 7 / 14]),
    ],
)
def test_late_in_a_run_probabilities_fall_with_depth_by_the_convention(tmp_path, convention, expected):
    callback = ProgressiveLayerDropping(theta=0.5, gamma=5.0, convention=convention)
    fit(tmp_path, [callback], max_steps=6)
    assert callback.keep_probabilities == pytest.approx(expected, abs=1e-9)


class Sizes(L.Callback):
    """Notes for each call of a block whether it was skipped, and how large its output is token by token."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        routing_of(pl_module.net).add(self.note, Order.PROBE)

    def note(self, call, run):
        output = run(call)
        hidden_states = hidden_states_of(output)
        self.seen.append((hidden_states is call.hidden_states, hidden_states.detach().square().mean(-1).sqrt()))
        return output

    def on_train_batch_end(self, trainer, pl_module, *_):
        routing_of(pl_module.net).remove(self.note)


@pytest.mark.parametrize("name", ["bert-mlm", "roberta-mlm"])
def test_what_norms_after_the_addition_put_out_stays_of_size_one(tmp_path, name):
    """After blocks that are skipped as after others; were their change scaled, as elsewhere, it would not."""
    module, sizes = Deep(name, lr=0.0), Sizes()
    for part in module.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.reset_parameters()
    fit(tmp_path, [ProgressiveLayerDropping(gamma=5.0), sizes], module, max_steps=6)
    assert {was_skipped for was_skipped, _ in sizes.seen} == {False, True}
    assert all(((size - 1).abs() < 0.05).all() for _, size in sizes.seen)


# What runs, and what is counted

METHODS = {
    "pld": lambda: ProgressiveLayerDropping(gamma=0.5),
    "pld-bernoulli": lambda: ProgressiveLayerDropping(gamma=0.5, sampler="bernoulli"),
    "pld-decreasing": lambda: ProgressiveLayerDropping(direction="decreasing"),
    "sbld": lambda: SensitivityLayerDropping(
        kept=0.8, warmup=2, ramp=2, max_overhead=1.0, num_batches=1, measure_every=10
    ),
    "sbld-taylor": lambda: SensitivityLayerDropping(
        kept=0.8, estimator="taylor", warmup=2, ramp=2, max_overhead=1.0, num_batches=1
    ),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("gpt2-tied", method) for method in sorted(METHODS)),
        *(
            (name, method)
            for name in ("llama-gqa", "bert-mlm", "vit-registers", "deit-distilled", "swin")
            for method in ("pld", "sbld")
        ),
        ("swin", "sbld-taylor"),
    ],
)
def test_every_family_trains_and_is_charged_for_what_ran(tmp_path, name, method):
    callback, ledger = METHODS[method](), ComputeLedger(print_table=False)
    masks = Masks(callback)
    trainer, module = fit(tmp_path, [callback, ledger, masks], Deep(name), max_steps=24)
    assert all(torch.isfinite(torch.tensor(module.losses)))
    num_blocks = len(anatomy_of(module.net).blocks)
    assert 0 < callback.total.kept < callback.total.dense
    assert sum(map(sum, masks.masks)) == callback.total.kept_blocks
    assert all(len(mask) == num_blocks for mask in masks.masks)
    pinned = set(range(num_blocks)) - set(callback.units)
    assert pinned == ({0, 1} if name == "swin" else set())
    assert all(mask[index] for mask in masks.masks for index in pinned)
    # The ledger: full cost but for the blocks that did not run; measurements beside it.
    total = ledger.phases.total
    costs = training_flops(anatomy_of(module.net), 8, callback._num_tokens).blocks
    saved = sum(cost for mask in masks.masks for cost, kept in zip(costs, mask, strict=True) if not kept)
    spent = total.dense_flops - saved
    if method == "sbld":
        assert spent < total.flops < spent * 1.3
    else:
        assert total.flops == spent
    if method != "pld-bernoulli":
        assert abs(callback.total.kept_blocks - callback.total.planned_blocks) < 1 + 1e-6
    # Evaluation has every block.
    (before,) = trainer.predict(module, DataLoader(data_for(module, 8).dataset, batch_size=8))
    with torch.no_grad():
        after = module.eval().predict_step(next(iter(data_for(module, 8))), 0)
    for mine, theirs in zip(*(o if isinstance(o, tuple) else (o,) for o in (before, after)), strict=True):
        assert torch.equal(mine, theirs)
    assert all("_compiled_call_impl" not in vars(part) for part in module.modules())


def test_measuring_is_charged_exactly(tmp_path):
    callback = SensitivityLayerDropping(kept=0.8, warmup=2, max_overhead=1.0, num_batches=1, measure_every=100)
    ledger = ComputeLedger(print_table=False)
    for callbacks in ([callback, ledger], [ledger, callback]):
        _, module = fit(tmp_path, callbacks, max_steps=20)
        assert len(callback.history.measured_at) == 1
        forward = forward_flops(anatomy_of(module.net), 8, 12)
        # All blocks once; then, without each, those after it. What is outside of the blocks every time.
        probes = (
            sum(forward.blocks) + sum(sum(forward.blocks[unit + 1 :]) for unit in range(8)) + 9 * forward.outside_blocks
        )
        total = ledger.phases.total
        assert total.flops == total.dense_flops - (callback.total.dense - callback.total.kept) * 8 + probes
        assert total.tokens == 20 * 8 * 12


@pytest.mark.parametrize("name", ["gpt2-tied", "bert-mlm", "swin"])
def test_validation_in_the_middle_sees_every_block(tmp_path, name):
    class Check(L.Callback):
        num_checked = 0

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            plain = Deep(name)
            plain.load_state_dict(pl_module.state_dict())
            with torch.no_grad():
                assert torch.equal(pl_module.loss(batch), plain.eval().loss(batch))
            Check.num_checked += 1

    callback = ProgressiveLayerDropping(gamma=5.0)
    fit(tmp_path, [callback, Check()], Deep(name), max_steps=6, val_check_interval=2, num_sanity_val_steps=0)
    assert Check.num_checked == 12
    assert callback.total.kept_share < 0.9


def test_masks_hold_for_a_whole_accumulation_window(tmp_path):
    callback = ProgressiveLayerDropping(gamma=5.0)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((trainer.global_step, tuple(callback.keep)))

    fit(tmp_path, [callback, Watch()], max_steps=8, accumulate_grad_batches=3)
    assert len(seen) == 24
    assert len(set(seen)) == 8
    assert len({mask for _, mask in seen}) > 4


def test_kept_flops_of_a_long_run_are_the_planned_ones():
    """Bernoulli within 1 %; systematic to less than one block of one step."""
    from lit_accel.methods.layer_dropping.books import Tally

    anatomy = anatomy_of(make_model("gpt2-tied", **{**DEEP, "blocks": 12}))
    costs = (1,) * 12
    for sampler in ("systematic", "bernoulli"):
        callback, tally = ProgressiveLayerDropping(sampler=sampler), Tally()
        callback.num_steps = 3_000
        probabilities_at, draw = callback.plan_blocks(anatomy, 12), callback.planned_draws()
        for step in range(callback.num_steps):
            probabilities = probabilities_at(step)
            tally.add(costs, draw(step, probabilities), probabilities)
        if sampler == "systematic":
            assert abs(tally.kept - tally.planned) < 1 + 1e-6
        assert tally.kept_share == pytest.approx(tally.planned_share, rel=0.01)
        # The closed form of the mean keep probability for gamma = 100 / T.
        assert tally.planned_share == pytest.approx(1 - 0.5 * 13 / 24 * (1 - 0.01), abs=2e-3)


# What a user sees


@pytest.mark.parametrize("method", ["pld", "sbld"])
def test_logs_and_picture(tmp_path, method, pictures_are_drawn):
    callback = METHODS[method]()
    logger = CSVLogger(tmp_path, name="run")
    fit(tmp_path, [callback], max_steps=20, logger=logger, log_every_n_steps=5)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["layer_dropping/kept_flops"]]
    assert len(rows) == 4
    last = {name: float(value) for name, value in rows[-1].items() if name.startswith("layer_dropping") and value}
    assert 0.3 < last["layer_dropping/kept_flops"] <= 1
    assert last["layer_dropping/kept_blocks"] == pytest.approx(8 * last["layer_dropping/kept_flops"])
    assert [last[f"layer_dropping/keep_probability/{block:02d}"] for block in range(8)] == callback.keep_probabilities
    if method == "pld":
        assert 0.5 <= last["layer_dropping/theta"] < 1
        return
    assert [last[f"layer_dropping/sensitivity/{block:02d}"] for block in range(8)] == callback.sensitivities
    assert (tmp_path / "run" / "version_0" / FILE_NAME).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("mixin", "arguments", "kind"),
    [
        (ProgressiveLayerDroppingMixin, {"pld_theta": 0.7, "pld_gamma": 1.0}, ProgressiveLayerDropping),
        (SensitivityLayerDroppingMixin, {"sbld_kept": 0.9, "sbld_warmup": 2}, SensitivityLayerDropping),
    ],
)
def test_a_mixin_brings_the_callback(tmp_path, mixin, arguments, kind):
    class Mine(mixin, TinyModule):
        def __init__(self):
            super().__init__(**arguments)
            self.net = make_model("gpt2-tied", dtype=torch.float32, **DEEP).train()
            self.is_vision = False

    trainer, _ = fit(tmp_path, [], Mine(), max_steps=20)
    (callback,) = [each for each in trainer.callbacks if isinstance(each, kind)]
    for name, value in arguments.items():
        assert getattr(callback, name.partition("_")[2]) == value
    assert callback.total.kept < callback.total.dense


def test_a_mixin_takes_what_its_callback_takes():
    import inspect

    for mixin, kind, prefix in (
        (ProgressiveLayerDroppingMixin, ProgressiveLayerDropping, "pld"),
        (SensitivityLayerDroppingMixin, SensitivityLayerDropping, "sbld"),
    ):
        theirs = inspect.signature(kind).parameters
        mine = inspect.signature(mixin).parameters
        assert {f"{prefix}_{name}": p.default for name, p in theirs.items()} == {
            name: p.default for name, p in mine.items() if name.startswith(prefix)
        }


def test_blocks_that_cannot_be_intercepted_are_noticed_before_the_optimizer_steps(tmp_path):
    class ByForward(Deep):
        def loss(self, ids):
            hidden = self.net.transformer.wte(ids)
            for block in self.net.transformer.h:
                hidden = block.forward(hidden)
            return self.net.lm_head(hidden).square().mean()

    with pytest.raises(RuntimeError, match=r"not as block.forward"):
        fit(tmp_path, [ProgressiveLayerDropping(gamma=5.0)], ByForward(), max_steps=4)


class ByParts(Deep):
    """Calls the model without its head, and then the head."""

    def loss(self, batch):
        if self.is_vision:
            images, targets = batch
            logits = self.net.forward_head(self.net.forward_features(images))
            return torch.nn.functional.cross_entropy(logits, targets)
        logits = self.net.get_output_embeddings()(self.net.base_model(batch)[0])
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm", "vit-registers"])
def test_blocks_are_dropped_where_a_part_of_the_model_is_called(tmp_path, name):
    masks = {}
    modules = {}
    for kind in (Deep, ByParts):
        callback = ProgressiveLayerDropping(gamma=5.0)
        masks[kind] = Masks(callback)
        _, modules[kind] = fit(tmp_path, [callback, masks[kind]], kind(name), max_steps=6)
    assert masks[ByParts].masks == masks[Deep].masks
    assert not all(map(all, masks[Deep].masks))
    if name in ("gpt2-tied", "llama-gqa"):
        # What is computed is the same; the models of BERT and timm have more around their parts.
        assert modules[ByParts].losses == modules[Deep].losses


def test_calls_that_are_not_seen_are_warned_about_once(tmp_path, recwarn):
    fit(tmp_path, [ProgressiveLayerDropping(gamma=5.0)], ByParts(), max_steps=4)
    fit(tmp_path, [ProgressiveLayerDropping(gamma=5.0)], Deep(), max_steps=4)
    (warning,) = [str(warning.message) for warning in recwarn if "was not called" in str(warning.message)]
    assert "ProgressiveLayerDropping" in warning
    assert "Call the model itself" in warning


@pytest.mark.parametrize("name", ["gpt2-tied", "bert-mlm", "vit-registers"])
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("estimator", ["ablate", "taylor"])
def test_a_budget_needs_calls_that_are_seen(tmp_path, name, warmup, estimator):
    """Before the second step, not only when it is measured."""
    callback = SensitivityLayerDropping(kept=0.9, warmup=warmup, ramp=1, release=1, estimator=estimator)
    module = ByParts(name)
    with pytest.raises(MisconfigurationException, match=r"the model itself was not called.*Call the model itself"):
        fit(tmp_path, [callback], module, max_steps=8)
    assert module.trainer.global_step <= 1


class Caching(Deep):
    """Asks for a cache in some micro-batches."""

    def __init__(self, caches):
        super().__init__()
        self.caches = caches

    def training_step(self, batch, batch_idx):
        self.use_cache = self.caches(batch_idx)
        return super().training_step(batch, batch_idx)

    def loss(self, ids):
        logits = self.net(input_ids=ids, use_cache=self.use_cache or None).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("method", ["pld", "sbld", "sbld-taylor"])
@pytest.mark.parametrize("when", ["always", "first of two micro-batches"])
def test_a_cache_in_training_is_named_as_what_it_is(tmp_path, method, when):
    module = Caching(lambda batch_idx: when == "always" or batch_idx % 2 == 0)
    with pytest.raises(MisconfigurationException, match=r"use_cache=True.*all blocks ran.*Leave both"):
        fit(tmp_path, [METHODS[method]()], module, max_steps=20, accumulate_grad_batches=2)
