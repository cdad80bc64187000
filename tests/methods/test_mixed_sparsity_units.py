"""Units are what the families' own tensors say."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_accel.anatomy import anatomy_of, positions_along
from lit_accel.anatomy.axes import Dim
from lit_accel.draws import generator
from lit_accel.methods.mixed_sparsity import AxisUnits, MatrixUnits, UnitsError, spaces_of
from tests.methods.sparse_units import (
    HEADS,
    KINDS,
    NEURONS,
    SIZE,
    SWIN,
    assert_equal,
    backward,
    entries_on,
    is_output,
    some,
    spaces,
    sparse,
)
from tests.models import make_model

# Positions along a dimension


@st.composite
def dimensions(draw):
    axes = {"a": draw(st.integers(1, 4)), "b": draw(st.integers(1, 3)), "c": draw(st.integers(1, 3))}
    factors = st.lists(st.sampled_from(["a", "b", "c", 2, 3]), min_size=1, max_size=4, unique=True)
    dim = Dim(tuple(map(tuple, draw(st.lists(factors, min_size=1, max_size=3)))))
    chosen = draw(st.lists(st.integers(0, axes["a"] - 1), unique=True).map(sorted))
    return dim, axes, chosen


@given(dimensions())
def test_positions_are_those_of_plain_indexing(case):
    dim, axes, chosen = case
    expected, start = [], 0
    for chunk in dim.chunks:
        shape = [axes.get(factor, factor) for factor in chunk]
        numbers = torch.arange(start, start + math.prod(shape)).view(shape)
        start += math.prod(shape)
        if "a" in chunk:
            numbers = numbers.index_select(chunk.index("a"), torch.tensor(chosen, dtype=torch.long))
        expected += numbers.flatten().tolist()
    assert positions_along(dim, axes, "a", chosen) == expected


# Which units a model has


@pytest.mark.parametrize("name", NEURONS)
def test_every_block_has_its_neurons(name):
    anatomy = anatomy_of(make_model(name, **SIZE))
    found = spaces(name, attention="dense", quantum=8)
    assert len(found) == len(anatomy.blocks)
    for block, (key, space) in zip(anatomy.blocks, found.items(), strict=True):
        assert space.name == key and key.startswith(f"{block.path}:")
        # The second stage of Swin is twice as wide.
        width = 2**block.stage
        assert (space.num_groups, space.num_units, space.part) == (1, 32 * width, "ffn")
        assert space.shape == (16 * width, 32 * width)
        assert (space.quantum, space.minimum) == (8, 8)
        assert all(anatomy.parameters[parameter].block == space.block for parameter in space.names)


@pytest.mark.parametrize("name", HEADS)
def test_every_block_has_its_heads(name):
    found = spaces(name, ffn="dense")
    num_units = {"llama-classifier": 2, "mistral": 2, "qwen2-tied": 2, "qwen3": 2}.get(name, 2 if "gqa" in name else 4)
    assert len(found) == 2
    for space in found.values():
        assert (space.num_groups, space.num_units, space.part) == (1, num_units, "attention")
        assert space.shape == (16, 24 if name == "qwen3" else 16)
        assert (space.quantum, space.minimum) == (1, 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-tied", ["transformer.wte.weight"]),
        ("gpt2-untied", ["lm_head.weight"]),
        ("vit", ["head.weight"]),
    ],
)
def test_the_head_is_the_matrix_that_makes_logits(name, expected):
    assert list(spaces(name, "dense", "dense", "element")) == expected


def test_matrices_are_those_that_tokens_pass_through():
    found = spaces("swin", "element", "element")
    assert {key.split(".", 4)[4] for key in found} == {
        "attn.qkv.weight",
        "attn.proj.weight",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
    }


@pytest.mark.parametrize(
    ("name", "units", "message"),
    [
        *((name, ("dense", "head"), "cannot be switched off: .* as many features") for name in sorted(SWIN)),
        *((name, ("dense", "block"), "multiplied by something else than its own layer") for name in sorted(SWIN)),
        ("llama-mqa", ("dense", "head"), "single key-value head"),
        ("vit-swiglu", ("neuron", "dense"), "Neurons .* normalised together"),
        ("vit-swiglu", ("dense", "head"), "Heads .* normalised together"),
        ("gpt2-tied", ("block", "dense"), "32 x 16, which cannot be cut into tiles of 5 x 5.*such as 16"),
        ("bert-mlm", ("dense", "2:5"), "16 inputs, which are no multiple of the 5"),
        ("gpt2-base", ("dense", "dense", "element"), "has no head"),
    ],
)
def test_units_that_a_model_does_not_have_are_refused(name, units, message):
    with pytest.raises(UnitsError, match=message):
        spaces_of(anatomy_of(make_model(name, **SIZE)), *(*units, "dense")[:3], tile=5)


# Neurons and heads of the real tensors


def pieces(name, block, part, unit):
    """What leads into a unit, and what comes out of it: parameters with an index, written down by hand."""
    j = unit
    head, group = slice(4 * j, 4 * j + 4), slice(8 * j, 8 * j + 8)
    thirds = [4 * j + start + i for start in (0, 16, 32) for i in range(4)]
    if name == "gpt2-tied":
        if part == "ffn":
            fc = block.mlp.c_fc
            return [(fc.weight, (slice(None), j)), (fc.bias, j)], [(block.mlp.c_proj.weight, j)]
        fused = block.attn.c_attn
        return [(fused.weight, (slice(None), thirds)), (fused.bias, thirds)], [(block.attn.c_proj.weight, head)]
    if name == "bert-mlm":
        if part == "ffn":
            fc = block.intermediate.dense
            return [(fc.weight, j), (fc.bias, j)], [(block.output.dense.weight, (slice(None), j))]
        attention = block.attention.self
        projections = (attention.query, attention.key, attention.value)
        inputs = [(tensor, head) for p in projections for tensor in (p.weight, p.bias)]
        return inputs, [(block.attention.output.dense.weight, (slice(None), head))]
    if name == "llama-gqa":
        if part == "ffn":
            mlp = block.mlp
            return [(mlp.gate_proj.weight, j), (mlp.up_proj.weight, j)], [(mlp.down_proj.weight, (slice(None), j))]
        attention = block.self_attn
        inputs = [(attention.k_proj.weight, head), (attention.v_proj.weight, head), (attention.q_proj.weight, group)]
        return inputs, [(attention.o_proj.weight, (slice(None), group))]
    if part == "ffn":
        rows = [j, 32 + j] if name == "vit-glu" else j
        return [(block.mlp.fc1.weight, rows), (block.mlp.fc1.bias, rows)], [(block.mlp.fc2.weight, (slice(None), j))]
    fused = block.attn.qkv
    return [(fused.weight, thirds), (fused.bias, thirds)], [(block.attn.proj.weight, (slice(None), head))]


def norm(side):
    return math.sqrt(sum(tensor[index].double().square().sum().item() for tensor, index in side))


@pytest.mark.parametrize("name", KINDS)
def test_scores_of_neurons_and_heads(name):
    made = sparse(name)
    backward(made)
    magnitudes, gradients = made.magnitudes(), made.gradients()
    assert {space.part for space in made.spaces.values()} == {"ffn"} | ({"attention"} if name in HEADS else set())
    for key, space in made.spaces.items():
        block = made.transformer.get_submodule(made.anatomy.blocks[space.block].path)
        for unit in range(space.num_units):
            inputs, out = pieces(name, block, space.part, unit)
            assert magnitudes[key][0, unit].item() == pytest.approx(norm(inputs) * norm(out), rel=1e-5)
            gradient = norm([(tensor.grad, index) for tensor, index in out])
            assert gradients[key][0, unit].item() == pytest.approx(gradient, rel=1e-5)
            matrices = [tensor[index].numel() for tensor, index in inputs + out if tensor.dim() > 1]
            assert space.weights_per_unit == sum(matrices)


@pytest.mark.parametrize("name", KINDS)
def test_a_unit_that_is_off_has_nothing_that_comes_out_of_it(name):
    made = sparse(name)
    before = {key: tensor.clone() for key, tensor in made.transformer.state_dict().items()}
    masks = some(made)
    made.set_masks(masks)
    after = made.transformer.state_dict()
    made.transformer.load_state_dict(before)
    with torch.no_grad():
        for key, space in made.spaces.items():
            block = made.transformer.get_submodule(made.anatomy.blocks[space.block].path)
            for unit in (~masks[key][0]).nonzero().flatten().tolist():
                for tensor, index in pieces(name, block, space.part, unit)[1]:
                    tensor[index] = 0
    assert_equal(made.transformer.state_dict(), after)


@pytest.mark.parametrize("name", KINDS)
def test_magnitudes_do_not_see_how_a_unit_is_scaled(name):
    made = sparse(name)
    before = made.magnitudes()
    with torch.no_grad():
        for parameter, at_output in is_output(made).items():
            made.parameters[parameter].mul_(1 / 4 if at_output else 4)
    assert_equal(before, made.magnitudes())


def test_a_block_that_was_skipped_says_nothing_about_its_units():
    made = sparse("gpt2-tied")
    backward(made)
    for parameter in made.transformer.transformer.h[0].parameters():
        parameter.grad = None
    assert [scores is None for scores in made.gradients().values()] == [True, False, True, False]


# Entries, N:M and tiles of the real tensors


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa"])
@pytest.mark.parametrize("units", ["element", "2:4", "block"])
def test_scores_of_the_units_of_a_matrix(name, units):
    made = sparse(name, (units, units))
    backward(made)
    for scores, tensor_of in ((made.magnitudes(), lambda p: p.detach()), (made.gradients(), lambda p: p.grad)):
        for key, space in made.spaces.items():
            stored = tensor_of(made.parameters[key])
            matrix = stored.t() if name == "gpt2-tied" else stored
            assert space.shape == matrix.shape
            if units == "block":
                expected = [[t.square().mean().sqrt().item() for t in row.split(4, 1)] for row in matrix.split(4, 0)]
            else:
                # Groups of four are neighbours along the inputs.
                flat, length = matrix.abs().flatten().tolist(), 4 if units == "2:4" else matrix.numel()
                expected = [flat[start : start + length] for start in range(0, len(flat), length)]
            torch.testing.assert_close(scores[key], torch.tensor(expected), rtol=1e-5, atol=0)


@st.composite
def matrices(draw):
    tile, (rows, columns) = draw(st.integers(1, 3)), (draw(st.integers(1, 4)) for _ in range(2))
    of = draw(st.sampled_from([None, 1, 2, columns])) if tile == 1 else None
    rows, columns = rows * tile, columns * tile * (of or 1)
    groups, units = (rows // tile, columns // tile) if tile > 1 else (1, rows * columns)
    if of is not None:
        groups, units = rows * columns // of, of
    return MatrixUnits(
        "m", "ffn", groups, units, tile**2, parameter="m", size=(rows, columns), is_input_first=draw(st.booleans()),
        tile=tile,
    )  # fmt: skip


@given(matrices(), st.data())
def test_masks_of_a_matrix_and_its_entries(space, data):
    stored = torch.arange(math.prod(space.size)).view(space.size[::-1] if space.is_input_first else space.size)
    tiles = space.tiles(stored)
    assert tiles.shape == (space.num_groups, space.num_units, space.tile, space.tile)
    assert torch.equal(space.from_tiles(tiles), stored)
    num_active = data.draw(st.integers(0, space.num_units))
    mask = torch.rand(space.num_groups, space.num_units, generator=generator(num_active)).argsort(1) < num_active
    entries = space.entries(mask)
    assert entries.shape == stored.shape
    assert space.active_entries(num_active) == {"m": entries.sum()}
    # All entries of a unit are as it is.
    assert torch.equal(space.tiles(entries), mask[:, :, None, None].expand(tiles.shape))
    rows, columns = space.size
    matrix = entries.t() if space.is_input_first else entries
    for row in range(rows):
        for column in range(columns):
            if space.tile > 1:
                unit = row // space.tile, column // space.tile
            else:
                unit = divmod(row * columns + column, space.num_units)
            assert matrix[row, column] == mask[unit]


@pytest.mark.parametrize("name", NEURONS)
def test_masks_of_neurons_and_heads_and_their_entries(name):
    made = sparse(name)
    masks = some(made, 0.3)
    for key, space in made.spaces.items():
        assert isinstance(space, AxisUnits)
        on, off = entries_on(space, masks[key]), entries_on(space, ~masks[key])
        for parameter in space.names:
            assert made.parameters[parameter].shape == on[parameter].shape
            assert torch.equal(on[parameter], ~off[parameter])
        assert space.active_entries(int(masks[key].sum())) == {k: int(mask.sum()) for k, mask in on.items()}
        sums = [sum(mask.sum() for k, mask in each.items() if mask.dim() > 1) for each in (on, off)]
        assert sums == [space.weights_per_unit * int(mask.sum()) for mask in (masks[key], ~masks[key])]


# Numbers


def half_up(number):
    return math.floor(number + Fraction(1, 2))


@given(
    num_units=st.integers(1, 3_000),
    quantum=st.integers(1, 64),
    minimum=st.integers(0, 3),
    density=st.fractions(Fraction(1, 1_000), 1, max_denominator=1_000),
)
@settings(max_examples=300)
def test_numbers_are_rounded_to_units_and_then_to_the_quantum(num_units, quantum, minimum, density):
    space = AxisUnits("s", "ffn", 1, num_units, 1, quantum, minimum * quantum)
    expected = half_up(Fraction(half_up(density * num_units), quantum)) * quantum if density < 1 else num_units
    assert space.num_active(float(density)) == min(max(expected, minimum * quantum), num_units)


def test_numbers_by_hand():
    neurons = AxisUnits("s", "ffn", 1, 3072, 1, 16, 16)
    assert [neurons.num_active(density) for density in (1, 0.7, 0.4, 0.2, 0.1, 0.001)] == [
        3072,
        2144,
        1232,
        608,
        304,
        16,
    ]
    heads = AxisUnits("s", "attention", 1, 12, 1)
    assert [heads.num_active(density) for density in (1, 0.7, 0.4, 0.2, 0.1, 0.001)] == [12, 8, 5, 2, 1, 1]
    # A quantum as large as the layer: all or all.
    assert spaces("gpt2-tied", attention="dense", quantum=64)["transformer.h.0: neurons"].num_active(0.01) == 32


def test_two_of_four_are_on_whatever_the_density():
    for space in spaces("gpt2-tied", "2:4", "dense").values():
        assert [space.num_active(density) for density in (1, 0.99, 0.5, 0.01)] == [4, 2, 2, 2]
        assert space.num_groups * space.num_units == 16 * 32
