"""What a model with units off costs: by hand, by torch's own counter, and by the published arithmetic."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_accel.anatomy import anatomy_of
from lit_accel.compute import forward_flops, training_flops
from lit_accel.compute.active import Active
from lit_accel.compute.flops import head_accountings, head_matrices
from lit_accel.draws import generator
from lit_accel.methods.mixed_sparsity import (
    DEFAULT_STAGES,
    AttentionPattern,
    SparseModel,
    SparsitySchedule,
    Targets,
    densities,
    spaces_of,
)
from lit_accel.methods.mixed_sparsity.presets import PRESETS
from tests.models import ALL_MODELS, make_model, tokens

SMALL = {"heads": 4, "head_dim": 8, "ffn": 64, "blocks": 2}
WITHOUT_NEURONS = {"vit-swiglu"}
WITHOUT_HEADS = {"vit-swiglu", "llama-mqa", "swin", "swin-heads", "swin-padded"}


def gpt2_small():
    with torch.device("meta"):
        return anatomy_of(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50304)))


def toy():
    return anatomy_of(make_model("gpt2-tied", heads=2, head_dim=4, ffn=16, blocks=1, vocab=10))


def targets_of(anatomy, units, schedule=None, *, tile=8, quantum=1, **options):
    units = (*units, "dense")[:3]
    schedule = schedule or SparsitySchedule.of([(0, 0.0), (10, 0.5), (90, 0.0)], 100, 10)
    return Targets(anatomy, spaces_of(anatomy, *units, tile=tile, quantum=quantum), schedule, **options)


def everything(targets):
    return {name: space.num_units for name, space in targets.spaces.items()}


# By hand


def test_parts_of_gpt2_small():
    anatomy = gpt2_small()
    flops = forward_flops(anatomy, 1, 1024, attention="full")
    without_attention = forward_flops(anatomy, 1, 1024, active=Active(pairs=lambda num_tokens: 0))
    body = sum(without_attention.blocks)
    attention = sum(flops.blocks) - body
    assert (body / 1024, attention / 1024, flops.head / 1024) == (169_869_312, 37_748_736, 77_266_944)
    assert flops.total == 1024 * 284_884_992
    assert flops.outside_blocks == flops.head


def test_a_toy_with_one_of_two_heads_and_four_of_sixteen_neurons():
    """One layer, width 8, two sequences of five tokens."""
    anatomy = toy()
    targets = targets_of(anatomy, ("neuron", "head"))
    active = targets.active(20, {"transformer.h.0: neurons": 4, "transformer.h.0: heads": 1})
    # Projections 96 + 32 of 256 entries, network 32 + 32 of 256, for 10 tokens; 15 pairs a sequence, in 1 of 2 heads.
    blocks, dense_blocks, head = 20 * 192 + 2 * 4 * 4 * 15, 20 * 512 + 2 * 4 * 8 * 15, 20 * 80
    assert (blocks, dense_blocks, head) == (4_320, 11_200, 1_600)
    dense, sparse = (forward_flops(anatomy, 2, 5, active=part) for part in (None, active))
    assert (dense.blocks, dense.outside_blocks, dense.head) == ((11_200,), 1_600, 1_600)
    assert (sparse.blocks, sparse.outside_blocks, sparse.head) == ((4_320,), 1_600, 1_600)
    assert training_flops(anatomy, 2, 5, active=active).total == 3 * 5_920 == 17_760
    # Gradients of whole matrices: one product more with each of the 320 entries that are off.
    with_gradients = replace(active, has_dense_gradients=True)
    assert training_flops(anatomy, 2, 5, active=with_gradients).total == 17_760 + 20 * 320 == 24_160
    # The forward pass of the block once more, but not of what is off.
    trained = training_flops(anatomy, 2, 5, active=with_gradients, activation_checkpointing=True)
    assert trained.total == 4 * 4_320 + 3 * 1_600 + 6_400
    # All ways to count the head: as sparse as the block, 192 of 512; whole; not at all.
    whole = training_flops(anatomy, 2, 5)
    three = head_accountings(anatomy, training_flops(anatomy, 2, 5, active=active), whole, active)
    assert (three.masked, three.dense, three.excluded) == (12_960 + 4_800 * 192 // 512, 17_760, 12_960)


def test_the_toy_by_entries_its_head_among_them():
    anatomy = toy()
    targets = targets_of(anatomy, ("element", "element", "element"), is_compact=False)
    counts = {name: space.num_units // 4 for name, space in targets.spaces.items()}
    assert sum(counts.values()) == 148
    active = targets.active(20, counts)
    sparse = training_flops(anatomy, 2, 5, active=active)
    assert sparse.blocks == (3 * (20 * 128 + 960),)
    assert sparse.head == 3 * 20 * 20
    three = head_accountings(anatomy, sparse, training_flops(anatomy, 2, 5), active)
    assert (three.masked, three.dense, three.excluded) == (10_560 + 1_200, 10_560 + 4_800, 10_560)
    update = training_flops(anatomy, 2, 5, active=targets.active(20, counts, with_dense_gradients=True))
    assert update.blocks == (10_560 + 20 * 384,)
    assert update.head == 1_200 + 20 * 60


@pytest.mark.parametrize("counted", ["exact", "full"])
def test_a_pattern_is_charged_for_its_own_pairs(counted):
    anatomy = toy()
    pattern = AttentionPattern("union", 3)
    options = {"attention": counted, "active": Active(pairs=pattern.pairs)}
    assert forward_flops(anatomy, 2, 11, **options).blocks == (2 * 22 * 512 + 2 * 4 * 8 * pattern.pairs(11),)
    # Where tokens are dropped besides, it is laid on those that are kept.
    kept = forward_flops(anatomy, 2, 11, kept={0: 7}, **options)
    assert kept.blocks == (2 * 14 * 512 + 2 * 4 * 8 * pattern.pairs(7),)


# By torch's counter


def counted_by_torch(model, x):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(input_ids=x) if hasattr(model, "config") else model(x)
        forward = counter.get_total_flops()
        values = output.values() if hasattr(model, "config") else [output]
        sum(v.sum() for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()).backward()
    return forward, counter.get_total_flops()


def closed_form(anatomy, model, x, active=None):
    shape = tuple(x.shape) if hasattr(model, "config") else anatomy.input_shape((x,), {})
    return tuple(
        count(anatomy, *shape, attention="full", active=active).total for count in (forward_flops, training_flops)
    )


def sparse(name, units):
    """A model with half of its units off, in its smaller form, and its targets."""
    model = make_model(name, dtype=torch.float32, **SMALL).train()
    targets = targets_of(anatomy_of(model), units)
    random = generator(0)
    masks = {
        key: torch.rand(space.num_groups, space.num_units, generator=random).argsort(1) < targets.counts(20)[key]
        for key, space in targets.spaces.items()
    }
    made = SparseModel(model, targets.anatomy, targets.spaces)
    made.set_masks(masks)
    made.compact()
    return made, targets


CASES = [
    *((name, ("neuron", "dense")) for name in ALL_MODELS if name not in WITHOUT_NEURONS),
    *((name, ("dense", "head")) for name in ALL_MODELS if name not in WITHOUT_HEADS),
    *((name, ("neuron", "head")) for name in ("gpt2-tied", "bert-mlm", "llama-gqa", "vit-glu")),
    *((name, ("block", "block")) for name in ("gpt2-tied", "bert-mlm", "llama-gqa", "vit-glu")),
]


@pytest.mark.parametrize(("name", "units"), CASES)
def test_what_is_saved_is_exactly_what_torch_does_not_count(name, units):
    """A difference, so that what no formula counts, such as tables of positions, is in neither of its terms."""
    made, targets = sparse(name, units)
    plain = make_model(name, dtype=torch.float32, **SMALL).train()
    x = tokens(plain, batch=3)
    whole, part = counted_by_torch(plain, x), counted_by_torch(made.transformer, x)
    assert 0 < part[0] < whole[0]
    active = targets.active(20, targets.counts(20))
    closed, closed_part = (closed_form(targets.anatomy, plain, x, each) for each in (None, active))
    assert [w - p for w, p in zip(whole, part, strict=True)] == [
        w - p for w, p in zip(closed, closed_part, strict=True)
    ]
    assert active.num_parameters == sum(parameter.numel() for parameter in made.transformer.parameters())


@pytest.mark.parametrize("name", ["gpt2-tied", "bert-untied", "vit", "vit-glu", "deit-distilled"])
@pytest.mark.parametrize("units", [("neuron", "head"), ("block", "block")])
def test_where_no_other_product_is_so_is_the_whole_count(name, units):
    made, targets = sparse(name, units)
    x = tokens(made.transformer, batch=3)
    active = targets.active(20, targets.counts(20))
    assert counted_by_torch(made.transformer, x) == closed_form(targets.anatomy, made.transformer, x, active)


# Updates by gradient


@pytest.mark.parametrize("counted", ["exact", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("units", [("element", "element", "element"), ("2:4", "2:4"), ("neuron", "block")])
def test_gradients_of_the_whole_model_cost_one_product_more_with_what_is_off(units, counted, checkpointing):
    anatomy = anatomy_of(make_model("gpt2-tied", **SMALL))
    targets = targets_of(anatomy, units, is_compact=False)
    options = {"attention": counted, "activation_checkpointing": checkpointing}
    plain, update = (
        training_flops(anatomy, 3, 11, active=targets.active(20, targets.counts(20), dense), **options).total
        for dense in (False, True)
    )
    sparse, dense = (
        forward_flops(anatomy, 3, 11, attention=counted, active=each).total
        for each in (targets.active(20, targets.counts(20)), None)
    )
    assert sparse < dense
    assert update - plain == dense - sparse
    if not checkpointing:
        assert plain == 3 * sparse


@pytest.mark.parametrize("units", [("neuron", "head"), ("block", "block"), ("neuron", "2:4")])
def test_what_is_taken_out_is_put_back_for_them_and_costs_its_full_price(units):
    model = make_model("gpt2-tied", dtype=torch.float32, **SMALL).train()
    targets = targets_of(anatomy_of(model), units)
    x = tokens(model, batch=3)
    update = targets.active(20, targets.counts(20), with_dense_gradients=True)
    flops = training_flops(targets.anatomy, *x.shape, attention="full", active=update).total
    whole = counted_by_torch(model, x)[1]
    if "2:4" not in units:
        assert flops == whole
        return
    # Of what is only masked, half is not counted forwards and for the gradient of the input.
    names = [name for name in targets.spaces if name.endswith(".weight")]
    entries = sum(targets.anatomy.parameters[name].numel(targets.anatomy.size.axes) for name in names)
    assert len(names) == 4
    assert whole - flops == 2 * x.numel() * (entries // 2) * 2


# The arithmetic of the paper


RATIOS = {
    "masked": (0.103, 0.189, 0.240, 0.306, 0.233),
    "dense": (0.347, 0.406, 0.457, 0.523, 0.436),
    "excluded": (0.104, 0.185, 0.255, 0.345, 0.226),
}
COLUMNS = [(0.10, 0.12), (0.20, 0.12), (0.20, 0.50), (0.20, 1.0), (0.25, 0.12)]


@pytest.mark.parametrize("head_is_listed", [True, False])
@pytest.mark.parametrize(("column", "density", "attention"), [(i, *pair) for i, pair in enumerate(COLUMNS)])
def test_ratios_of_gpt2_small(column, density, attention, head_is_listed):
    """Every matrix has the nearest whole number of entries to its density, attention that of pairs to its share.

    The smallest matrix has 589,824 entries, so that a density is exact to a millionth. A head that is not listed is
    counted as being as sparse as the body.
    """
    anatomy = gpt2_small()
    axes, heads = anatomy.size.axes, head_matrices(anatomy)
    assert heads == ["transformer.wte.weight"]
    entries = {
        name: round(density * layout.numel(axes))
        for name, layout in anatomy.parameters.items()
        if (layout.is_matrix and layout.block is not None) or (head_is_listed and name in heads)
    }
    assert len(entries) == 48 + head_is_listed
    active = Active(entries=entries, pairs=lambda num_tokens: round(attention * num_tokens**2))
    flops, whole = (training_flops(anatomy, 1, 1024, attention="full", active=each) for each in (active, None))
    three = head_accountings(anatomy, flops, whole, active)
    dense = head_accountings(anatomy, whole, whole, None)
    assert dense.masked == dense.dense == whole.total
    for name, expected in RATIOS.items():
        assert round(getattr(three, name) / getattr(dense, name), 3) == expected[column]


# Whole runs


def paper_4x(num_steps):
    preset, anatomy = PRESETS["paper_4x"], gpt2_small()
    return Targets(
        anatomy,
        spaces_of(anatomy, preset["ffn_units"], preset["attention_units"], preset["head_units"]),
        SparsitySchedule.of(DEFAULT_STAGES, num_steps),
        distribution=preset["distribution"],
        pattern=AttentionPattern(preset["attention_pattern"], 128),
        pattern_steps=(round(0.06 * num_steps), round(0.80 * num_steps)),
    )


def test_the_preset_needs_a_quarter_if_its_head_is_counted_as_masked():
    num_steps = 10_000
    targets = paper_4x(num_steps)
    shares = targets.shares(1024, counted="full")
    assert shares.masked <= 0.25
    # By the parts of the forward pass, step by step.
    axes = targets.anatomy.size.axes
    shapes = {name: space.shape for name, space in targets.spaces.items()}
    sizes = {name: targets.anatomy.parameters[name].numel(axes) for name in shapes}
    (head,) = head_matrices(targets.anatomy)
    body_whole, head_whole = 169_869_312, 77_266_944
    spent = {"masked": 0.0, "dense": 0.0, "excluded": 0.0}
    bounds = pairwise([*targets.schedule.starts, num_steps])
    for (start, end), sparsity in zip(bounds, targets.schedule.sparsities, strict=True):
        density = densities(shapes, sparsity, "er")
        body_on = sum(density[name] * sizes[name] for name in sizes if name != head)
        body = body_whole * body_on / sum(size for name, size in sizes.items() if name != head)
        attention = 37_748_736 * (126_528 / 1024**2 if 600 <= start < 8_000 else 1)
        # One product of three more with what is off, once in a hundred steps; in restoration it hardly ever happens.
        extra = 1 / 300 if start < 8_000 else 0
        more = extra * (body_whole - body)
        of_head = head_whole * density[head]
        spent["excluded"] += (end - start) * (body + attention + more)
        spent["masked"] += (end - start) * (body + attention + more + of_head + extra * (head_whole - of_head))
        spent["dense"] += (end - start) * (body + attention + more + head_whole)
    whole = num_steps * (body_whole + 37_748_736)
    assert shares.excluded == pytest.approx(spent["excluded"] / whole, abs=1e-3)
    whole += num_steps * head_whole
    assert shares.masked == pytest.approx(spent["masked"] / whole, abs=1e-3)
    assert shares.dense == pytest.approx(spent["dense"] / whole, abs=1e-3)
    # No sparsity of the body saves a head that is whole, 27 % of the model.
    assert shares.dense > 0.271


def test_a_dense_run_costs_what_a_dense_run_costs():
    for units in (("neuron", "head"), ("dense", "dense")):
        stages = [(0, 0.0)] if units[0] == "neuron" else [(0, 0.0), (10, 0.5), (90, 0.0)]
        targets = targets_of(toy(), units, SparsitySchedule.of(stages, 100, 10))
        shares = targets.shares(16)
        assert (shares.masked, shares.dense, shares.excluded) == (1, 1, 1)


STAGES = {
    "ramp": [(0, 0.0), (7, 0.4), (23, 0.8), (70, 0.4), (90, 0.0)],
    "sparse from the start": [(0, 0.6), (50, 0.8), (80, 0.0)],
    "short stages": [(0, 0.0), (10, 0.3), (11, 0.5), (12, 0.7), (13, 0.9), (60, 0.0)],
    "sparse to the end": [(0, 0.0), (30, 0.75)],
    "up again": [(0, 0.0), (10, 0.8), (40, 0.2), (60, 0.8), (95, 0.0)],
}


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize(
    ("name", "units", "options"),
    [
        ("gpt2-tied", ("neuron", "head"), {}),
        ("gpt2-tied", ("neuron", "head"), {"is_compact": False, "gradient_share": 0.0}),
        ("gpt2-tied", ("element", "element", "element"), {"distribution": "er"}),
        ("gpt2-untied", ("block", "2:4"), {"distribution": "erk", "gradient_share": 0.6}),
        ("llama-gqa", ("neuron", "head", "element"), {"gradient_share": 1.0}),
    ],
)
@pytest.mark.parametrize("counted", ["exact", "full"])
def test_the_shares_of_a_run_are_the_sum_over_its_steps(name, units, options, stages, counted):
    schedule = SparsitySchedule.of(STAGES[stages], 100, update_every=9)
    anatomy = anatomy_of(make_model(name, **SMALL))
    pattern = {"pattern": AttentionPattern("fixed", 4), "pattern_steps": (17, 61)}
    targets = targets_of(anatomy, units, schedule, **options, **pattern)
    spent, on, num_updates = [0, 0, 0], everything(targets), 0
    whole = training_flops(anatomy, 1, 20, attention=counted)
    for step in range(100):
        is_update = False
        if schedule.is_event(step):
            is_update = targets.needs_gradient(targets.changes(step, on))
            # What needs no gradient is done before the step.
            on = on if is_update else targets.counts(step)
        active = targets.active(step, on, is_update)
        assert (active.pairs is not None) == (17 <= step < 61)
        flops = training_flops(anatomy, 1, 20, attention=counted, active=active)
        three = head_accountings(anatomy, flops, whole, active)
        spent = [sum(pair) for pair in zip(spent, (three.masked, three.dense, three.excluded), strict=True)]
        on = targets.counts(step)
        num_updates += is_update
    shares = targets.shares(20, counted=counted)
    dense, excluded = whole.total, whole.total - whole.head
    assert shares.masked == pytest.approx(spent[0] / (100 * dense), rel=1e-12)
    assert shares.dense == pytest.approx(spent[1] / (100 * dense), rel=1e-12)
    assert shares.excluded == pytest.approx(spent[2] / (100 * excluded), rel=1e-12)
    assert num_updates == 0 or targets.gradient_share > 0


def test_numbers_of_a_run():
    """What is on in each stage, and what updates replace, are those of the spaces."""
    anatomy = gpt2_small()
    schedule = SparsitySchedule.of(DEFAULT_STAGES, 10_000)
    targets = Targets(anatomy, spaces_of(anatomy, "neuron", "head", "dense"), schedule)
    neurons, heads = "transformer.h.0: neurons", "transformer.h.0: heads"
    counts = [targets.counts(step) for step in (0, 100, 200, 400, 600, 8_000, 8_500, 9_000, 9_500)]
    assert [count[neurons] for count in counts] == [3072, 2144, 1232, 608, 304, 608, 1232, 2144, 3072]
    assert [count[heads] for count in counts] == [12, 8, 5, 2, 1, 2, 5, 8, 12]
    assert targets.counts(599) == counts[3] and targets.counts(601) == counts[4]
    # The first sparse stage drops and grows nothing by gradient; the last one takes back all there are.
    assert not targets.needs_gradient(targets.changes(100, everything(targets)))
    assert targets.needs_gradient(targets.changes(700, counts[4]))
    assert targets.needs_gradient(targets.changes(8_000, counts[4]))
    assert not targets.needs_gradient(targets.changes(9_500, counts[7]))
    change = targets.changes(700, counts[4])[neurons]
    share = schedule.drop_fraction_at(700)
    assert (change.num_active, change.num_dropped, change.num_grown) == (304, int(304 * share), int(304 * share))


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_layers_together_are_as_sparse_as_the_stage(distribution):
    """Weights are what is counted: those of a neuron are in three matrices, of which a distribution sees one."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4
    )
    with torch.device("meta"):
        anatomy = anatomy_of(transformers.LlamaForCausalLM(config))
    targets = targets_of(anatomy, ("neuron", "element"), distribution=distribution)
    weights = {name: space.num_groups * space.weights_per_unit for name, space in targets.spaces.items()}
    on, whole = (
        sum(weights[name] * count for name, count in counts.items())
        for counts in (targets.counts(20), everything(targets))
    )
    assert whole == 2 * (3 * 256 * 1024 + 256 * (2 * 256 + 2 * 128))
    assert on / whole == pytest.approx(0.5, abs=1e-3)
