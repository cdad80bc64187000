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
def test_in_every_precision_the_gradient_is_rounded_once(dtype):
    (actual, gradient), (expected, expected_gradient) = both(*make(300, 2000, dtype), factor=1 / 300)
    assert actual.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    # Both are the same number in 32 bits, but for its last bits: rounded, they are neighbours at most.
    torch.testing.assert_close(gradient, expected_gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


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


def test_no_copy_of_the_logits_is_kept_or_made():
    logits, targets = make(4000, 1000, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        cross_entropy_sum(logits, targets, IGNORED)
    assert [x.data_ptr() for x in saved if x.numel() == logits.numel()] == [logits.data_ptr()]
    with torch.profiler.profile(profile_memory=True) as profile:
        cross_entropy_sum(logits, targets, IGNORED).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # The gradient, in the precision of the logits; the buffer of a piece is far smaller.
    assert largest == logits.numel() * logits.element_size()
