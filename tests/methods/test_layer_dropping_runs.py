"""Layer dropping in whole runs: resume, measurements, resizing, mixed precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric, MetricCollection, SumMetric
from transformers import BatchEncoding

from lit_accel import (
    Level,
    MultiLevelTraining,
    Phase,
    ProgressiveLayerDropping,
    SensitivityLayerDropping,
)
from lit_accel.anatomy import compile_blocks, is_compiled
from lit_accel.methods.layer_dropping import ablate, keep_probabilities
from lit_accel.methods.layer_dropping.probing import measuring, training_loss
from lit_accel.routing import routing_of
from tests.data.saving import SaveAlways
from tests.methods.dropping import (
    Masks,
    count_calls,
    intercepted,
)
from tests.models import make_model
from tests.training import SIZE, TinyModule, Tokens, loader, make_trainer

# Resume


class Indexed(TinyModule):
    """Takes its data by the index of the batch, so that a run can go on in the middle of an epoch."""

    def __init__(self, blocks: int = 6) -> None:
        super().__init__(scheduler="cosine")
        self.net = make_model("gpt2-tied", dtype=torch.float32, **{**SIZE, "blocks": blocks}).train()
        self.ids = Tokens(512).ids
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.ids[8 * batch_idx :][:8])
        if torch.is_grad_enabled():
            self.seen.append(loss.item())
        return loss


STEPS = 16
SBLD = {"kept": 0.72, "warmup": 3, "ramp": 2, "release": 2, "min_keep": 0.1, "protected": 0.2, "max_overhead": 1.0}
METHODS = {
    "pld": partial(ProgressiveLayerDropping, gamma=1.0, release=3),
    "pld-bernoulli": partial(ProgressiveLayerDropping, gamma=1.0, sampler="bernoulli"),
    "ablate": partial(SensitivityLayerDropping, measure_every=4, num_batches=2, **SBLD),
    "taylor": partial(SensitivityLayerDropping, measure_every=4, num_batches=2, estimator="taylor", **SBLD),
}


def run(folder, callbacks, *, resume=None, module=None, **options):
    """Train, all checkpoints in the folder; returns what a resumed run must reproduce."""
    module = module or Indexed()
    masks = Masks(next(callback for callback in callbacks if hasattr(callback, "keep_probabilities")))
    trainer = make_trainer(folder, callbacks=[*callbacks, masks], max_epochs=-1, **{"max_steps": STEPS, **options})
    trainer.fit(module, DataLoader(range(64)), ckpt_path=resume)
    return module, masks


def last(items: dict, start: int) -> dict:
    return {step: item for step, item in items.items() if step >= start}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    method = METHODS[name]()
    whole, masks = run(tmp_path, [method, SaveAlways(tmp_path)])
    assert list(masks.keep) == list(range(STEPS))
    assert sum(not all(keep) for keep in masks.keep.values()) >= 6
    collected = {}
    for batch in (2, 4, 5, 9, 13):
        path = tmp_path / f"batch-{batch}.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"]
        collected[batch] = next((s["collected"] for s in state.values() if "collected" in s), None)
        resumed = METHODS[name]()
        module, again = run(tmp_path, [resumed], resume=path)
        assert (again.keep, again.probabilities) == (last(masks.keep, batch), last(masks.probabilities, batch))
        assert module.seen == whole.seen[batch:]
        for key, value in whole.state_dict().items():
            assert torch.equal(module.state_dict()[key], value), key
        assert resumed.state_dict() == method.state_dict()
    if "pld" not in name:
        assert len(set(method.sensitivities)) == 6
        # A measurement of two batches was interrupted.
        assert len(collected[4]) == 1


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_mask_outlives_an_interruption_of_its_accumulation_window(tmp_path, name):
    """The gradients of the first micro-batches are lost, as always with Lightning; the mask is not."""
    options = {"accumulate_grad_batches": 3}
    method = METHODS[name]()
    _, masks = run(tmp_path, [method, SaveAlways(tmp_path)], **options)
    steps = [4, 8] if "pld" in name else method.history.measured_at[1:]
    assert len(steps) >= 2
    for step in steps:
        # Measurements end with the second micro-batch, and what they find is for the next step.
        for batch in (3 * step + 1, 3 * step + 2):
            _, again = run(tmp_path, [METHODS[name]()], resume=tmp_path / f"batch-{batch}.ckpt", **options)
            assert again.keep[step] == masks.keep[step]
            assert again.probabilities[step] == masks.probabilities[step]


LENGTHS = {
    **METHODS,
    "pld-by-factor": partial(ProgressiveLayerDropping, gamma_factor=20),
    "pld-decreasing": partial(ProgressiveLayerDropping, direction="decreasing"),
}


@pytest.mark.parametrize("name", sorted(LENGTHS))
@pytest.mark.parametrize("written_by", ["this version", "an earlier one"])
def test_a_run_of_another_length_is_warned_about_where_the_schedule_depends_on_it(tmp_path, recwarn, name, written_by):
    run(tmp_path, [LENGTHS[name](), SaveAlways(tmp_path)])
    path = tmp_path / "batch-8.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    if written_by == "an earlier one":
        for state in checkpoint["callbacks"].values():
            state.get("rules", {}).pop("num_steps", None)
        torch.save(checkpoint, path)

    def warnings_of(max_steps):
        recwarn.clear()
        method = LENGTHS[name]()
        _, masks = run(tmp_path, [method], resume=path, max_steps=max_steps)
        return masks, [str(warning.message) for warning in recwarn if "other rules" in str(warning.message)]

    same, none = warnings_of(STEPS)
    longer, said = warnings_of(2 * STEPS)
    assert not none
    is_other = any(same.probabilities[step] != longer.probabilities[step] for step in same.probabilities)
    assert is_other is (name != "pld-bernoulli")
    if is_other and written_by == "this version":
        assert len(said) == 1
        assert "other rules of layer dropping: num_steps 16 (now 32)" in said[0]
    else:
        assert not said


class Overflows(L.Callback):
    """Has a gradient scaler try a factor that is too large, in some steps."""

    def __init__(self, steps) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        scaler = trainer.precision_plugin.scaler
        factor = 2.0**40 if trainer.global_step in self.steps else 2.0**10
        scaler.load_state_dict({**scaler.state_dict(), "scale": factor})


def half_precision() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


@pytest.mark.parametrize("steps", [(3,), (4,), (9, 10)], ids=["first", "second of two batches", "twice"])
def test_a_batch_whose_gradients_overflow_is_not_measured(tmp_path, steps):
    def train(overflows, **options):
        method = METHODS["taylor"]()
        callbacks = [Overflows(overflows), method, *options.pop("callbacks", ())]
        module, masks = run(tmp_path, callbacks, plugins=half_precision(), **options)
        return method, module, masks

    calm, *_ = train(())
    with pytest.warns(UserWarning, match="not finite at step.*another one is measured") as warnings:
        method, whole, masks = train(steps, callbacks=[SaveAlways(tmp_path)])
    assert sum("not finite" in str(warning.message) for warning in warnings) == 1
    # Shares of what all blocks are worth, none of them made up. Each lost batch delays the measurement by one.
    for values in method.history.sensitivities:
        assert sum(values) == pytest.approx(1)
        assert len(set(values)) == 6
    number = 0 if steps[0] < 5 else 1
    assert method.history.measured_at[number] == calm.history.measured_at[number] + len(steps)
    for batch in range(steps[0], steps[-1] + 2):
        resumed, module, again = train(steps, resume=tmp_path / f"batch-{batch}.ckpt")
        assert (again.keep, again.probabilities) == (last(masks.keep, batch), last(masks.probabilities, batch))
        assert module.seen == whole.seen[batch:]
        assert resumed.state_dict() == method.state_dict()


# Measuring


def test_a_step_that_takes_no_notice_of_a_batch_is_not_measured(tmp_path):
    """As many skip one whose loss is not finite."""

    class Skips(Indexed):
        is_skipped = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            # As it is measured, without gradients; a step of training is never skipped here.
            return None if self.is_skipped and not torch.is_grad_enabled() and self.trainer.global_step < 5 else loss

    def train(is_skipped):
        method, module = METHODS["ablate"](), Skips()
        module.is_skipped = is_skipped
        run(tmp_path, [method], module=module)
        return method.history.measured_at[0], method.history.sensitivities

    first, _ = train(False)
    assert first < 5
    with pytest.warns(UserWarning, match=r"the loss was not finite at step.*nothing new is known until then"):
        measured, sensitivities = train(True)
    assert measured >= 5
    assert all(math.isfinite(value) for values in sensitivities for value in values)


@pytest.mark.parametrize("kind", ["draws", "calls twice"])
def test_ablation_is_what_leaving_a_block_out_by_hand_does(tmp_path, kind):
    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            if kind == "calls twice":
                return self.loss(batch[:4]) + 2 * self.loss(batch[4:])
            return self.loss(torch.where(torch.rand(batch.shape) < 0.3, 3, batch))

    measured = {}

    class Measure(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            routing = routing_of(pl_module.net)

            def loss():
                return training_loss(pl_module, batch, batch_idx)

            def without(unit):
                def leave_out(call, run):
                    return routing.skip(call) if call.index == unit else run(call)

                with routing.probe(leave_out):
                    return loss().double().item()

            with measuring(trainer, pl_module):
                measured["ablate"] = ablate(routing, loss, range(4))
                full = without(None)
                measured["by hand"] = full, [without(unit) - full for unit in range(4)]

    make_trainer(tmp_path, callbacks=[Measure()], max_steps=1).fit(Module(), loader())
    assert measured["ablate"] == measured["by hand"]
    assert all(change != 0 for change in measured["ablate"][1])


@dataclass
class Pair:
    """A batch of a user's own kind."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class Parts(NamedTuple):
    labels: torch.Tensor
    note: str


BATCHES = {
    "dict": dict,
    "BatchEncoding": BatchEncoding,
    "dataclass": lambda parts: Pair(**parts),
    "nested": lambda parts: [{"x": (parts["input_ids"],)}, Parts(parts["labels"], "a string")],
    "a tensor twice": lambda parts: {"input_ids": parts["input_ids"], "labels": parts["input_ids"]},
}


@pytest.mark.parametrize("kind", sorted(BATCHES))
def test_measuring_leaves_the_batch_as_it_was(tmp_path, kind):
    """The step masks in place and takes its labels away: it is trained on what it would be without a measurement."""

    class Masking(TinyModule):
        def training_step(self, batch, batch_idx):
            if kind == "dataclass":
                ids, labels = batch.input_ids, batch.labels
                batch.labels = None
            elif kind == "nested":
                ids, labels = batch[0].pop("x")[0], batch.pop().labels
            else:
                ids, labels = batch["input_ids"], batch.pop("labels")
            ids[torch.rand(ids.shape) < 0.3] = 3
            logits = self.net(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            self.losses.append(loss.item())
            return loss

    class Measure(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            num_seen = len(pl_module.losses)
            with measuring(trainer, pl_module):
                ablate(routing_of(pl_module.net), lambda: training_loss(pl_module, batch, batch_idx), range(4))
            measured = pl_module.losses[num_seen:]
            assert len(set(measured)) == 5
            del pl_module.losses[num_seen:]

    def train(callbacks):
        L.seed_everything(0, verbose=False)
        module = Masking()
        ids = Tokens(24).ids
        data = [BATCHES[kind]({"input_ids": x.clone(), "labels": x.clone()}) for x in ids.split(8)]
        make_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(module, DataLoader(data, batch_size=None))
        assert len(module.losses) == 3
        return module

    plain, measured = train([]), train([Measure()])
    assert measured.losses == plain.losses
    assert all(torch.equal(measured.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_measuring_leaves_buffers_as_they_were(tmp_path):
    class Counting(Indexed):
        def __init__(self):
            super().__init__()
            self.register_buffer("num_seen", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.num_seen += 1
            self.mean = 0.5 * self.mean + 0.5 * loss.detach()
            return loss

    method = METHODS["ablate"]()
    module, _ = run(tmp_path, [method], module=Counting())
    assert len(method.history.measured_at) == 3
    assert module.num_seen == STEPS
    mean = 0.0
    for loss in module.seen:
        mean = 0.5 * mean + 0.5 * loss
    assert module.mean.item() == pytest.approx(mean, rel=1e-5)


def test_measuring_leaves_metrics_as_they_were(tmp_path):
    class Scored(Indexed):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()
            self.several = MetricCollection({"mean": MeanMetric(), "sum": SumMetric(), "all": CatMetric()})

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.mean.update(loss.detach())
            self.several.update(loss.detach())
            return loss

    method = METHODS["ablate"]()
    module, _ = run(tmp_path, [method], module=Scored())
    assert len(method.history.measured_at) == 3
    assert len(module.seen) == module.mean.update_count == STEPS
    assert module.mean.compute().item() == pytest.approx(sum(module.seen) / STEPS, rel=1e-5)
    several = module.several.compute()
    assert several["all"].tolist() == pytest.approx(module.seen, rel=1e-5)
    assert several["sum"].item() == pytest.approx(sum(module.seen), rel=1e-5)


def test_a_second_fit_goes_on_with_the_protected_blocks(tmp_path):
    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.block_list = method.state_dict()["block_list"]

    method, look = METHODS["taylor"](), Look()
    trainer = make_trainer(tmp_path, callbacks=[method, look], max_steps=STEPS, max_epochs=-1)
    module = Indexed()
    trainer.fit(module, DataLoader(range(64)))
    assert not look.block_list["sensitive"]
    before = method.state_dict()["block_list"]
    assert before["sensitive"]
    trainer.fit_loop.epoch_loop.max_steps = STEPS + 2
    trainer.fit(module, DataLoader(range(64)))
    assert look.block_list == before


def test_measuring_compiled_blocks_needs_no_graph_for_each(tmp_path, graphs):
    module = Indexed(blocks=12)
    compile_blocks(module.net, backend=graphs)
    method = METHODS["ablate"]()
    run(tmp_path, [method], module=module)
    assert method.history.measured_at
    assert method.total.kept_share < 0.9
    # In training and in evaluation mode, with and without an input that needs a gradient.
    assert graphs.count <= 4


# Resizing

PHASES = [Phase(0, 4), Phase(1, 6), Phase(0)]
DEPTHS = [4] * 4 + [2] * 6 + [4] * 6


class FollowsTheModel(L.Callback):
    """The blocks that are there now are the ones that are dropped. Stands right of both methods."""

    def __init__(self, method, compiled=False) -> None:
        self.method, self.compiled = method, compiled
        self.depths: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        blocks = pl_module.net.transformer.h
        self.depths.append(len(blocks))
        assert intercepted(pl_module) == list(blocks)
        assert [is_compiled(block) for block in blocks] == [self.compiled] * len(blocks)
        theta = self.method.theta_at(trainer.global_step)
        assert self.method.keep_probabilities == keep_probabilities(theta, len(blocks))
        for keep, block in zip(self.method.keep, blocks, strict=True):
            assert all((parameter.grad is not None) is keep for parameter in block.parameters())


def cycle(folder, order, *, resume=None, compiled=None, callbacks=()):
    method, levels = ProgressiveLayerDropping(gamma=2.0), MultiLevelTraining([Level()], PHASES)
    watch = FollowsTheModel(method, compiled is not None)
    module = Indexed(blocks=4)
    if compiled is not None:
        compile_blocks(module.net, backend=compiled)
    first = [levels, method] if order == "resize first" else [method, levels]
    module, masks = run(folder, [*first, watch, *callbacks], resume=resume, module=module)
    assert watch.depths == DEPTHS[-len(watch.depths) :]
    return module, masks


@pytest.fixture(scope="module")
def cycles(tmp_path_factory):
    """Uninterrupted V-cycles, and their checkpoints."""
    made = {}
    for order in ("resize first", "resize last"):
        folder = tmp_path_factory.mktemp(order.replace(" ", "-"))
        made[order] = (folder, *cycle(folder, order, callbacks=[SaveAlways(folder)]))
    return made


def test_a_v_cycle_drops_the_blocks_of_each_size(cycles):
    (_, module, masks), (_, other, others) = cycles.values()
    dropped = {step for step, keep in masks.keep.items() if not all(keep)}
    assert len(dropped & set(range(4, 10))) >= 2
    assert len(dropped & set(range(10, 16))) >= 3
    assert (masks.keep, masks.probabilities) == (others.keep, others.probabilities)
    assert module.seen == other.seen
    for each in (module, other):
        assert not intercepted(each)
        assert not each.net._forward_pre_hooks
    assert not torch.nn.modules.module._global_module_registration_hooks


@pytest.mark.parametrize("order", ["resize first", "resize last"])
# Before the switch, at it, inside of the small phase, and at its end.
@pytest.mark.parametrize("batch", [3, 4, 6, 10])
def test_a_v_cycle_is_resumed_bitwise(cycles, tmp_path, order, batch):
    folder, whole, masks = cycles[order]
    module, again = cycle(tmp_path, order, resume=folder / f"batch-{batch}.ckpt")
    assert (again.keep, again.probabilities) == (last(masks.keep, batch), last(masks.probabilities, batch))
    assert module.seen == whole.seen[batch:]
    for key, value in whole.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key


def test_compiled_blocks_stay_compiled_through_a_v_cycle(cycles, tmp_path, graphs):
    _, whole, _ = cycles["resize first"]
    module, _ = cycle(tmp_path, "resize first", compiled=graphs)
    assert 1 <= graphs.count <= 4
    assert module.seen == pytest.approx(whole.seen, rel=1e-4)
    assert all(is_compiled(block) for block in module.net.transformer.h)
    assert not any(hasattr(block._compiled_call_impl, "restore") for block in module.net.transformer.h)


def test_a_trainer_that_was_resumed_in_the_small_phase_can_go_on(cycles, tmp_path):
    folder, *_ = cycles["resize first"]
    method, levels = ProgressiveLayerDropping(gamma=2.0), MultiLevelTraining([Level()], PHASES)
    trainer = make_trainer(tmp_path, callbacks=[levels, method], max_steps=STEPS, max_epochs=-1)
    module = Indexed(blocks=4)
    trainer.fit(module, DataLoader(range(64)), ckpt_path=folder / "batch-6.ckpt")
    trainer.fit_loop.epoch_loop.max_steps = STEPS + 2
    trainer.fit(module, DataLoader(range(64)))
    assert trainer.global_step == STEPS + 2


# Mixed precision, accumulation and clipping


class Ran(L.Callback):
    """Notes which blocks ran in each micro-batch, by what was called inside of them."""

    def on_train_start(self, trainer, pl_module):
        self.calls = count_calls(pl_module.net)
        self.windows: dict[int, list[tuple[int, ...]]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before, self.step = list(self.calls), trainer.global_step

    def on_train_batch_end(self, *_):
        ran = tuple(now - then for now, then in zip(self.calls, self.before, strict=True))
        self.windows.setdefault(self.step, []).append(ran)


def test_mixed_precision_with_accumulation_and_clipping(tmp_path):
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        method, ran = ProgressiveLayerDropping(gamma=2.0), Ran()
        module, masks = run(
            tmp_path,
            [method, ran],
            precision=precision,
            accumulate_grad_batches=3,
            gradient_clip_val=0.5,
        )
        assert len(ran.windows) == STEPS
        for step, window in ran.windows.items():
            assert window == [tuple(map(int, masks.keep[step]))] * 3
        assert len(set(map(tuple, masks.keep.values()))) > 4
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
        losses[precision] = module.seen
    assert losses["bf16-mixed"] != losses["32-true"]
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)
