"""Units are what the families' own tensors say, and a model with some of them off is one smaller model throughout."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_accel.anatomy import anatomy_of, positions_along
from lit_accel.anatomy.axes import Dim
from lit_accel.draws import generator
from lit_accel.methods.mixed_sparsity import AxisUnits, MatrixUnits, SparseModel, UnitsError, UnitSpace, spaces_of
from tests.models import ALL_MODELS, make_model, outputs, relative_error, tokens
from tests.vision import VISION_ZOO

SIZE = {"heads": 4, "head_dim": 4, "ffn": 32, "blocks": 2}
NORMALISED = {"vit-swiglu"}
SWIN = {name for name in VISION_ZOO if "swin" in name} - NORMALISED
NEURONS = sorted(set(ALL_MODELS) - NORMALISED)
HEADS = sorted(set(NEURONS) - SWIN - {"llama-mqa"})
# Each kind of layout: fused and stored inputs first, separate, grouped queries, packed, packed gates, stages.
KINDS = ["gpt2-tied", "bert-mlm", "llama-gqa", "vit", "vit-glu", "swin"]
AXES, TILES, ENTRIES, TWO_OF_FOUR = ("neuron", "head"), ("block", "block"), ("element", "element"), ("2:4", "2:4")


def spaces(name, ffn="neuron", attention="head", head="dense", tile=4, quantum=1, model=None):
    if attention == "head" and name not in HEADS:
        attention = "dense"
    if ffn == "neuron" and name not in NEURONS:
        ffn = "dense"
    model = make_model(name, **SIZE) if model is None else model
    return spaces_of(anatomy_of(model), ffn, attention, head, tile=tile, quantum=quantum)


def sparse(name, units=AXES, execution="compact", dtype=torch.float64, optimizer=None, seed=0):
    """A model in training mode of which nothing is off yet, and its optimizer."""
    model = make_model(name, dtype=dtype, seed=seed, **SIZE).train()
    made = SparseModel(model, anatomy_of(model), spaces(name, *units, model=model), execution)
    optimizer = torch.optim.AdamW if optimizer is None else optimizer
    made.optimizers = [optimizer(model.parameters(), lr=1e-2)]
    return made


def some(sparse_model, share=0.5, seed=0):
    """Masks with about a share of the units on, as many in each group, and never none; half of them of N:M."""
    random = generator(seed)
    return {
        name: torch.rand(space.num_groups, space.num_units, generator=random).argsort(1)
        < (2 if getattr(space, "quota", None) else max(1, round(share * space.num_units)))
        for name, space in sparse_model.spaces.items()
    }


def everything(sparse_model):
    return {name: torch.ones_like(mask) for name, mask in sparse_model.masks.items()}


def entries_on(space, mask):
    """Which entries of each parameter are on, by name."""
    if isinstance(space, MatrixUnits):
        return {space.parameter: space.entries(mask)}
    result = {}
    for carrier in space.carriers:
        on = torch.zeros(carrier.layout.shape(space.axes), dtype=torch.bool)
        on.index_fill_(carrier.dim, space.positions(carrier, mask[0].nonzero().flatten()), True)
        result[carrier.name] = on
    return result


def all_entries_on(sparse_model, masks):
    return {k: v for name, space in sparse_model.spaces.items() for k, v in entries_on(space, masks[name]).items()}


def is_output(sparse_model):
    """Of each parameter with units: whether it is zero where they are off."""
    return {
        name: isinstance(space, MatrixUnits) or next(c.is_output for c in space.carriers if c.name == name)
        for space in sparse_model.spaces.values()
        for name in space.names
    }


def loss_of(sparse_model, seed=1):
    model = sparse_model.transformer
    x = tokens(model, seed=seed)
    result = model(x) if not hasattr(model, "config") else model(input_ids=x)
    values = result.values() if hasattr(model, "config") else [result]
    return sum(v.square().mean() for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())


def backward(sparse_model, seed=1):
    loss_of(sparse_model, seed).backward()


def step(sparse_model, seed=1, clip=None):
    """One step of training, as the callback makes it."""
    (optimizer,) = sparse_model.optimizers
    optimizer.zero_grad()
    sparse_model.compact()
    backward(sparse_model, seed)
    sparse_model.mask_gradients()
    if clip is not None:
        nn.utils.clip_grad_norm_(sparse_model.transformer.parameters(), clip)
    optimizer.step()
    sparse_model.hold_off()


def moments(sparse_model, name):
    parameter = sparse_model.parameters[name]
    return [v for v in sparse_model.optimizers[0].state[parameter].values() if torch.is_tensor(v) and v.dim()]


def tensors(sparse_model):
    """Everything that a parameter has: values, gradient, optimizer state."""
    found = {}
    for name, parameter in sparse_model.parameters.items():
        state = sparse_model.optimizers[0].state.get(parameter, {})
        of_parameter = {"value": parameter.detach(), "gradient": parameter.grad, **state}
        found |= {(name, key): value.clone() for key, value in of_parameter.items() if torch.is_tensor(value)}
    return found


def sizes(model):
    """All numbers that modules keep: of heads, of features."""
    return {
        (path, key): value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool)
    }


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


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
    space = UnitSpace("s", "ffn", 1, num_units, 1, quantum, minimum * quantum)
    expected = half_up(Fraction(half_up(density * num_units), quantum)) * quantum if density < 1 else num_units
    assert space.num_active(float(density)) == min(max(expected, minimum * quantum), num_units)


def test_numbers_by_hand():
    neurons = UnitSpace("s", "ffn", 1, 3072, 1, 16, 16)
    assert [neurons.num_active(density) for density in (1, 0.7, 0.4, 0.2, 0.1, 0.001)] == [
        3072,
        2144,
        1232,
        608,
        304,
        16,
    ]
    heads = UnitSpace("s", "attention", 1, 12, 1)
    assert [heads.num_active(density) for density in (1, 0.7, 0.4, 0.2, 0.1, 0.001)] == [12, 8, 5, 2, 1, 1]
    # A quantum as large as the layer: all or all.
    assert spaces("gpt2-tied", attention="dense", quantum=64)["transformer.h.0: neurons"].num_active(0.01) == 32


def test_two_of_four_are_on_whatever_the_density():
    for space in spaces("gpt2-tied", "2:4", "dense").values():
        assert [space.num_active(density) for density in (1, 0.99, 0.5, 0.01)] == [4, 2, 2, 2]
        assert space.num_groups * space.num_units == 16 * 32


# The smaller model


@pytest.mark.parametrize("name", NEURONS)
def test_the_smaller_model_computes_what_the_whole_one_does(name):
    """Outputs and gradients, in every family."""
    masked, compact = (sparse(name, execution=execution) for execution in ("masked", "compact"))
    for each in (masked, compact):
        each.set_masks(some(each))
        each.compact()
    assert compact.is_compact and not masked.is_compact
    assert sum(p.numel() for p in compact.parameters.values()) < sum(p.numel() for p in masked.parameters.values())
    x = tokens(masked.transformer)
    for actual, expected in zip(outputs(compact.transformer, x), outputs(masked.transformer, x), strict=True):
        assert relative_error(actual, expected) < 1e-10
    for each in (masked, compact):
        backward(each)
    masked.mask_gradients()
    compact.expand()
    for parameter, expected in masked.parameters.items():
        if expected.grad is not None:
            torch.testing.assert_close(compact.parameters[parameter].grad, expected.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_so_does_one_of_tiles(name):
    made = sparse(name, ("block", "dense") if name in SWIN else TILES)
    made.set_masks(some(made))
    x = tokens(made.transformer)
    whole = outputs(made.transformer, x)
    made.compact()
    for actual, expected in zip(outputs(made.transformer, x), whole, strict=True):
        assert relative_error(actual, expected) < 1e-10


def fused_adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def looping_adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, foreach=False, fused=False, amsgrad=True)


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


@pytest.mark.parametrize("optimizer", [fused_adamw, looping_adamw, sgd])
@pytest.mark.parametrize(("name", "units"), [*((name, AXES) for name in KINDS), ("gpt2-tied", TILES), ("vit", TILES)])
def test_out_and_back_is_the_identity_bit_for_bit(name, units, optimizer):
    made = sparse(name, units, dtype=torch.float32, optimizer=optimizer)
    numbers, objects = sizes(made.transformer), list(made.transformer.parameters())
    made.set_masks(some(made))
    values = {key: parameter.detach().clone() for key, parameter in made.parameters.items()}
    made.compact()
    made.expand()
    assert_equal(values, {key: parameter.detach() for key, parameter in made.parameters.items()})
    step(made)
    made.expand()
    before = tensors(made)
    assert any(not torch.equal(before[key, "value"], value) for key, value in values.items())
    made.compact()
    assert made.num_reshapings == 5
    made.expand()
    assert_equal(before, tensors(made))
    assert sizes(made.transformer) == numbers
    assert all(old is new for old, new in zip(objects, made.transformer.parameters(), strict=True))
    on = all_entries_on(made, made.masks)
    for key, mask in on.items():
        assert not made.parameters[key].grad[~mask].any()
        assert not any(state[~mask].any() for state in moments(made, key))


def test_modules_say_how_many_heads_and_neurons_they_have():
    made = sparse("gpt2-tied")
    made.set_masks(some(made, 0.25))
    made.compact()
    block = made.transformer.transformer.h[0]
    assert (block.attn.num_heads, block.attn.split_size) == (1, 4)
    assert (block.attn.c_attn.nf, block.attn.c_proj.nx, block.mlp.c_fc.nf, block.mlp.c_proj.nx) == (12, 4, 8, 8)
    made = sparse("bert-mlm")
    made.set_masks(some(made, 0.25))
    made.compact()
    layer = made.transformer.bert.encoder.layer[0]
    attention = layer.attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (1, 4)
    assert (attention.query.out_features, layer.attention.output.dense.in_features) == (4, 4)
    assert (layer.intermediate.dense.out_features, layer.output.dense.in_features) == (8, 8)
    made = sparse("vit")
    made.set_masks(some(made, 0.25))
    made.compact()
    assert made.transformer.blocks[0].attn.num_heads == 1


@pytest.mark.parametrize("units", [AXES, TILES])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit"])
def test_state_dicts_are_those_of_the_whole_model(name, units):
    made = sparse(name, units)
    (optimizer,) = made.optimizers
    wrapper = nn.ModuleDict({"net": made.transformer})
    made.set_masks(some(made))
    step(made)
    assert made.is_compact
    states = copy.deepcopy((wrapper.state_dict(), optimizer.state_dict()))
    made.expand()
    assert_equal(states[0], wrapper.state_dict())
    whole = optimizer.state_dict()
    assert states[1]["param_groups"] == whole["param_groups"]
    assert states[1]["state"].keys() == whole["state"].keys()
    for index, state in whole["state"].items():
        assert_equal(states[1]["state"][index], state)
    # What is saved in a sparse phase is a whole model, which another one takes up.
    fresh = sparse(name, units)
    fresh.transformer.load_state_dict({key.removeprefix("net."): value for key, value in states[0].items()})
    fresh.optimizers[0].load_state_dict(states[1])
    resumed = SparseModel(fresh.transformer, fresh.anatomy, fresh.spaces, "compact", made.masks)
    resumed.optimizers = fresh.optimizers
    for each in (made, resumed):
        step(each, seed=2)
        each.expand()
    assert_equal(tensors(made), tensors(resumed))


@pytest.mark.parametrize("units", [AXES, TILES, ("neuron", "element")])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa"])
def test_the_smaller_model_takes_up_what_another_saved(name, units):
    """The best one so far, say; weights of units that are off among it."""
    donor, made = (sparse(name, units, seed=seed) for seed in (0, 1))
    for each in (donor, made):
        each.set_masks(some(each))
        step(each)
    saved = copy.deepcopy((donor.transformer.state_dict(), donor.optimizers[0].state_dict()))
    shapes = [parameter.shape for parameter in made.parameters.values()]
    nn.ModuleDict({"net": made.transformer}).load_state_dict({f"net.{key}": value for key, value in saved[0].items()})
    made.optimizers[0].load_state_dict(saved[1])
    assert made.is_compact == donor.is_compact
    assert shapes == [parameter.shape for parameter in made.parameters.values()]
    for each in (donor, made):
        step(each, seed=2)
        each.expand()
    assert_equal(tensors(donor), tensors(made))


@pytest.mark.parametrize("units", [AXES, TILES])
def test_a_copy_of_the_smaller_model_is_one_for_good(units):
    made = sparse("gpt2-tied", units)
    made.set_masks(some(made))
    made.compact()
    copied = copy.deepcopy(made.transformer)
    x = tokens(made.transformer)
    expected = outputs(made.transformer, x)
    made.expand()
    for actual, value in zip(outputs(copied, x), expected, strict=True):
        assert torch.equal(actual, value)
    assert {p.shape for p in copied.state_dict().values()} == {p.shape for p in copied.parameters()}


def test_the_anatomy_is_that_of_the_whole_model_throughout():
    made = sparse("gpt2-tied")
    made.set_masks(some(made))
    made.compact()
    assert anatomy_of(made.transformer) == made.anatomy
    made.expand()
    assert anatomy_of(made.transformer) == made.anatomy


@pytest.mark.parametrize("units", [AXES, TILES])
def test_graphs_that_somebody_still_holds_are_no_hindrance(units):
    """Autograd knows a parameter by its shape for as long as a graph of it lives."""
    plain, made = (sparse("gpt2-tied", units) for _ in range(2))
    held = []
    for each in (plain, made):
        each.set_masks(some(each))
        for seed in range(3):
            if each is made:
                held.append(loss_of(each))
            step(each, seed)
            if each is made:
                held.append(loss_of(each))
            each.expand()
    assert_equal(tensors(plain), tensors(made))


def test_where_nothing_is_off_or_nothing_can_be_taken_out_the_model_stays_whole():
    for units, share in ((AXES, 1.0), (TILES, 1.0), (ENTRIES, 0.5), (TWO_OF_FOUR, 0.5)):
        made = sparse("gpt2-tied", units)
        made.set_masks(some(made, share) if share < 1 else everything(made))
        made.compact()
        assert not made.is_compact and made.num_reshapings == 0
        assert made.is_dense == (share == 1)


# What is off


ADAMWS = [fused_adamw, looping_adamw]


@pytest.mark.parametrize("optimizer", ADAMWS)
@pytest.mark.parametrize("units", [ENTRIES, TWO_OF_FOUR, TILES, AXES, ("dense", "dense", "element")])
def test_what_is_off_stays_as_it_was(units, optimizer):
    """Neither gradients nor weight decay nor momentum move it, in the whole model either."""
    made = sparse("gpt2-tied", units, "masked", dtype=torch.float32, optimizer=optimizer)
    step(made)
    made.set_masks(some(made))
    on, zero = all_entries_on(made, made.masks), is_output(made)
    before = {key: made.parameters[key].detach().clone() for key in on}
    for seed in range(3):
        step(made, seed)
        for key, mask in on.items():
            parameter = made.parameters[key]
            assert torch.equal(parameter[~mask], before[key][~mask])
            assert not parameter.grad[~mask].any()
            assert not any(state[~mask].any() for state in moments(made, key))
            assert not zero[key] or not parameter[~mask].any()
            assert (parameter[mask] != before[key][mask]).any()


@pytest.mark.parametrize("units", [AXES, TILES, ("neuron", "element", "element"), ("block", "2:4")])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit-registers"])
def test_both_executions_train_alike(name, units):
    """Through clipping by the norm, and through changes of the topology."""
    both = [sparse(name, units, execution) for execution in ("masked", "compact")]
    for seed, share in enumerate((1.0, 0.5, 0.25, 0.5, 1.0)):
        for each in both:
            each.expand()
            each.set_masks(some(each, share, seed) if share < 1 else everything(each))
            for number in range(3):
                step(each, 10 * seed + number, clip=0.1)
    masked, compact = both
    compact.expand()
    for key, expected in masked.parameters.items():
        torch.testing.assert_close(compact.parameters[key], expected, rtol=1e-8, atol=1e-10)


# An update


def updated_masks(made, seed=5):
    """Half of what is on goes, and as many others come."""
    result = {}
    for name, mask in made.masks.items():
        scores = torch.rand(mask.shape, generator=generator(seed))
        num_on = int(mask[0].sum())
        num_changed = min(num_on, mask.shape[1] - num_on) // 2 or 1
        dropped = scores.masked_fill(~mask, -1).topk(num_changed, 1).indices
        grown = scores.masked_fill(mask, -1).topk(num_changed, 1).indices
        result[name] = mask.scatter(1, dropped, False).scatter(1, grown, True)
    return result


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize(
    ("name", "units"),
    [*((name, AXES) for name in KINDS), *((n, u) for n in ("gpt2-tied", "vit") for u in (TILES, ENTRIES, TWO_OF_FOUR))],
)
def test_survivors_keep_every_bit_and_the_others_begin_anew(name, units, execution):
    made = sparse(name, units, execution, dtype=torch.float32)
    made.set_masks(some(made))
    for seed in range(2):
        step(made, seed)
    made.expand()
    before, old = tensors(made), all_entries_on(made, made.masks)
    masks = updated_masks(made)
    made.set_masks(masks)
    after, new, zero = tensors(made), all_entries_on(made, masks), is_output(made)
    assert_equal(masks, made.masks)
    for key, was_on in old.items():
        survives, grown, dropped = was_on & new[key], new[key] & ~was_on, was_on & ~new[key]
        # Of two groups of queries one takes the place of the other.
        assert (survives.any() or name == "llama-gqa") and grown.any() and dropped.any()
        for kind in ("value", "exp_avg", "exp_avg_sq"):
            assert torch.equal(before[key, kind][survives], after[key, kind][survives])
        for kind in ("exp_avg", "exp_avg_sq"):
            assert before[key, kind][dropped].any()
            assert not after[key, kind][~survives].any()
        if zero[key]:
            assert not after[key, "value"][~survives].any()
        else:
            # What leads into a unit waits for its return.
            assert torch.equal(before[key, "value"], after[key, "value"])
    for key, value in after.items():
        assert key[0] in old or torch.equal(value, before[key])


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("units", [AXES, TILES, ENTRIES, TWO_OF_FOUR])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "vit-glu", "bert-mlm"])
def test_growing_changes_no_output_and_dropping_does(name, units, execution):
    made = sparse(name, units, execution)
    made.set_masks(some(made, 0.5))
    step(made)
    x = tokens(made.transformer)

    def outputs_with(masks):
        made.expand()
        made.set_masks(masks)
        made.compact()
        return outputs(made.transformer, x)

    others = updated_masks(made)
    if units == TWO_OF_FOUR:
        # Two are on or all.
        larger, smaller = everything(made), others
    else:
        larger = {name: mask | others[name] for name, mask in made.masks.items()}
        smaller = {name: mask & others[name] for name, mask in made.masks.items()}
    before = outputs_with(made.masks)
    for actual, expected in zip(outputs_with(larger), before, strict=True):
        assert relative_error(actual, expected) < 1e-10
    after = outputs_with(smaller)
    assert max(relative_error(actual, expected) for actual, expected in zip(after, before, strict=True)) > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_newborn_units_learn(name):
    """In one step what comes out of them moves, in two what leads into them does."""
    made = sparse(name)
    masks = some(made)
    made.set_masks(masks)
    made.set_masks(everything(made))
    before, zero = tensors(made), is_output(made)
    born = {key: ~on for key, on in all_entries_on(made, masks).items()}
    step(made, 1)
    for key, entries in born.items():
        gradient = made.parameters[key].grad[entries]
        assert gradient.any() == zero[key]
        if zero[key]:
            assert (made.parameters[key][entries] != 0).all() or name == "vit-glu"
    step(made, 2)
    for key, entries in born.items():
        assert made.parameters[key].grad[entries].any()
        assert (made.parameters[key][entries] != before[key, "value"][entries]).any()


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa"])
def test_were_both_sides_zero_they_never_would(name):
    """The saddle that the input side is kept for."""
    made = sparse(name)
    masks = some(made)
    made.set_masks(masks)
    made.set_masks(everything(made))
    born = {key: ~on for key, on in all_entries_on(made, masks).items()}
    with torch.no_grad():
        for key, entries in born.items():
            made.parameters[key][entries] = 0
    backward(made)
    assert not any(made.parameters[key].grad[entries].any() for key, entries in born.items())
