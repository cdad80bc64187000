"""What a block is worth: the estimators against their definitions, and what the callback makes of them."""

from __future__ import annotations

import itertools
import math

import lightning.pytorch as L
import pytest
import torch

from lit_accel import ComputeLedger, SensitivityLayerDropping
from lit_accel.methods.layer_dropping import Meter, ablate, sbld
from lit_accel.methods.layer_dropping.probing import measuring, training_loss
from lit_accel.methods.layer_dropping.sensitivity import ESTIMATES, ablation_flops, evaluating
from lit_accel.routing import Order, hidden_states_of, routing_of, with_hidden_states
from tests.models import make_model, tokens
from tests.training import TinyModule, Tokens, loader, make_trainer

SIZE = {"heads": 2, "head_dim": 8, "ffn": 32, "blocks": 6}


def language_model(name="gpt2-tied"):
    model = make_model(name, **SIZE).train()
    ids = tokens(model, batch=4, length=9)

    def loss():
        if not hasattr(model, "config"):
            logits = model(ids)
            return (logits[0] if isinstance(logits, tuple) else logits).logsumexp(-1).mean()
        logits = model(input_ids=ids).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return model, loss


def zero_outputs(model, index):
    """Make a block add nothing."""
    routing = routing_of(model)
    with torch.no_grad():
        for name, parameter in routing.modules[index].named_parameters():
            if name in routing.blocks[index].branch_outputs:
                parameter.zero_()


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm", "vit-registers", "swin"])
def test_ablation_is_the_loss_without_a_block_minus_the_loss_with_it(name):
    model, loss = language_model(name)
    routing = routing_of(model)
    num_blocks = len(routing.blocks)
    with evaluating(model):
        full, changes = ablate(routing, loss, range(num_blocks))
        assert full == loss().item()
        again = ablate(routing, loss, range(num_blocks))
        assert again == (full, changes)
        for index in range(num_blocks):
            # Without prefixes, by hand.
            def leave_out(block_call, run, index=index):
                return routing.skip(block_call) if block_call.index == index else run(block_call)

            with routing.probe(leave_out):
                assert loss().item() - full == pytest.approx(changes[index], abs=1e-14)
    assert all(part.training for part in model.modules())
    assert all("_compiled_call_impl" not in vars(part) for part in model.modules())


def test_ablation_runs_no_block_twice_before_the_one_it_leaves_out():
    model, loss = language_model()
    routing = routing_of(model)
    calls = [0] * 6
    for index, module in enumerate(routing.modules):
        module.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    with evaluating(model):
        ablate(routing, loss, range(6))
    assert calls == [1 + index for index in range(6)]
    # What that is charged: a forward pass of each block as often as it ran, and what lies outside of them each time.
    forward = [10**index for index in range(6)]
    runs = sum(number * each for number, each in zip(calls, forward, strict=True))
    assert ablation_flops(forward, 10**6, range(6)) == runs + 7 * 10**6


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit-registers", "swin"])
def test_a_block_that_adds_nothing_is_worth_nothing(name):
    model, loss = language_model(name)
    zero_outputs(model, 2)
    with evaluating(model):
        _, changes = ablate(routing_of(model), loss, range(len(routing_of(model).blocks)))
    assert changes[2] == 0
    for estimator in ESTIMATES:
        meter = Meter(routing_of(model), estimator)
        loss().backward()
        values = meter.close()
        assert values[2] == pytest.approx(0, abs=1e-7)
        assert all(value > 1e-6 for index, value in enumerate(values) if index != 2)


def test_taylor_is_the_slope_of_the_loss_token_by_token():
    """Scaling what a block adds to one token by 1 - eps changes the loss by eps times that token's term."""
    model, loss = language_model()
    routing = routing_of(model)
    meter = Meter(routing, "taylor")
    loss().backward()
    estimate = meter.close()

    def shrunk(index, row, column, eps):
        def handler(block_call, run):
            output = run(block_call)
            if block_call.index != index:
                return output
            x, y = block_call.hidden_states, hidden_states_of(output).clone()
            y[row, column] = x[row, column] + (1 - eps) * (y[row, column] - x[row, column])
            return with_hidden_states(output, y)

        routing.add(handler, Order.PROBE)
        with torch.no_grad():
            value = loss().item()
        routing.remove(handler)
        return value

    eps = 1e-4
    for index in (0, 3, 5):
        slopes = [
            (shrunk(index, row, column, eps) - shrunk(index, row, column, -eps)) / (2 * eps)
            for row in range(4)
            for column in range(9)
        ]
        assert sum(map(abs, slopes)) == pytest.approx(estimate[index], rel=1e-3)


def test_ratio_and_cosine_are_what_they_are_called():
    model, loss = language_model()
    routing = routing_of(model)
    pairs = {}

    def record(block_call, run):
        output = run(block_call)
        pairs[block_call.index] = (block_call.hidden_states.detach(), hidden_states_of(output).detach())
        return output

    routing.add(record, Order.PROBE)
    measured = {}
    for estimator in ("ratio", "cos"):
        meter = Meter(routing, estimator)
        loss().backward()
        measured[estimator] = meter.close()
    for index, (x, y) in pairs.items():
        ratio = ((y - x).norm(dim=-1) / x.norm(dim=-1)).mean()
        cosine = ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()
        assert measured["ratio"][index] == pytest.approx(ratio.item(), rel=1e-5)
        assert measured["cos"][index] == pytest.approx(1 - cosine.item(), rel=1e-4)


def test_a_token_of_zeros_has_no_ratio():
    model, _ = language_model("llama-gqa")
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
    routing = routing_of(model)
    ids = torch.tensor([[0, 5, 6, 7]])
    values = []
    for inputs in (ids, ids[:, 1:]):
        meter = Meter(routing, "ratio")
        # Without attention to others each token is by itself.
        alone = torch.eye(inputs.shape[1], dtype=torch.bool)[None, None]
        model(input_ids=inputs, attention_mask=alone, use_cache=False)
        values.append(meter.close()[0])
    assert 0 < values[0] < 100
    assert values[0] == pytest.approx(values[1], rel=0.2)


def test_a_longer_list_does_not_break_the_budget(tmp_path):
    callback = SensitivityLayerDropping(kept=0.8, warmup=1, ramp=0, release=0)
    module = TinyModule()
    module.net = make_model("gpt2-tied", dtype=torch.float32, vocab=64, **{**SIZE, "blocks": 8}).train()
    trainer = make_trainer(tmp_path, callbacks=[callback], strategy="auto", max_steps=100, max_epochs=-1)
    callback.setup(trainer, module, "fit")
    callback._num_measured_tokens = 12
    for first in (1, 3, 5):
        callback.sensitivities = [5.0 if index in (first, first + 1) else 1.0 for index in range(8)]
        callback._blocks.update(callback.sensitivities)
    assert len(callback._blocks.members) == 6
    assert sum(callback.probabilities(50)) / 8 == pytest.approx(0.8)


def test_it_can_be_turned_on_at_a_resume(tmp_path):
    def fit(callback, max_steps, ckpt_path=None):
        module = TinyModule()
        module.net = make_model("gpt2-tied", dtype=torch.float32, vocab=64, **SIZE).train()
        trainer = make_trainer(tmp_path, callbacks=[callback], strategy="auto", max_steps=max_steps, max_epochs=-1)
        trainer.fit(module, loader(), ckpt_path=ckpt_path, weights_only=False)
        return trainer

    fit(SensitivityLayerDropping(kept=1.0), 4).save_checkpoint(tmp_path / "dense.ckpt")
    callback = SensitivityLayerDropping(kept=0.8, warmup=6, ramp=0, max_overhead=1.0, num_batches=1)
    with pytest.warns(UserWarning, match=r"other rules of layer dropping: kept 1.0 \(now 0.8\)"):
        fit(callback, 30, tmp_path / "dense.ckpt")
    assert callback.history.measured_at[0] == 6
    assert callback.total.kept < callback.total.dense


class Noisy(TinyModule):
    """Its training step draws numbers, logs, and has dropout: none of which a measurement may leave a trace of."""

    def __init__(self):
        super().__init__()
        self.net = make_model("gpt2-tied", dtype=torch.float32, vocab=64, **SIZE).train()
        self.net.transformer.h[1].eval()
        self.net.transformer.h[1].train()
        self.norm = torch.nn.BatchNorm1d(1)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch) + 0 * torch.rand(()) + 0 * self.norm(torch.rand(4, 1)).sum()
        self.log("train/loss", loss)
        self.log_dict({"train/other": loss})
        return {"loss": loss}


def test_measuring_leaves_no_trace(tmp_path):
    module = Noisy()
    module.norm.eval()
    seen = []

    class Measure(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before = {name: value.clone() for name, value in pl_module.state_dict().items()}
            modes = [part.training for part in pl_module.modules()]
            rng = torch.get_rng_state()
            for _ in range(2):
                with measuring(trainer, pl_module):
                    seen.append(
                        ablate(routing_of(pl_module.net), lambda: training_loss(pl_module, batch, batch_idx), range(6))
                    )
            assert seen[-1] == seen[-2]
            assert torch.equal(rng, torch.get_rng_state())
            assert modes == [part.training for part in pl_module.modules()]
            assert all(torch.equal(before[name], value) for name, value in pl_module.state_dict().items())
            assert all(parameter.grad is None for parameter in pl_module.parameters())
            assert {"log", "log_dict"}.isdisjoint(vars(pl_module))

    trainer = make_trainer(tmp_path, callbacks=[Measure()], strategy="auto", max_steps=1)
    trainer.fit(module, loader())
    assert set(trainer.callback_metrics) == {"train/loss", "train/other"}


def test_swin_at_its_start_measures_nothing_and_drops_uniformly(tmp_path):
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    class Swin(TinyModule):
        def __init__(self):
            super().__init__()
            self.net = SwinTransformerV2(
                img_size=16, patch_size=2, embed_dim=16, depths=(2, 8), num_heads=(2, 4), window_size=4, num_classes=5
            ).train()

        def loss(self, ids):
            images = ids.float().repeat(1, 64).view(len(ids), 3, 16, 16) / 60
            return torch.nn.functional.cross_entropy(self.net(images), ids[:, 0] % 5)

    callback = SensitivityLayerDropping(kept=0.8, warmup=0, ramp=0, release=0, measure_every=100, num_batches=1)
    trainer = make_trainer(tmp_path, callbacks=[callback], strategy="auto", max_steps=2, max_epochs=-1)
    with pytest.warns(UserWarning, match="no block made a difference"):
        trainer.fit(Swin(), loader())
    assert callback.sensitivities == [0.0] * 10
    assert callback.units == list(range(2, 10))
    # First and last of those that may be dropped, and the short stage, are kept; the others alike.
    assert callback.keep_probabilities[:3] == [1, 1, 1]
    assert callback.keep_probabilities[-1] == 1
    (shared,) = {round(p, 9) for p in callback.keep_probabilities[3:-1]}
    assert 0.4 < shared < 1
    costs = callback.costs()
    kept = sum(c * p for c, p in zip(costs, callback.keep_probabilities, strict=True)) / sum(costs)
    assert kept == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(
    "finite", [[1.0, 2.0, 0.5], [-0.5, -0.2, -0.1], [0.0, 0.0, 0.0]], ids=["up", "down", "nothing"]
)
def test_blocks_without_which_the_loss_is_not_finite_are_worth_the_most(tmp_path, monkeypatch, finite):
    changes = [finite[0], math.inf, finite[1], math.nan, finite[2], finite[0]]
    monkeypatch.setattr(sbld, "ablate", lambda routing, loss, units: (loss(), changes))
    callback = SensitivityLayerDropping(kept=0.8, warmup=0, ramp=0, release=0, measure_every=100, num_batches=1)
    trainer = make_trainer(tmp_path, callbacks=[callback], strategy="auto", max_steps=2, max_epochs=-1)
    trainer.fit(TinyModule(net=make_model("gpt2-tied", **SIZE, vocab=64)), loader())
    others = [callback.sensitivities[index] for index in (0, 2, 4)]
    assert others == finite
    assert callback.sensitivities[1] == callback.sensitivities[3] > max(map(abs, others))


def test_a_measurement_is_the_mean_over_its_batches_and_the_past_has_a_weight(tmp_path, monkeypatch):
    batches = iter([[8, 0, 2, -4, 1, 0], [4, 2, 2, 0, 0, 6], [0, 9, 2, 6, 1, 3], [4, 1, 6, 0, 2, 1]])
    monkeypatch.setattr(sbld, "ablate", lambda routing, loss, units: (loss(), list(map(float, next(batches)))))
    options = {"num_batches": 2, "ema": 0.75, "measure_every": 4, "max_overhead": 1.0}
    # Nothing is measured from step 8 on.
    callback = SensitivityLayerDropping(kept=0.8, warmup=0, ramp=0, release=12, **options)
    trainer = make_trainer(tmp_path, callbacks=[callback], strategy="auto", max_steps=20, max_epochs=-1)
    trainer.fit(TinyModule(net=make_model("gpt2-tied", dtype=torch.float32, **SIZE, vocab=64)), loader())
    # The second is [2, 5, 4, 3, 1.5, 2] by itself.
    means = [[6, 1, 2, -2, 0.5, 3], [5, 2, 2.5, -0.75, 0.75, 2.75]]
    assert callback.history.measured_at == [1, 6]
    assert callback.history.sensitivities == means
    assert callback.sensitivities == means[-1]


# A planted model: one block does everything, the others add nothing and cannot learn to.

ESSENTIAL, NUM_BLOCKS = 4, 8


class Planted(TinyModule):
    def __init__(self):
        super().__init__(lr=3e-3)
        self.net = make_model(
            "gpt2-tied", dtype=torch.float32, heads=2, head_dim=16, ffn=128, blocks=NUM_BLOCKS, vocab=64
        ).train()
        for index, block in enumerate(self.net.transformer.h):
            if index != ESSENTIAL:
                zero_outputs(self.net, index)
                block.requires_grad_(False)


def train_planted(tmp_path, allocation, estimator="ablate", max_steps=150):
    L.seed_everything(0, verbose=False)
    callback = SensitivityLayerDropping(
        kept=0.5,
        min_keep=0.2,
        allocation=allocation,
        estimator=estimator,
        warmup=0.1,
        ramp=0,
        release=0,
        protected=0.0,
        max_overhead=0.2,
    )
    module = Planted()
    trainer = make_trainer(tmp_path, callbacks=[callback], strategy="auto", max_steps=max_steps, max_epochs=-1)
    trainer.fit(module, loader(16))
    with torch.no_grad():
        held_out = module.eval().loss(Tokens(512).ids[256:]).item()
    return callback, held_out


def test_it_finds_the_essential_block_and_beats_other_allocations_of_the_same_budget(tmp_path):
    results = {name: train_planted(tmp_path, name) for name in ("sensitivity", "depth", "uniform")}
    mine, loss = results["sensitivity"]
    assert max(range(NUM_BLOCKS), key=lambda index: mine.sensitivities[index]) == ESSENTIAL
    assert mine.keep_probabilities[ESSENTIAL] == 1
    for name in ("depth", "uniform"):
        other, other_loss = results[name]
        assert other.keep_probabilities[ESSENTIAL] < 0.95
        assert other.total.planned_share == pytest.approx(mine.total.planned_share, abs=1e-3)
        assert loss < other_loss - 0.02, {name: loss for name, (_, loss) in results.items()}


@pytest.mark.parametrize("estimator", ESTIMATES)
def test_the_estimates_find_the_essential_block_too(tmp_path, estimator):
    callback, _ = train_planted(tmp_path, "sensitivity", estimator, max_steps=40)
    assert max(range(NUM_BLOCKS), key=lambda index: callback.sensitivities[index]) == ESSENTIAL
    assert callback.keep_probabilities[ESSENTIAL] == 1


def test_measurements_cost_at_most_what_was_allowed(tmp_path):
    for max_overhead in (0.01, 0.05):
        callback = SensitivityLayerDropping(kept=0.8, measure_every=1, max_overhead=max_overhead, num_batches=2)
        ledger = ComputeLedger(print_table=False)
        module = TinyModule()
        module.net = make_model("gpt2-tied", dtype=torch.float32, vocab=64, **SIZE).train()
        trainer = make_trainer(tmp_path, callbacks=[callback, ledger], strategy="auto", max_steps=500, max_epochs=-1)
        trainer.fit(module, loader(4))
        total = ledger.phases.total
        trained = total.dense_flops - (callback.total.dense - callback.total.kept) * 4
        overhead = (total.flops - trained) / total.flops
        assert 0.3 * max_overhead < overhead <= max_overhead
        assert len(callback.history.measured_at) >= (1 if max_overhead == 0.01 else 3)


def test_measurements_are_spread_until_the_release_and_paid_for_by_all_micro_batches(tmp_path):
    def measured_at(**options):
        callback = SensitivityLayerDropping(kept=0.8, measure_every=1, max_overhead=0.1, num_batches=1, release=0.5)
        module = TinyModule()
        module.net = make_model("gpt2-tied", dtype=torch.float32, vocab=64, **SIZE).train()
        options = {"strategy": "auto", "max_steps": 60, "max_epochs": -1, **options}
        make_trainer(tmp_path, callbacks=[callback], **options).fit(module, loader(4))
        return callback.history.measured_at

    few, many = measured_at(), measured_at(accumulate_grad_batches=4)
    assert len(many) >= 4 * len(few) >= 8
    # Nothing is dropped from step 30 on that they could be for; until then the gaps are alike.
    assert 27 <= max(many) < 30
    gaps = [after - before for before, after in itertools.pairwise(many)]
    assert max(gaps) <= 2
