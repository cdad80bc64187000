"""Token dropping beside what changes how a block runs: compilation, checkpointing, precision, copies, optimizers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm.layers
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.models import checkpoint_seq
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from lit_accel import ComputeLedger, RandomLTD
from lit_accel.anatomy import anatomy_of, compile_blocks
from lit_accel.anatomy.base import AnatomyError
from lit_accel.compute import training_flops
from lit_accel.methods.token_dropping import TokenDropper, TokenSchedule
from lit_accel.routing import routing_of
from tests.methods.dropping import assert_gradients_equal, in_training, intercepted
from tests.methods.token_dropping import GROWTH, NUM_TOKENS, SHARES, Images, backward, dropping, forward
from tests.models import tokens
from tests.training import TinyModule, loader, make_trainer

# The first step that keeps so many of four.
SHARES_THAT_KEEP = {SHARES.kept_windows(step, 4): step for step in range(GROWTH, -1, -1)}


def assert_alike(plain: torch.nn.Module, model: torch.nn.Module, droppers: list[TokenDropper], step: int) -> None:
    """One model is compiled, and both do the same."""
    for dropper in droppers:
        dropper.set(step, (step,))
    inputs = tokens(model, length=NUM_TOKENS)
    (actual, gradients), (expected, expected_gradients) = backward(model, inputs), backward(plain, inputs)
    torch.testing.assert_close(actual, expected)
    assert_gradients_equal(gradients, expected_gradients)


# Compilation


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm", "vit"])
def test_growing_lengths_need_two_graphs(name, graphs):
    plain, model = in_training(name), in_training(name)
    compile_blocks(model, backend=graphs)
    droppers = [dropping(plain), dropping(model)]
    for step in range(GROWTH + 1):
        assert_alike(plain, model, droppers, step)
        assert droppers[0].num_restricted == droppers[1].num_restricted == (4 if step < GROWTH else 0)
    assert 1 <= graphs.count <= 2


@pytest.mark.parametrize("max_lengths", [2, 4])
def test_without_dynamic_shapes_each_length_is_a_graph(max_lengths, graphs):
    model = in_training("gpt2-tied")
    compile_blocks(model, backend=graphs, dynamic=False)
    schedule = TokenSchedule(0.25, GROWTH, quantum=1, max_lengths=max_lengths)
    dropper = dropping(model, schedule)
    inputs = tokens(model, length=NUM_TOKENS)
    for step in (*range(GROWTH + 1), *range(GROWTH + 1)):
        dropper.set(step, (step,))
        backward(model, inputs)
    assert graphs.count == len({schedule.kept_tokens(step, NUM_TOKENS) for step in range(GROWTH + 1)}) <= max_lengths


def test_windows_of_compiled_blocks(graphs):
    plain, model = in_training("swin", blocks=1), in_training("swin", blocks=1)
    compile_blocks(model, backend=graphs, dynamic=False)
    droppers = [dropping(plain, SHARES), dropping(model, SHARES)]
    kept = (1, 3, 4)
    for num in (*kept, *kept):
        assert_alike(plain, model, droppers, SHARES_THAT_KEEP[num])
    # The second stage is a single window. In the first, shifted and not, for each number of windows.
    assert graphs.count == 1 + 2 * len(kept)


@pytest.mark.parametrize("dynamic", [None, False])
def test_more_graphs_of_windows_than_torch_makes_are_refused(tmp_path, dynamic, graphs):
    """Else it goes on without compiling, and nobody knows: with ``dynamic=None`` this needs 16, and torch makes 8."""
    module = Images("swin-padded", blocks=1)
    compile_blocks(module.net, backend=graphs, **({} if dynamic is None else {"dynamic": dynamic}))
    trainer = make_trainer(tmp_path, callbacks=[RandomLTD()], max_steps=GROWTH)
    with pytest.raises(MisconfigurationException, match="recompile_limit"):
        trainer.fit(module, loader(num_samples=0))


def test_compiled_with_a_backward_graph():
    torch._dynamo.reset()
    plain, model = in_training("gpt2-tied"), in_training("gpt2-tied")
    compile_blocks(model, backend="aot_eager")
    droppers = [dropping(plain), dropping(model)]
    for step in (0, 3, 9, 15, GROWTH):
        assert_alike(plain, model, droppers, step)
    torch._dynamo.reset()


# Activation checkpointing


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


def with_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm", "vit", "swin", "swin-padded"])
def test_checkpointing_is_bitwise_equal(name, use_reentrant, enable_checkpointing):
    """For the same tokens, with dropout, which draws from the global generator."""
    blocks = 1 if "swin" in name else 4
    plain, model = (with_dropout(in_training(name, blocks)) for _ in range(2))
    enable_checkpointing(model, use_reentrant)
    droppers = dropping(plain), dropping(model)
    inputs = tokens(model, length=NUM_TOKENS)
    for step in (0, 7):
        results = []
        for each, dropper in zip((plain, model), droppers, strict=True):
            dropper.set(step, (step,))
            torch.manual_seed(step)
            results.append(backward(each, inputs))
        (expected, expected_gradients), (actual, gradients) = results
        assert torch.equal(actual, expected)
        assert gradients.keys() == expected_gradients.keys()
        assert_gradients_equal(gradients, expected_gradients, rtol=0, atol=0)
        # timm calls a block once more; Hugging Face what is inside of the call that is intercepted.
        # Recent transformers recompute inside of what is intercepted, older ones and timm outside.
        num_calls = (1, 2) if hasattr(model, "config") else (2,)
        assert droppers[0].num_restricted > 0
        assert droppers[1].num_restricted in [number * droppers[0].num_restricted for number in num_calls]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_images_of_two_sizes_are_recomputed_as_they_were(use_reentrant, enable_checkpointing):
    """Patches dropped before the first block: of the first image there are as many left as the second one has."""
    timm.layers.set_reentrant_ckpt(use_reentrant)
    results = []
    for call in (lambda blocks, x: blocks(x), checkpoint_seq):
        each = in_training("vit-pooled", blocks=3)
        dropper = TokenDropper(routing_of(each), range(3), TokenSchedule(4, GROWTH, quantum=1), "input")
        dropper.is_active = True
        dropper.set(10, (0,))
        whole = torch.randn(2, 9, each.embed_dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = sum(each.norm(call(each.blocks, part)).square().sum() for part in (whole, whole[:, :6]))
        loss.backward()
        gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        results.append((loss.detach(), whole.grad, gradients))
    (expected, of_input, expected_gradients), (actual, of_same, gradients) = results
    assert torch.equal(actual, expected)
    assert torch.equal(of_same, of_input)
    assert_gradients_equal(gradients, expected_gradients, rtol=0, atol=0)


def test_blocks_that_hide_in_a_wrapper_are_refused_by_name():
    model = in_training("gpt2-tied")
    model.transformer.h[1] = checkpoint_wrapper(model.transformer.h[1])
    with pytest.raises(AnatomyError, match=r"transformer\.h\.1\._checkpoint_wrapped_module.* has no layout"):
        routing_of(model)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize(
    ("kind", "num_tokens", "kept"),
    [(TinyModule, 12, [4, 4, 6, 6, 8, 10, 12, 12]), (Images, 10, [2, 2, 4, 6, 6, 8, 10, 10])],
)
def test_the_books_count_a_block_once_a_forward(tmp_path, kind, num_tokens, kept, use_reentrant, enable_checkpointing):
    module = kind()
    if use_reentrant is not None:
        enable_checkpointing(module.net, use_reentrant)
    method, ledger = RandomLTD(start_tokens=0.25, growth=6, quantum=2), ComputeLedger(print_table=False)
    make_trainer(tmp_path, callbacks=[method, ledger], max_steps=8, log_every_n_steps=1).fit(module, loader())
    anatomy = anatomy_of(module.net)
    recomputes = use_reentrant is not None
    assert ledger.phases.total.flops == sum(
        training_flops(anatomy, 8, num_tokens, activation_checkpointing=recomputes, kept={1: num, 2: num}).total
        for num in kept
    )
    assert method.total.layer_tokens == sum(8 * (2 * num_tokens + 2 * num) for num in kept)


# Copies


def saved(model: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "averaged": lambda model: AveragedModel(model).module,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": saved,
}


@pytest.mark.parametrize("how", sorted(COPIES))
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit", "swin"])
def test_a_copy_is_a_plain_model(name, how):
    model, plain = in_training(name, blocks=3), in_training(name, blocks=3)
    inputs = tokens(model, length=NUM_TOKENS)
    expected = forward(plain, inputs)
    dropper = dropping(model)
    dropper.set(0, (0,))
    of_original = forward(model, inputs)
    assert not torch.equal(of_original, expected)
    twin = COPIES[how](model)
    assert twin.training
    assert not intercepted(twin)
    assert torch.equal(forward(twin, inputs), expected)
    # It is no part of the original, and the original drops as before.
    assert torch.equal(forward(model, inputs), of_original)
    dropping(twin).set(0, (0,))
    assert torch.equal(forward(twin, inputs), of_original)
    dropper.close()
    assert torch.equal(forward(model, inputs), expected)


def test_averaged_weights(tmp_path):
    """Lightning's average of the weights is that of a loop, and it is a model that was never intercepted."""
    decay = 0.5

    class Weights(TinyModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            history.append({name: p.detach().clone() for name, p in self.named_parameters()})

    history: list[dict[str, torch.Tensor]] = []
    module = Weights()
    average = EMAWeightAveraging(decay=decay)
    trainer = make_trainer(tmp_path, callbacks=[RandomLTD(growth=6, quantum=2, num_tokens=12), average], max_steps=6)
    trainer.fit(module, loader())
    assert len(history) == 6
    for name, parameter in module.named_parameters():
        expected = history[0][name]
        for later in history[1:]:
            expected = decay * expected + (1 - decay) * later[name]
        torch.testing.assert_close(parameter.detach(), expected)
    assert not intercepted(module)
