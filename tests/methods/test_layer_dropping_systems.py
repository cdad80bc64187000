"""Layer dropping beside what changes how a block runs: compilation, checkpointing, optimizers."""

from __future__ import annotations

import random
from functools import partial

import lightning.pytorch as L
import pytest
import timm.layers
import torch

from lit_accel import (
    ComputeLedger,
    ProgressiveLayerDropping,
)
from lit_accel.anatomy import anatomy_of, build_resized, compile_blocks, is_compiled
from lit_accel.compute import training_flops
from tests.methods.dropping import (
    Masks,
    assert_dropped_have_none,
    assert_gradients_equal,
    backward,
    count_calls,
    dropping,
    in_training,
    intercepted,
)
from tests.models import tokens
from tests.training import TinyModule, Tokens, loader, make_trainer

# Compilation


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm", "vit"])
def test_forty_masks_need_no_more_graphs_than_one_block(name, graphs):
    # More blocks than one function may have graphs: each of them its own would not do.
    plain, model = in_training(name, blocks=12), in_training(name, blocks=12)
    compile_blocks(model, backend=graphs)
    droppers = dropping(plain), dropping(model)
    draws = random.Random(0)
    history = []
    for step in range(41):
        # Nothing is dropped at first, as in training.
        keep = [step == 0 or draws.random() < 0.6 for _ in range(12)]
        for dropper in droppers:
            dropper.set(keep, [1.0 if step == 0 else 0.6] * 12)
        (actual, gradients), (expected, expected_gradients) = backward(model), backward(plain)
        torch.testing.assert_close(actual, expected)
        assert_gradients_equal(gradients, expected_gradients)
        assert_dropped_have_none(model, gradients, keep)
        history.append(graphs.count)
    assert 1 <= history[-1] <= 2
    assert history[3:] == [history[2]] * 38


def test_an_intercepted_block_is_not_taken_for_a_compiled_one(graphs):
    model, compiled = in_training("gpt2-tied"), in_training("gpt2-tied")
    compile_blocks(compiled, backend=graphs)
    calls = [block._compiled_call_impl for block in compiled.transformer.h]
    droppers = dropping(model), dropping(compiled)
    assert len(intercepted(model)) == len(intercepted(compiled)) == 6
    assert not any(is_compiled(block) for block in model.transformer.h)
    assert all(is_compiled(block) for block in compiled.transformer.h)
    for each in (model, compiled):
        resized = build_resized(each, anatomy_of(each), anatomy_of(each).reduced(2, 2))
        assert [is_compiled(block) for block in resized.transformer.h] == [each is compiled] * 3
        assert bool(intercepted(resized)) == (each is compiled)
    for dropper in droppers:
        dropper.close()
    assert not intercepted(model)
    assert [block._compiled_call_impl for block in compiled.transformer.h] == calls


# Activation checkpointing

CHECKPOINTING = {
    "hugging-face-reentrant": ("gpt2-tied", True),
    "hugging-face": ("gpt2-tied", False),
    "llama-reentrant": ("llama-gqa", True),
    "bert": ("bert-mlm", False),
    "vit": ("vit", False),
    "vit-reentrant": ("vit", True),
    "swin": ("swin", False),
}


@pytest.fixture
def enable_checkpointing():
    def enable(model: torch.nn.Module, use_reentrant: bool) -> None:
        if hasattr(model, "config"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        else:
            model.set_grad_checkpointing()
            timm.layers.set_reentrant_ckpt(use_reentrant)

    reentrant = timm.layers.use_reentrant_ckpt()
    yield enable
    timm.layers.set_reentrant_ckpt(reentrant)


@pytest.mark.parametrize("setting", sorted(CHECKPOINTING))
def test_checkpointing_changes_no_gradient(setting, enable_checkpointing):
    name, use_reentrant = CHECKPOINTING[setting]
    blocks = 2 if name == "swin" else 6
    plain, model = in_training(name, blocks), in_training(name, blocks)
    enable_checkpointing(model, use_reentrant)
    droppers = dropping(plain), dropping(model)
    num_blocks = len(anatomy_of(model).blocks)
    calls = None if name == "llama-gqa" else count_calls(model)
    for mask in ("110111", "011010", "101101"):
        keep = [bit == "1" for bit in mask][:num_blocks]
        for dropper in droppers:
            dropper.set(keep, [0.5] * num_blocks)
        before = calls and list(calls)
        (actual, gradients), (expected, expected_gradients) = backward(model), backward(plain)
        torch.testing.assert_close(actual, expected)
        assert_gradients_equal(gradients, expected_gradients, rtol=0, atol=1e-6)
        assert_dropped_have_none(model, gradients, keep)
        if calls:
            # Forward and once more in the backward pass; dropped, not at all.
            assert [now - then for now, then in zip(calls, before, strict=True)] == [2 * kept for kept in keep]


class Images(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = in_training("vit")

    def training_step(self, batch, batch_idx):
        return self.net(tokens(self.net, batch=4, seed=batch_idx)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", [TinyModule, Images])
def test_the_ledger_charges_four_passes_for_kept_blocks_only(tmp_path, enable_checkpointing, kind, use_reentrant):
    module = kind()
    enable_checkpointing(module.net, use_reentrant)
    method, ledger = ProgressiveLayerDropping(gamma=5.0), ComputeLedger(print_table=False)
    masks = Masks(method)
    make_trainer(tmp_path, callbacks=[method, masks, ledger], max_steps=8).fit(module, loader(num_samples=256))
    anatomy = anatomy_of(module.net)
    inputs = tokens(module.net, batch=4) if kind is Images else Tokens().ids[:8]
    shape = anatomy.input_shape((inputs,), {})
    cost, three = (training_flops(anatomy, *shape, activation_checkpointing=each) for each in (True, False))
    assert all(four > once for four, once in zip(cost.blocks, three.blocks, strict=True))
    kept = sum(flops for keep in masks.keep.values() for flops, runs in zip(cost.blocks, keep, strict=True) if runs)
    assert sum(not all(keep) for keep in masks.keep.values()) >= 6
    assert ledger.phases.total.flops == kept + 8 * cost.outside_blocks


# Optimizers

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
}


class Untouched(L.Callback):
    """What was dropped is bitwise what it was before the step, moments and counters too; what ran is not."""

    def __init__(self, method) -> None:
        self.method = method
        self.num_dropped = 0

    def blocks(self, module, optimizer):
        return [
            [
                value.clone()
                for p in block.parameters()
                for value in (p.detach(), *(v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)))
            ]
            for block in module.net.transformer.h
        ]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = self.blocks(pl_module, optimizer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = self.blocks(pl_module, trainer.optimizers[0])
        for keep, old, new in zip(self.method.keep, self.before, after, strict=True):
            if keep:
                assert all(not torch.equal(mine, theirs) for mine, theirs in zip(old, new, strict=False))
            else:
                self.num_dropped += 1
                assert len(old) == len(new) > 12
                assert all(torch.equal(mine, theirs) for mine, theirs in zip(old, new, strict=True))


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_a_step_leaves_dropped_blocks_as_they_are(tmp_path, optimizer):
    method = ProgressiveLayerDropping(gamma=5.0)
    watch = Untouched(method)
    trainer = make_trainer(tmp_path, callbacks=[method, watch], max_steps=10, gradient_clip_val=1.0)
    trainer.fit(TinyModule(optimizer=OPTIMIZERS[optimizer]), loader())
    assert watch.num_dropped >= 9


def test_gradients_of_zeros_are_stopped_before_the_optimizer_applies_them(tmp_path):
    class Zeros(TinyModule):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

        def on_train_batch_start(self, batch, batch_idx):
            self.before = {name: value.clone() for name, value in self.state_dict().items()}
            self.step = self.trainer.global_step

    module = Zeros()
    trainer = make_trainer(tmp_path, callbacks=[ProgressiveLayerDropping(gamma=5.0)], max_steps=10)
    with pytest.raises(RuntimeError, match=r"dropped in step 1 has a gradient.*zero_grad\(set_to_none=True\)"):
        trainer.fit(module, loader())
    assert module.step == 1
    assert all(torch.equal(module.before[name], value) for name, value in module.state_dict().items())
    assert not intercepted(module)
