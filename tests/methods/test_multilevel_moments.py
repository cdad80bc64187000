"""Optimizer state between levels: duality of gradients, and the same trajectory on both."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lit_accel.anatomy import anatomy_of
from lit_accel.methods.multilevel import (
    Interpolation,
    coalesce,
    decoalesce,
    level_map,
    merge_optimizer_state,
    project_optimizer_state,
)
from tests.models import make_model, outputs, relative_error, tokens

SIZE = {"heads": 4, "head_dim": 4, "ffn": 32, "blocks": 2}
FAMILIES = ["gpt2-tied", "gpt2-untied", "bert-mlm", "llama-gqa", "llama-gqa-tied", "llama-mqa", "qwen3"]
FAMILIES += ["deit-distilled", "vit-registers", "vit-glu", "swin", "swin-heads"]


def pair(name, factor=2):
    """A small model with weights of some size, its width de-coalesced twin, and the map between them."""
    large = make_model(name, **SIZE)
    lm = level_map(anatomy_of(large), width=factor, depth=1)
    small = coalesce(large, lm)
    return small, decoalesce(small, lm), lm


def loss(model, step=0):
    ids = tokens(model, batch=4, length=12, seed=step)
    if ids.is_floating_point():
        return F.cross_entropy(model(ids), torch.arange(4))
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    model.zero_grad()
    loss(model).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_levels_are_each_others_images(name):
    small, large, lm = pair(name)
    g_small, g_large = gradients(small), gradients(large)
    for mapped, expected in (
        (lm.apply(g_small, "coalesce_t"), g_large),
        (lm.apply(g_large, "decoalesce_t"), g_small),
    ):
        for key, value in expected.items():
            torch.testing.assert_close(mapped[key], value, rtol=1e-11, atol=1e-13)


def optimizer_for(model, lm, lr=2e-3, weight_decay=0.1):
    """AdamW with the learning rates and decays under which the levels move alike: the factor of each tensor."""
    is_large = lm is not None
    groups = []
    for name, parameter in model.named_parameters():
        scale = float(lm.scale(name)) if is_large else 1.0
        groups.append({"params": [parameter], "lr": lr * scale, "weight_decay": weight_decay / scale})
    # The epsilon would weigh more where gradients are divided; it is what "up to epsilon" means.
    return torch.optim.AdamW(groups, eps=1e-30, betas=(0.9, 0.95))


def by_name(model, optimizer):
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("name", FAMILIES)
def test_the_large_level_follows_the_small_ones_trajectory(name):
    small, _, lm = pair(name)
    small_optimizer = optimizer_for(small, None)
    train(small, small_optimizer, range(10))

    large = decoalesce(small, lm)
    large_optimizer = optimizer_for(large, lm)
    projected = project_optimizer_state(by_name(small, small_optimizer), lm, "up")
    for key, parameter in large.named_parameters():
        large_optimizer.state[parameter] = projected[key]

    small_losses = train(small, small_optimizer, range(10, 35))
    large_losses = train(large, large_optimizer, range(10, 35))
    assert max(abs(a - b) for a, b in zip(small_losses, large_losses, strict=True)) <= 1e-10
    # Logits, not parameters: key biases change no output, so their gradients are rounding noise that Adam amplifies.
    ids = tokens(large, seed=99)
    assert relative_error(outputs(large, ids)[0], outputs(small, ids)[0]) <= 1e-10


def test_one_learning_rate_for_all_tensors_leaves_the_trajectory():
    """The per-tensor factors are needed: with one learning rate the large level moves further in function space."""
    small, large, lm = pair("gpt2-tied")
    small_losses = train(small, optimizer_for(small, None), range(25))
    large_losses = train(large, torch.optim.AdamW(large.parameters(), lr=2e-3, weight_decay=0.1), range(25))
    assert max(abs(a - b) for a, b in zip(small_losses, large_losses, strict=True)) > 1e-3


def random_state(anatomy, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(layout):
        return torch.randn(layout.shape(anatomy.size.axes), generator=generator, dtype=torch.float64)

    return {
        name: {"step": torch.tensor(7.0), "exp_avg": draw(layout), "exp_avg_sq": draw(layout).square()}
        for name, layout in anatomy.parameters.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ["avg", "ode", "zero"])
def test_moments_survive_the_way_up_and_down_again(name, mode):
    if name == "bert-mlm" and mode == "zero":
        mode = "ode"
    lm = level_map(anatomy_of(make_model(name, **SIZE)), width=2, depth=2, depth_mode=mode)
    state = random_state(lm.small)
    up = project_optimizer_state(state, lm, "up")
    back = project_optimizer_state(up, lm, "down")
    for key, entry in state.items():
        for moment, value in entry.items():
            torch.testing.assert_close(back[key][moment], value, rtol=1e-12, atol=1e-12)
    assert all((entry["exp_avg_sq"] >= 0).all() and entry["step"] == 7 for entry in up.values())


def test_policies():
    lm = level_map(anatomy_of(make_model("gpt2-tied", **SIZE)))
    state = random_state(lm.small)
    assert project_optimizer_state(state, lm, "up", "reset") == {}
    projected = project_optimizer_state(state, lm, "up")
    second = project_optimizer_state(state, lm, "up", "second_moment")
    for key, entry in second.items():
        assert not entry["exp_avg"].any()
        assert torch.equal(entry["exp_avg_sq"], projected[key]["exp_avg_sq"])
    stored = random_state(lm.large, seed=1)
    merged = merge_optimizer_state(stored, projected, Interpolation.of_alpha(0.25))
    for key, entry in merged.items():
        expected = 0.75 * stored[key]["exp_avg"] + 0.25 * projected[key]["exp_avg"]
        torch.testing.assert_close(entry["exp_avg"], expected)
    assert merge_optimizer_state(stored, projected, Interpolation(1, 0)) == projected


def test_unknown_optimizer_state_is_refused():
    lm = level_map(anatomy_of(make_model("gpt2-tied", **SIZE)))
    with pytest.raises(KeyError, match="exp_inf"):
        project_optimizer_state({"transformer.ln_f.weight": {"exp_inf": torch.ones(8)}}, lm, "up")


def test_merged_blocks_by_hand():
    """Adding the roots of second moments, and the count of the block that has stepped most often."""
    lm = level_map(anatomy_of(make_model("gpt2-tied", **SIZE)), width=1, depth=2)

    def entry(first, second, step):
        return {
            "step": torch.tensor(step),
            **{key: torch.full((16,), first) for key in ("exp_avg", "momentum_buffer")},
            **{key: torch.full((16,), second) for key in ("exp_avg_sq", "max_exp_avg_sq")},
        }

    name = "transformer.h.{}.ln_1.weight".format
    large = {name(0): entry(1.0, 4.0, 3.0), name(1): entry(5.0, 16.0, 7.0)}
    cases = (
        (large, "down", {name(0): entry(6.0, 36.0, 7.0)}),
        ({name(0): entry(6.0, 36.0, 7.0)}, "up", {name(0): entry(3.0, 9.0, 7.0), name(1): entry(3.0, 9.0, 7.0)}),
    )
    for state, direction, expected in cases:
        torch.testing.assert_close(project_optimizer_state(state, lm, direction), expected, rtol=0, atol=0)
        for each in expected.values():
            each |= {key: torch.zeros(16) for key in ("exp_avg", "momentum_buffer")}
        second = project_optimizer_state(state, lm, direction, "second_moment")
        torch.testing.assert_close(second, expected, rtol=0, atol=0)


def test_stored_and_grown_moments_by_hand():
    """Second moments are averaged in the root: those of 4 and 16 meet at 9, and not at 10."""

    def entry(step, first, second):
        keys = ("step", "exp_avg", "momentum_buffer", "exp_avg_sq", "max_exp_avg_sq")
        return {
            key: torch.tensor([value]) for key, value in zip(keys, (step, *[first] * 2, *[second] * 2), strict=True)
        }

    stored, grown = {"both": entry(3.0, 2.0, 4.0)}, {"both": entry(8.0, 6.0, 16.0), "grown": entry(8.0, 6.0, 16.0)}
    for alpha, first, second in ((0.5, 4.0, 9.0), (0.25, 3.0, 6.25)):
        merged = merge_optimizer_state(stored, grown, Interpolation.of_alpha(alpha))
        assert merged == {"both": entry(8.0, first, second), "grown": entry(8.0, 6.0, 16.0)}
