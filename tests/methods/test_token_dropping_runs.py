"""Random-LTD in whole runs: what is counted is what ran, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import csv
import inspect
import itertools
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lit_accel import (
    ComputeLedger,
    Level,
    MultiLevelTraining,
    Phase,
    ProgressiveLayerDropping,
    RandomLTD,
    RandomLTDMixin,
)
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import training_flops
from lit_accel.methods.token_dropping import TokenPlan
from lit_accel.routing import Order, routing_of
from tests.data.saving import SaveAlways
from tests.methods.dropping import intercepted
from tests.models import make_model
from tests.training import TinyModule, Tokens, loader, make_trainer
from tests.vision import IMAGE_SIZE, VISION_ZOO

SIZE = {"heads": 2, "head_dim": 8, "ffn": 32}
STEPS = 12
# Of 12 tokens 4, 6, 8 and 10 are kept, in all blocks but two; the whole sequence from step 9 on.
LTD = {"start_tokens": 0.25, "growth": 9, "quantum": 2}


class Deep(TinyModule):
    """Six blocks of any family. Data is taken by the batch's index, so that a run can go on within an epoch."""

    def __init__(self, name="gpt2-tied", dropout=0.0, checkpointing=False, lengths=(12,), **kwargs):
        super().__init__(**{"lr": 3e-3, **kwargs})
        self.is_vision = name in VISION_ZOO
        size = {**SIZE, "blocks": 3 if "swin" in name else 6, **({} if self.is_vision else {"vocab": 64})}
        self.net = make_model(name, dtype=torch.float32, **size).train()
        for module in self.net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        if checkpointing:
            self.net.set_grad_checkpointing() if self.is_vision else self.net.gradient_checkpointing_enable()
        self.lengths, self.ids = lengths, Tokens(512).ids
        self.seen: list[float] = []

    def loss(self, batch):
        if not self.is_vision:
            return super().loss(batch)
        logits = self.net(batch[0])
        return torch.nn.functional.cross_entropy(logits[0] if isinstance(logits, tuple) else logits, batch[1])

    def training_step(self, batch, batch_idx):
        if not self.is_vision:
            batch = self.ids[8 * batch_idx :][:8] if batch.ndim == 1 else batch
            batch = batch[:, : self.lengths[batch_idx % len(self.lengths)]]
        loss = self.loss(batch)
        self.seen.append(loss.item())
        self.log("train/loss", loss)
        return loss


def data_for(module, num_samples=128):
    if not module.is_vision:
        return loader(num_samples=num_samples)
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(num_samples) % 5
    noise = torch.randn(num_samples, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return DataLoader(TensorDataset(noise * 0.1 + targets[:, None, None, None] / 5, targets), batch_size=8)


def fit(folder, callbacks, module=None, *, data=None, resume=None, **options):
    L.seed_everything(0, verbose=False)
    module = Deep() if module is None else module
    options = {"strategy": "auto", "max_steps": STEPS, "max_epochs": -1, **options}
    trainer = make_trainer(folder, callbacks=callbacks, **options)
    validation = loader(num_samples=16) if "val_check_interval" in options else None
    trainer.fit(module, data_for(module) if data is None else data, validation, ckpt_path=resume)
    return module


def counts(callback):
    return callback.total.plus(callback._books.uncollected.amounts())


def assert_equal(mine, theirs):
    mine, theirs = mine.state_dict(), theirs.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


class Watch(L.Callback):
    """Notes the lengths inside of the blocks, at their first call in each batch. Stands right of all methods."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        anatomy, rows, self.hooks = anatomy_of(pl_module.net), {}, []
        self.batches.append((trainer.global_step, anatomy, rows))

        def note_shape(_, args, kwargs):
            rows["shape"] = anatomy.input_shape(args, kwargs)

        def note_rows(index, _, args):
            # A block that is skipped before any was run is run once without gradients, for the form of its output.
            if torch.is_grad_enabled():
                rows.setdefault(index, args[0].numel() // args[0].shape[-1])

        self.hooks.append(pl_module.net.register_forward_pre_hook(note_shape, with_kwargs=True))
        for index, block in enumerate(anatomy.blocks):
            parts = pl_module.net.get_submodule(block.path).modules()
            norm = next(part for part in parts if "Norm" in type(part).__name__)
            self.hooks.append(norm.register_forward_pre_hook(partial(note_rows, index)))

    def on_train_batch_end(self, *_):
        for hook in self.hooks:
            hook.remove()

    @property
    def layer_tokens(self):
        return sum(rows.get(index, 0) for _, anatomy, rows in self.batches for index in range(len(anatomy.blocks)))

    @property
    def kept(self):
        """The tokens of a sequence in each block, by optimizer step."""
        return [
            (step, tuple(rows.get(index, 0) // rows["shape"][0] for index in range(len(anatomy.blocks))))
            for step, anatomy, rows in self.batches
        ]

    def flops(self, checkpointing=False):
        total = 0
        for _, anatomy, rows in self.batches:
            cost = partial(training_flops, anatomy, *rows["shape"], activation_checkpointing=checkpointing)
            total += cost().outside_blocks
            for index, block in enumerate(anatomy.blocks):
                if index in rows:
                    is_whole = rows[index] == anatomy.places[block.place](*rows["shape"])
                    kept = {} if is_whole else {index: rows[index] // rows["shape"][0]}
                    total += cost(kept=kept).blocks[index]
        return total


# What runs, and what is counted

FAMILIES = ["gpt2-tied", "llama-gqa", "bert-mlm", "vit", "deit-distilled", "swin-padded"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_is_charged_as_planned(tmp_path, name):
    callback, ledger, watch = RandomLTD(**LTD), ComputeLedger(print_table=False), Watch()
    module = fit(tmp_path, [callback, ledger, watch], Deep(name))
    num_blocks = len(anatomy_of(module.net).blocks)
    assert callback.blocks == tuple(range(1, num_blocks - 1))
    assert len(set(watch.kept)) > 4
    total, count = ledger.phases.total, counts(callback)
    assert count.layer_tokens == watch.layer_tokens < count.dense_layer_tokens
    assert total.flops == watch.flops() < total.dense_flops
    assert total.tokens == count.tokens
    plan = TokenPlan(callback.anatomy, callback.blocks, callback.schedule, STEPS, count.tokens // (STEPS * 8))
    assert plan.progress()[-1] == STEPS * count.layer_tokens / count.dense_layer_tokens
    assert not intercepted(module)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_what_was_predicted(tmp_path, name):
    callback, ledger = RandomLTD(**LTD), ComputeLedger(print_table=False)
    fit(tmp_path, [callback, ledger], Deep(name))
    total = ledger.phases.total
    plan = TokenPlan(callback.anatomy, callback.blocks, callback.schedule, STEPS, total.tokens // (STEPS * 8))
    assert plan.saved_flops(8) > 0.1
    assert plan.saved_flops(8) == 1 - total.flops / total.dense_flops


@pytest.mark.parametrize("name", ["gpt2-tied", "vit", "swin-padded"])
def test_the_loss_falls(tmp_path, name):
    module = fit(tmp_path, [RandomLTD(**{**LTD, "growth": 0.7})], Deep(name), max_steps=40)
    assert sum(module.seen[-8:]) < 0.9 * sum(module.seen[:8])


WAYS = {
    "partial batch": ({}, {"data": loader(num_samples=20)}),
    "accumulation": ({}, {"accumulate_grad_batches": 2}),
    "lengths": ({"lengths": (12, 3, 7, 10)}, {}),
    "checkpointing": ({"checkpointing": True}, {}),
    "checkpointing in timm": ({"checkpointing": True, "name": "vit"}, {}),
    "all": (
        {"checkpointing": True, "lengths": (12, 5)},
        {"data": loader(num_samples=20), "accumulate_grad_batches": 2},
    ),
}


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("order", ["left", "right"])
def test_the_books_are_what_ran(tmp_path, way, order):
    of_module, options = WAYS[way]
    callback, ledger, watch = RandomLTD(**LTD), ComputeLedger(print_table=False), Watch()
    methods = [callback, ledger] if order == "left" else [ledger, callback]
    fit(tmp_path, [*methods, watch], Deep(**of_module), **options)
    count = counts(callback)
    assert count.layer_tokens == watch.layer_tokens
    assert count.tokens == ledger.phases.total.tokens == sum(b * t for b, t in (r["shape"] for *_, r in watch.batches))
    assert ledger.phases.total.flops == watch.flops("checkpointing" in of_module)
    kept = sum(rows[index] for *_, rows in watch.batches for index in callback.blocks)
    assert count.kept_tokens == kept / sum(4 * rows["shape"][0] for *_, rows in watch.batches)
    # One length for all micro-batches of a step that are as long.
    for step, (length, *inner, _) in watch.kept:
        assert inner == [callback.schedule.kept_tokens(step, length)] * 4


def test_a_share_of_everything_is_bitwise_no_callback_with_dropout_on(tmp_path):
    options = {"accumulate_grad_batches": 2, "max_steps": 5}
    plain = fit(tmp_path, [], Deep(dropout=0.2), **options)
    neutral = fit(tmp_path, [RandomLTD(start_tokens=1.0)], Deep(dropout=0.2), **options)
    assert len(set(plain.seen)) == 10
    assert neutral.seen == plain.seen
    assert_equal(neutral, plain)
    mine, theirs = (module.trainer.optimizers[0].state_dict()["state"] for module in (neutral, plain))
    assert len(theirs) == len(list(plain.parameters()))
    for index, state in theirs.items():
        assert all(torch.equal(mine[index][name], value) for name, value in state.items())


def test_validation_in_between_sees_every_token(tmp_path):
    class Check(L.Callback):
        num_checked = 0

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            plain = Deep()
            plain.load_state_dict(pl_module.state_dict())
            with torch.no_grad():
                assert torch.equal(pl_module.loss(batch), plain.eval().loss(batch))
            self.num_checked += 1

    check, counted, uncounted = Check(), RandomLTD(**LTD), RandomLTD(**LTD)
    validated = fit(tmp_path, [counted, check], val_check_interval=2)
    plain = fit(tmp_path, [uncounted])
    assert check.num_checked >= 12
    assert validated.seen == plain.seen
    assert counts(counted) == counts(uncounted)
    assert counts(counted).layer_tokens < counts(counted).dense_layer_tokens


def test_logs(tmp_path):
    watch = Watch()

    def logged(callbacks, resume=None):
        logger = CSVLogger(tmp_path, name="run")
        data = DataLoader(range(64))
        options = {"logger": logger, "log_every_n_steps": 3, "data": data, "resume": resume}
        fit(tmp_path, [RandomLTD(**LTD), *callbacks], **options)
        logger.save()
        with open(f"{logger.log_dir}/metrics.csv") as file:
            return [row for row in csv.DictReader(file) if row["token_dropping/layer_tokens"]]

    rows = logged([watch, SaveAlways(tmp_path)])
    # Also within the steps that a row is about.
    columns = [name for name in rows[0] if name.startswith("token_dropping/")]
    for after, resumed in ((row, logged([], tmp_path / f"batch-{batch}.ckpt")) for row, batch in ((1, 4), (3, 9))):
        assert [[row[name] for name in columns] for row in resumed] == [
            [row[name] for name in columns] for row in rows[after:]
        ]
    assert [int(row["step"]) for row in rows] == [2, 5, 8, 11]
    kept = [lengths[1] for _, lengths in watch.kept]
    for number, row in enumerate(rows):
        so_far = kept[: 3 * number + 3]
        assert float(row["token_dropping/kept_tokens"]) == sum(so_far[-3:]) / 3
        layer_tokens = 8 * sum(2 * 12 + 4 * k for k in so_far)
        assert float(row["token_dropping/layer_tokens"]) == layer_tokens
        assert float(row["token_dropping/effective_tokens"]) == pytest.approx(layer_tokens / 6)


def test_the_draws_are_new_in_each_micro_batch_and_epoch(tmp_path):
    """With the rate at zero nothing but the draw makes losses of the same batch differ."""

    def losses(seed):
        data = DataLoader(Tokens(8).ids.repeat(2, 1), batch_size=8)
        callback = RandomLTD(0.25, 1.0, 2, seed=seed)
        return fit(tmp_path, [callback], Deep(lr=0.0), data=data, max_steps=6, accumulate_grad_batches=2).seen

    first = losses(0)
    assert losses(0) == first
    assert len(first) == len(set(first)) == 12
    assert not set(losses(1)) & set(first)


class Subsets(L.Callback):
    """Notes which tokens go into each block, by what they are before tokens are dropped. Stands right of the method."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.kept, self.whole = {}, {}
        self.routing = routing_of(pl_module.net)
        for handler, order in ((self.before, Order.PROBE), (self.inside, Order.SUBSET)):
            self.routing.add(handler, order)

    def before(self, call, run):
        self.whole[call.index] = call.hidden_states
        return run(call)

    def inside(self, call, run):
        taken, whole = call.hidden_states, self.whole[call.index]
        self.kept[call.index] = (whole[:, :, None] == taken[:, None]).all(-1).any(-1)
        return run(call)

    def on_train_batch_end(self, *_):
        for handler in (self.before, self.inside):
            self.routing.remove(handler)
        self.batches.append([self.kept[index] for index in sorted(self.kept)])


@pytest.mark.parametrize("scope", ["layer", "route"])
def test_blocks_share_their_tokens_by_route_and_not_by_layer(tmp_path, scope):
    callback, subsets = RandomLTD(**LTD, scope=scope), Subsets()
    fit(tmp_path, [callback, subsets], Deep("deit-distilled"), max_steps=4)
    for first, *dropping, last in subsets.batches:
        assert first.all() and last.all() and len(dropping) == 4
        assert all((kept.sum(1) == dropping[0][0].sum()).all() and not kept.all() for kept in dropping)
        are_one = [torch.equal(one, other) for one, other in itertools.combinations(dropping, 2)]
        assert all(are_one) if scope == "route" else not any(are_one)


@pytest.mark.parametrize(("options", "prefix"), [({"scope": "input"}, 2), ({"scope": "layer", "keep_prefix": 1}, 1)])
def test_the_prefix_is_always_kept(tmp_path, options, prefix):
    """By input that of the model, for class and distillation; else what is asked for, and chance for the other."""
    callback, subsets = RandomLTD(**LTD, **options), Subsets()
    fit(tmp_path, [callback, subsets], Deep("deit-distilled"), max_steps=4)
    kept = torch.stack([kept for batch in subsets.batches for kept in batch if not kept.all()])
    assert kept[..., :prefix].all()
    assert not kept[..., prefix:].all((0, 1)).any()


# Resume

PHASES = [Phase(0, 3), Phase(1, 5), Phase(0)]
BESIDE = {
    "alone": lambda: [RandomLTD(**LTD)],
    "layers": lambda: [ProgressiveLayerDropping(gamma=1.0), RandomLTD(**LTD)],
    "levels": lambda: [MultiLevelTraining([Level()], PHASES), RandomLTD(**LTD)],
    "levels right": lambda: [RandomLTD(**LTD), MultiLevelTraining([Level()], PHASES)],
}


@pytest.mark.parametrize("beside", sorted(BESIDE))
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, beside):
    strategy = "resizable" if "levels" in beside else "auto"
    ledger, watch, methods = ComputeLedger(print_table=False), Watch(), BESIDE[beside]()
    callbacks = [*methods, ledger, watch, SaveAlways(tmp_path)]
    whole = fit(tmp_path, callbacks, Deep(scheduler="cosine"), data=DataLoader(range(64)), strategy=strategy)
    count = counts(next(each for each in methods if isinstance(each, RandomLTD)))
    assert count.layer_tokens == watch.layer_tokens < count.dense_layer_tokens
    assert ledger.phases.total.flops == watch.flops()
    assert len({lengths for _, lengths in watch.kept}) >= 5
    for batch in (3, 6, 8):
        again, methods = Watch(), BESIDE[beside]()
        options = {"resume": tmp_path / f"batch-{batch}.ckpt", "strategy": strategy}
        data = DataLoader(range(64), num_workers=int(batch == 6))
        module = fit(tmp_path / "again", [*methods, again], Deep(scheduler="cosine"), data=data, **options)
        assert again.kept == watch.kept[batch:]
        assert module.seen == whole.seen[batch:]
        assert_equal(module, whole)
        assert counts(next(each for each in methods if isinstance(each, RandomLTD))) == count


def test_with_accumulation_and_within_a_window(tmp_path):
    """The gradients of the first micro-batches are lost, as always with Lightning; the tokens are the same."""
    options = {"accumulate_grad_batches": 3, "max_steps": 6, "data": DataLoader(range(64))}
    ltd = {**LTD, "growth": 4}
    whole = fit(tmp_path, [RandomLTD(**ltd), SaveAlways(tmp_path)], **options)
    for step in (1, 3):
        after = fit(tmp_path, [RandomLTD(**ltd)], resume=tmp_path / f"batch-{3 * step}.ckpt", **options)
        assert after.seen == whole.seen[3 * step :]
        assert_equal(after, whole)
        for batch in (3 * step + 1, 3 * step + 2):
            within = fit(tmp_path, [RandomLTD(**ltd)], resume=tmp_path / f"batch-{batch}.ckpt", **options)
            rest = 3 * (step + 1) - batch
            assert within.seen[:rest] == whole.seen[batch:][:rest]


def test_it_may_go_on_with_a_batch_that_is_short(tmp_path):
    """Which is refused as the first one of a run, of which one does not know better."""
    lengths = (12, 12, 12, 3, 12)
    ltd, data = {**LTD, "start_tokens": 4}, DataLoader(range(64))
    whole = fit(tmp_path, [RandomLTD(**ltd), SaveAlways(tmp_path)], Deep(lengths=lengths), data=data)
    resumed = Deep(lengths=lengths)
    fit(tmp_path, [RandomLTD(**ltd)], resumed, data=data, resume=tmp_path / "batch-3.ckpt")
    assert resumed.seen == whole.seen[3:]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    fit(folder, [RandomLTD(**LTD), SaveAlways(folder)], data=DataLoader(range(64)), max_steps=2)
    return folder / "batch-2.ckpt"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"start_tokens": 0.5}, "start_tokens 0.25 (now 0.5)"),
        ({"growth": 10}, "growth_steps 9 (now 10)"),
        ({"quantum": 4, "seed": 5}, "quantum 2 (now 4), seed 0 (now 5)"),
        ({"pinned": [0], "scope": "route"}, "pinned [0, -1] (now [0]), scope layer (now route)"),
        ({"keep_prefix": 1, "max_lengths": 3}, "keep_prefix None (now 1), max_lengths None (now 3)"),
    ],
)
def test_other_rules_than_the_checkpoints_are_warned_about(tmp_path, checkpoint, changed, said, recwarn):
    fit(tmp_path, [RandomLTD(**{**LTD, **changed})], data=DataLoader(range(64)), max_steps=4, resume=checkpoint)
    warnings = [str(warning.message) for warning in recwarn if "rules of token dropping" in str(warning.message)]
    expected = f"The checkpoint was trained with other rules of token dropping: {said}. Those of now hold."
    assert warnings == ([] if said is None else [expected])


def test_a_second_fit(tmp_path):
    callback, watch = RandomLTD(**LTD), Watch()
    module = fit(tmp_path, [callback, watch], max_steps=4)
    first, trainer = counts(callback), module.trainer
    # The same run goes on.
    trainer.fit_loop.epoch_loop.max_steps = STEPS
    trainer.fit(module, loader())
    assert counts(callback).layer_tokens == watch.layer_tokens > first.layer_tokens
    assert [lengths[1] for _, lengths in watch.kept] == [callback.schedule.kept_tokens(t, 12) for t in range(STEPS)]
    # A run of another Trainer begins anew.
    fit(tmp_path, [callback], max_steps=4)
    assert counts(callback) == first


def test_the_mixin_brings_the_callback(tmp_path):
    class Mine(RandomLTDMixin, Deep):
        pass

    given = {"start_tokens": 0.5, "growth": 5, "quantum": 1, "pinned": [0], "seed": 9}
    module = fit(tmp_path, [], Mine(**{f"ltd_{name}": value for name, value in given.items()}))
    (callback,) = [each for each in module.trainer.callbacks if isinstance(each, RandomLTD)]
    assert {name: getattr(callback, name) for name in given} == given
    assert module.seen == fit(tmp_path, [RandomLTD(**given)]).seen


def test_the_mixin_takes_what_the_callback_takes():
    theirs, mine = (inspect.signature(kind).parameters for kind in (RandomLTD, RandomLTDMixin))
    assert {f"ltd_{name}": (p.default, p.annotation) for name, p in theirs.items()} == {
        name: (p.default, p.annotation) for name, p in mine.items() if name.startswith("ltd_")
    }


@pytest.mark.parametrize("name", ["gpt2-tied", "bert-mlm", "swin-padded"])
def test_mixed_precision(tmp_path, name):
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        module = fit(tmp_path, [RandomLTD(**LTD)], Deep(name), precision=precision, gradient_clip_val=0.5)
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
        losses[precision] = module.seen
    assert losses["bf16-mixed"] != losses["32-true"]
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)


def test_a_run_of_no_steps(tmp_path):
    fit(tmp_path, [RandomLTD(**LTD, num_tokens=12)], max_steps=0)
