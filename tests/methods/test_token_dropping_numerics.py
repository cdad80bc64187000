"""Token dropping and numbers: several calls, derivatives, precision, randomness, optimizers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lit_accel import RandomLTD
from lit_accel.methods.token_dropping import TokenDropper, TokenSchedule
from lit_accel.routing import routing_of
from tests.methods.dropping import assert_gradients_equal, in_training
from tests.methods.token_dropping import NUM_TOKENS, backward, dropping, forward
from tests.models import make_model, tokens
from tests.training import TinyModule, loader, make_trainer

# Several calls, and what is done with them


@pytest.mark.parametrize("second", [NUM_TOKENS, 17, 5])
def test_two_calls_before_one_backward(second):
    model = in_training("llama-gqa", blocks=4).double()
    dropper = dropping(model)
    dropper.set(3, (0,))
    batches = tokens(model, length=NUM_TOKENS), tokens(model, length=second, seed=2)
    losses, gradients = zip(*(backward(model, batch) for batch in batches), strict=True)
    expected = {name: gradients[0][name] + gradients[1][name] for name in gradients[0]}
    dropper.set(3, (0,))
    model.zero_grad()
    both = forward(model, batches[0]) + forward(model, batches[1])
    both.backward()
    torch.testing.assert_close(both.detach(), losses[0] + losses[1])
    assert_gradients_equal({name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("gpt2-tied", "llama-gqa", "bert-mlm", "vit", "swin")),
        # By default decoders fill a cache where no block is treated otherwise.
        *((name, {"use_cache": False}) for name in ("gpt2-tied", "llama-gqa")),
    ],
)
def test_a_call_without_gradients_sees_every_token(name, options, without_gradients):
    """A teacher, targets or old probabilities by the model that is trained, in training mode."""
    model = in_training(name, blocks=4)
    inputs = tokens(model, length=NUM_TOKENS)

    def call():
        output = model(inputs, **options)
        return output if isinstance(output, torch.Tensor) else output[0]

    dense = call()
    dropping(model).set(0, (0,))
    before = call()
    with without_gradients():
        between = call()
    assert torch.equal(between, dense)
    assert torch.equal(call(), before)
    assert not torch.equal(before, dense)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_call_of_the_model_is_recomputed_as_it_was(use_reentrant):
    """Reentrant checkpointing runs it without gradients first, so that it drops nothing."""
    model = in_training("llama-gqa", blocks=4)
    embedded = model.get_input_embeddings()(tokens(model, length=NUM_TOKENS)).detach().requires_grad_()

    def loss(embedded):
        return model(inputs_embeds=embedded, use_cache=False).logits.square().mean()

    def gradients(value):
        return torch.autograd.grad(value, [embedded])[0]

    dense = gradients(loss(embedded))
    dropper = dropping(model)
    dropper.set(0, (0,))
    dropped = gradients(loss(embedded))
    dropper.set(0, (0,))
    embedded.grad = None
    checkpoint(loss, embedded, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(embedded.grad, dense if use_reentrant else dropped)
    assert not torch.allclose(dense, dropped)


def in_double(name: str) -> torch.nn.Module:
    model = make_model(name, blocks=3, heads=2, head_dim=4, ffn=8).train()
    dropping(model).set(5, (0,))
    return model


def along(values: list[torch.Tensor], others: list[torch.Tensor]) -> torch.Tensor:
    return sum((one * other).sum() for one, other in zip(values, others, strict=True))


@pytest.fixture
def twice_differentiable():
    """The fused kernels of attention have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.usefixtures("twice_differentiable")
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm", "vit"])
def test_the_second_derivative_is_that_of_finite_differences(name):
    model = in_double(name)
    inputs = tokens(model, length=9)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def slope(create_graph: bool = False) -> torch.Tensor:
        loss = forward(model, inputs)
        gradients = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
        return along([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)], way)

    exact = along(list(torch.autograd.grad(slope(create_graph=True), parameters)), way)
    step, sides = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, way, strict=True):
                parameter.add_(sign * step * direction)
        # Without gradients nothing would be dropped.
        sides.append((forward(model, inputs).detach(), slope()))
        with torch.no_grad():
            for parameter, direction in zip(parameters, way, strict=True):
                parameter.sub_(sign * step * direction)
    (ahead, slope_ahead), (behind, slope_behind) = sides
    torch.testing.assert_close(slope(), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(exact, (slope_ahead - slope_behind) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2-tied", "vit", "swin"])
def test_functional_gradients(name):
    model = in_double(name)
    inputs = tokens(model, length=9)
    _, expected = backward(model, inputs)
    key = "input_ids" if hasattr(model, "config") else "x"

    def loss(parameters):
        output = functional_call(model, parameters, (), {key: inputs})
        return (output if isinstance(output, torch.Tensor) else output[0]).logsumexp(-1).mean()

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    assert_gradients_equal(gradients, expected)


# Precision and randomness

PRECISIONS = {
    "bf16": (torch.bfloat16, None, 0.05),
    "fp16": (torch.float16, None, 0.01),
    "autocast-bf16": (torch.float32, torch.bfloat16, 0.05),
    "autocast-fp16": (torch.float32, torch.float16, 0.01),
}


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
# Not swin-padded, whose window of nothing but padding has no norm in fp16.
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm", "vit", "swin"])
def test_reduced_precision(name, precision):
    dtype, autocast, tolerance = PRECISIONS[precision]
    plain, model = (in_training(name, blocks=3) for _ in range(2))
    model.to(dtype)
    inputs, results = tokens(plain, length=NUM_TOKENS), []
    for each in (plain, model):
        dropping(each).set(5, (0,))
        if each is model and inputs.is_floating_point():
            inputs = inputs.to(dtype)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None and each is model):
            results.append(backward(each, inputs))
    (expected, expected_gradients), (actual, gradients) = results
    assert gradients.keys() == expected_gradients.keys()
    assert all(gradient.dtype == dtype for gradient in gradients.values())
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=0)
    flat, flat_expected = (
        torch.cat([of[key].float().flatten() for key in expected_gradients]) for of in (gradients, expected_gradients)
    )
    assert (flat - flat_expected).norm() < 2 * tolerance * flat_expected.norm()


@pytest.mark.parametrize("name", ["gpt2-tied", "swin"])
def test_the_global_generator_is_neither_read_nor_written(name):
    model = in_training(name, blocks=3)
    inputs = tokens(model, length=NUM_TOKENS)
    dropper = dropping(model)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        dropper.set(3, (0,))
        results.append(forward(model, inputs))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


# Optimizers

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_the_trainer_does_what_a_plain_loop_does(tmp_path, optimizer, clip, accumulate):
    """Over two epochs, which see the same batches and other tokens of them."""
    num_epochs, batches = 2, list(loader(num_samples=48))
    growth = num_epochs * len(batches) // accumulate - 1
    module, plain = (TinyModule(optimizer=OPTIMIZERS[optimizer], lr=0.05) for _ in range(2))
    method = RandomLTD(start_tokens=0.25, growth=growth, quantum=2, num_tokens=12, seed=5)
    options = {"gradient_clip_val": clip, "accumulate_grad_batches": accumulate, "max_epochs": num_epochs}
    make_trainer(tmp_path, callbacks=[method], **options).fit(module, loader(num_samples=48))

    dropper = TokenDropper(routing_of(plain.net), (1, 2), TokenSchedule(0.25, growth, 2), seed=5)
    dropper.is_active = True
    stepper = OPTIMIZERS[optimizer](plain.parameters(), lr=0.05)
    for number in range(num_epochs * len(batches)):
        epoch, batch_idx = divmod(number, len(batches))
        dropper.set(number // accumulate, (epoch, batch_idx, 0))
        (plain.loss(batches[batch_idx]) / accumulate).backward()
        if number % accumulate == accumulate - 1:
            if clip is not None:
                assert torch.nn.utils.clip_grad_norm_(plain.parameters(), clip) > clip
            stepper.step()
            stepper.zero_grad()
    for (name, actual), expected in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(actual, expected), name
