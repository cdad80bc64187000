"""Cross entropy a few rows at a time, against that of torch over all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from lit_accel.tasks import cross_entropy as module
from lit_accel.tasks.cross_entropy import cross_entropy_sum

IGNORED = -100


def make(num_rows, num_entries, dtype=torch.float32, seed=0, share_ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(num_rows, num_entries, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(num_entries, (num_rows,), generator=generator)
    return logits, targets.masked_fill(torch.rand(num_rows, generator=generator) < share_ignored, IGNORED)


def both(logits, targets, factor=1.0):
    """Return loss and gradient of ours and of torch's."""
    results = []
    for loss in (
        cross_entropy_sum(logits, targets, IGNORED),
        cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum"),
    ):
        (gradient,) = torch.autograd.grad(factor * loss, logits)
        results.append((loss.detach(), gradient))
    return results


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 400), st.integers(0, 99))
def test_it_is_that_of_torch_whatever_fits_in_a_piece(num_rows, num_entries, piece, seed):
    logits, targets = make(num_rows, num_entries, torch.float64, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_ENTRIES", piece)
        (actual, gradient), (expected, expected_gradient) = both(logits, targets, factor=0.37)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_every_precision_the_gradient_is_rounded_no_more_than_twice(dtype):
    (actual, gradient), (expected, expected_gradient) = both(*make(300, 2000, dtype), factor=1 / 300)
    assert actual.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    # Half of eps each time, and torch's is rounded once.
    torch.testing.assert_close(gradient, expected_gradient, rtol=1.6 * torch.finfo(dtype).eps, atol=1e-7)


def test_the_factor_of_the_loss_is_not_rounded():
    # In bf16 1 / 300 would be 0.2 % too small, and so would be the whole gradient.
    (_, gradient), (_, expected) = both(*make(300, 2000, torch.bfloat16), factor=1 / 300)
    ratio = (gradient.double() * expected.double()).sum() / expected.double().square().sum()
    assert abs(ratio - 1) < 2e-4


def test_probabilities_that_fp16_cannot_hold_have_gradients_under_its_loss_scale():
    logits = torch.full((2, 5000), -20.0, dtype=torch.float16)
    logits[:, 7] = 0
    targets = torch.full((2,), 7)
    (_, gradient), (_, expected) = both(logits.requires_grad_(), targets, factor=2.0**16)
    # Each of them has a probability of 2e-9; the least fp16 number is 6e-8.
    assert (gradient[:, 8] > 0).all()
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0)


def test_scores_far_apart_and_scores_ruled_out():
    logits = torch.tensor([[0.0, -300.0, -float("inf")], [500.0, 0.0, 0.0]], requires_grad=True)
    (actual, gradient), (expected, expected_gradient) = both(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(actual, expected)
    assert actual == 800
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(value):
    logits, targets = make(3, 5)
    with torch.no_grad():
        logits[1, 2] = value
    assert cross_entropy_sum(logits, targets.clamp(min=0), IGNORED).isnan()


def test_its_derivative_is_that_of_finite_differences():
    logits, targets = make(7, 5, torch.float64)
    torch.autograd.gradcheck(lambda x: cross_entropy_sum(x, targets, IGNORED), (logits,))


def test_where_nothing_counts_it_is_zero():
    logits, targets = make(6, 5, share_ignored=2.0)
    loss = cross_entropy_sum(logits, targets, IGNORED)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0
    assert not gradient.any()


def test_backward_twice_and_without_gradients():
    logits, targets = make(6, 5)
    loss = cross_entropy_sum(logits, targets, IGNORED)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(cross_entropy_sum(logits, targets, IGNORED), loss)


def test_nothing_in_32_bits_is_kept_or_made():
    logits, targets = make(4000, 1000, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        cross_entropy_sum(logits, targets, IGNORED)
    assert [x.dtype for x in saved if x.numel() == logits.numel()] == [logits.dtype]
    with torch.profiler.profile(profile_memory=True) as profile:
        cross_entropy_sum(logits, targets, IGNORED).backward()
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    # What is kept, and the gradient, in the precision of the logits; the buffer of a piece is far smaller.
    assert sorted(sizes)[-3] < logits.numel()
    assert sorted(sizes)[-2:] == 2 * [logits.numel() * logits.element_size()]


def test_nothing_is_kept_where_no_gradient_is_wanted():
    weights, targets = make(4000, 1000, torch.bfloat16)
    with torch.no_grad():
        logits = 2 * weights
        with torch.profiler.profile(profile_memory=True) as profile:
            cross_entropy_sum(logits, targets, IGNORED)
    assert max(event.self_cpu_memory_usage for event in profile.events()) < logits.numel() * logits.element_size() / 4
