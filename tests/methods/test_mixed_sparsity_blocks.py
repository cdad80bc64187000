"""A product with some tiles of a matrix is that with the masked matrix, and nothing as large as that is ever made."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lit_accel.draws import generator
from lit_accel.methods.mixed_sparsity import MatrixUnits, grouped_linear
from lit_accel.methods.mixed_sparsity.views import GroupedForward, TileView
from tests.models import relative_error

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@st.composite
def cases(draw):
    """Tiles of a matrix, which of them are on, how the matrix is stored, and the shape of what it is applied to."""
    tile, num_rows, num_columns = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    kept = draw(st.integers(1, num_columns))
    batch = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return tile, num_rows, num_columns, kept, draw(st.booleans()), tuple(batch), draw(st.integers(0, 10_000))


def tiles_of(tile, num_rows, num_columns, kept, is_input_first, seed):
    """Units of a matrix, and a mask with as many tiles in each row of tiles."""
    units = MatrixUnits(
        name="matrix",
        part="ffn",
        num_groups=num_rows,
        num_units=num_columns,
        weights_per_unit=tile**2,
        parameter="matrix",
        size=(num_rows * tile, num_columns * tile),
        is_input_first=is_input_first,
        tile=tile,
    )
    return units, torch.rand(num_rows, num_columns, generator=generator(seed)).argsort(1) < kept


def masked(matrix, mask, tile, is_input_first):
    """The reference: a matrix as it is stored, tile by tile."""
    result = torch.zeros_like(matrix)
    for row, column in mask.nonzero().tolist():
        outputs, inputs = (slice(tile * place, tile * place + tile) for place in (row, column))
        place = (inputs, outputs) if is_input_first else (outputs, inputs)
        result[place] = matrix[place]
    return result


def layer(units, dtype, bias=True, seed=0):
    """A linear layer as PyTorch or GPT-2 has it."""
    (rows, columns), random = units.size, generator(seed)
    module = Conv1D(rows, columns) if units.is_input_first else nn.Linear(columns, rows, bias=bias)
    module = module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=dtype))
    return module


def grouped(module, units, mask):
    """The same layer with what is on of its matrix, and how it is held."""
    view = TileView(units, mask, module.weight.device)
    other = layer(units, module.weight.dtype, module.bias is not None)
    other.load_state_dict(module.state_dict())
    other.weight = nn.Parameter(view.gather(module.weight.detach()))
    other.forward = GroupedForward(other, view.columns)
    return other, view


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(case=cases(), bias=st.booleans())
@settings(deadline=None)
def test_it_is_the_product_with_the_masked_matrix(dtype, case, bias):
    """Outputs, and gradients of inputs, tiles and bias; of nn.Linear and of GPT-2's Conv1D."""
    tile, _, num_columns, _, is_input_first, batch, seed = case
    units, mask = tiles_of(*case[:5], seed)
    dense = layer(units, dtype, bias)
    with torch.no_grad():
        dense.weight.copy_(masked(dense.weight, mask, tile, is_input_first))
    sparse, view = grouped(dense, units, mask)
    random = generator(seed, 1)
    x = torch.randn(*batch, num_columns * tile, generator=random, dtype=dtype)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [module(each) for module, each in zip((sparse, dense), xs, strict=True)]
    upstream = torch.randn(ys[1].shape, generator=random, dtype=dtype)
    for y in ys:
        y.backward(upstream)
    pairs = [ys, [each.grad for each in xs], [sparse.weight.grad, view.gather(dense.weight.grad)]]
    if dense.bias is not None:
        pairs.append([sparse.bias.grad, dense.bias.grad])
    for actual, expected in pairs:
        assert actual.shape == expected.shape and actual.dtype == dtype
        scale = expected.abs().max().clamp(min=1)
        assert (actual - expected).abs().max() <= TOLERANCE[dtype] * scale


@given(cases())
@settings(deadline=None)
def test_tiles_are_taken_out_and_put_back_where_they_were(case):
    tile, num_rows, _, kept, is_input_first, _, seed = case
    units, mask = tiles_of(*case[:5], seed)
    matrix = layer(units, torch.float32).weight.detach()
    view = TileView(units, mask, matrix.device)
    taken = view.gather(matrix)
    assert taken.shape == (num_rows, tile, kept * tile)
    full = torch.zeros_like(matrix)
    view.scatter(taken, full)
    assert torch.equal(full, masked(matrix, mask, tile, is_input_first))
    # What is off stays what it was.
    other = torch.full_like(matrix, 7.0)
    view.scatter(taken, other)
    assert torch.equal(other - full == 7, full == 0)
    assert torch.equal(view.gather(other), taken)


@given(cases())
@settings(max_examples=10, deadline=None)
def test_derivatives(case):
    tile, num_rows, num_columns, kept, _, _, seed = case
    _, mask = tiles_of(*case[:5], seed)
    columns = mask.nonzero()[:, 1].view(num_rows, kept)
    shapes = ((2, num_columns * tile), (num_rows, tile, kept * tile), (num_rows * tile,))
    x, tiles, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert gradcheck(lambda *args: grouped_linear(args[0], args[1], columns, args[2]), (x, tiles, bias))


class Sizes(TorchDispatchMode):
    """Keeps the number of entries of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.largest = max([self.largest, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize("is_input_first", [False, True])
def test_nothing_as_large_as_the_matrix_is_made_or_saved(is_input_first):
    tile, num_rows, num_columns, kept, num_tokens = 4, 12, 16, 2, 5
    units, mask = tiles_of(tile, num_rows, num_columns, kept, is_input_first, 0)
    dense = layer(units, torch.float32)
    sparse, _ = grouped(dense, units, mask)
    x = torch.randn(num_tokens, num_columns * tile, requires_grad=True)
    saved, sizes = [], Sizes()
    with saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t), sizes:
        sparse(x).square().sum().backward()
    whole = math.prod(units.size)
    assert sparse.weight.grad.numel() == sparse.weight.numel() == whole * kept // num_columns
    # The largest is what each row of tiles needs of the inputs.
    assert saved and max(saved) <= sizes.largest == num_tokens * num_rows * kept * tile < whole


def test_the_mode_would_see_a_matrix():
    sizes = Sizes()
    dense = nn.Linear(64, 48)
    with sizes:
        dense(torch.randn(5, 64)).square().sum().backward()
    assert sizes.largest == 48 * 64


def test_inputs_of_any_strides():
    units, mask = tiles_of(2, 3, 4, 2, False, 1)
    dense = layer(units, torch.float64)
    sparse, _ = grouped(dense, units, mask)
    x = torch.randn(8, 5, 3, dtype=torch.float64).transpose(0, 2)
    assert torch.equal(sparse(x), sparse(x.contiguous()))


@pytest.mark.parametrize("is_input_first", [False, True])
def test_half_precision_of_autocast(is_input_first):
    """Where the layer would compute in half precision, so do its tiles."""
    units, mask = tiles_of(4, 3, 4, 2, is_input_first, 2)
    dense = layer(units, torch.float32)
    with torch.no_grad():
        dense.weight.copy_(masked(dense.weight, mask, 4, is_input_first))
    sparse, view = grouped(dense, units, mask)
    xs = [torch.randn(6, 16, generator=generator(3)).requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        ys = [module(x) for module, x in zip((sparse, dense), xs, strict=True)]
    assert ys[0].dtype == ys[1].dtype == torch.bfloat16
    for y in ys:
        y.float().square().sum().backward()
    assert sparse.weight.grad.dtype == dense.weight.grad.dtype
    pairs = [ys, [x.grad for x in xs], [sparse.weight.grad, view.gather(dense.weight.grad)]]
    assert all(relative_error(actual, expected) < 0.05 for actual, expected in pairs)
