"""Mixed sparsity training beside other methods, activation checkpointing and compiled blocks."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import ComputeLedger, Level, MultiLevelTraining, Phase, ProgressiveLayerDropping, RandomLTD
from lit_accel.anatomy import anatomy_of, compile_blocks, is_compiled
from lit_accel.compute.flops import training_flops
from tests.data.saving import SaveAlways
from tests.methods.dropping import intercepted
from tests.methods.mixed_sparsity import (
    ELEMENTS,
    STEPS,
    TILES,
    UNITS,
    AnyFamily,
    Watch,
    assert_equal,
    fit,
    method,
    whole,
)
from tests.models import relative_error

EXECUTIONS = ["compact", "masked"]


# Layers and tokens that are dropped

LTD = {"start_tokens": 0.5, "growth": 15, "quantum": 2, "pinned": [0]}
METHODS = {
    "layers": lambda: [ProgressiveLayerDropping(theta=0.5, gamma=1.0)],
    "tokens": lambda: [RandomLTD(**LTD)],
    "both": lambda: [ProgressiveLayerDropping(theta=0.5, gamma=1.0), RandomLTD(**LTD)],
}


class Gradients(L.Callback):
    """Notes which blocks have no gradient where units are chosen by it. Stands left of the method."""

    def __init__(self, of):
        self.of, self.skipped = of, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.skipped[trainer.global_step] = [
            index for index, block in enumerate(pl_module.net.transformer.h) if block.mlp.c_fc.weight.grad is None
        ]


@pytest.mark.parametrize(
    ("units", "beside", "order"),
    [
        ("neurons and heads", "layers", "left"),
        ("neurons and heads", "tokens", "right"),
        *((units, "both", order) for units in sorted(UNITS) for order in ("left", "right")),
    ],
)
def test_dropping_beside_it(tmp_path, units, beside, order):
    """Both executions do the same, whatever is skipped; counts hold, and nothing is left behind."""
    runs = []
    for execution in EXECUTIONS:
        callback = method(**UNITS[units], execution=execution)
        watch, gradients = Watch(callback), Gradients(callback)
        both = [*METHODS[beside](), callback]
        module = AnyFamily(blocks=4, dtype=torch.float64)
        fit(tmp_path, [gradients, *(both if order == "left" else both[::-1]), watch], module, gradient_clip_val=0.5)
        for step in range(STEPS):
            numbers = callback.targets.counts(step)
            assert {name: {*on} for name, on in watch.num_on(step).items()} == {n: {k} for n, k in numbers.items()}
        assert not intercepted(module)
        assert torch.isfinite(torch.tensor(module.seen)).all()
        runs.append((watch.digests, module.seen, whole(module), gradients.skipped))
    (digests, seen, weights, skipped), (other_digests, other_seen, other_weights, _) = runs
    assert digests == other_digests
    assert seen == pytest.approx(other_seen, abs=1e-9)
    for name, value in other_weights.items():
        assert (weights[name] - value).abs().max() < 1e-9, name
    if beside != "tokens":
        chooses = callback.targets.chooses_by_gradient
        if units == "neurons and heads":
            assert any(chooses(step) for step in range(STEPS))
        assert any(skipped[step] for step in range(STEPS))
        # Units of a block that did not run would be chosen by nothing.
        assert not any(skipped[step] for step in range(STEPS) if chooses(step))


def test_tokens_and_units_are_charged_together(tmp_path):
    callback, dropping, ledger = method(), RandomLTD(**LTD), ComputeLedger(print_table=False)
    watch = Watch(callback)
    module = fit(tmp_path, [callback, dropping, ledger, watch], AnyFamily(blocks=4))
    anatomy, total = anatomy_of(module.net), 0
    before = {name: space.num_units for name, space in callback.targets.spaces.items()}
    for step in range(STEPS):
        after = {name: on[0] for name, on in watch.num_on(step).items()}
        chooses = callback.targets.schedule.is_event(step) and callback.targets.needs_gradient(
            callback.targets.changes(step, before)
        )
        active = callback.targets.active(step, before if chooses else after, with_dense_gradients=chooses)
        kept = dropping.schedule.kept_tokens(step, 12)
        flops = training_flops(anatomy, 8, 12, kept=dict.fromkeys(dropping.blocks, kept), active=active)
        total, before = total + flops.total, after
    assert ledger.phases.total.flops == total < ledger.phases.total.dense_flops


@pytest.mark.parametrize("beside", sorted(METHODS))
def test_resumed_beside_it(tmp_path, beside):
    def callbacks():
        return [*METHODS[beside](), method(), ComputeLedger(print_table=False)]

    made = callbacks()
    expected = fit(tmp_path, [*made, SaveAlways(tmp_path)], AnyFamily(blocks=4))
    for steps in (4, 9, 16):
        again = callbacks()
        module = AnyFamily(blocks=4, seed=steps)
        fit(tmp_path / "again", again, module, resume=tmp_path / f"batch-{steps}.ckpt")
        assert module.seen == expected.seen[steps:]
        assert_equal(module, expected)
        assert again[-1].phases.total.flops == made[-1].phases.total.flops


# Levels

# Small from step 2 to 5, sparse from 8 on.
LEVELS = [Phase(0, 2), Phase(1, 4), Phase(0)]
LATE = {"stages": [(0, 0.0), (8, 0.5), (16, 0.25), (20, 0.0)]}


class Follows(L.Callback):
    """Notes the size of the model, and whether it attends by the pattern. Stands right of the methods."""

    def __init__(self):
        self.sizes, self.follows = [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        net, ids = pl_module.net, pl_module.ids[:4]
        self.sizes.append(anatomy_of(net).size.axes["heads"])
        config = copy.deepcopy(net.config)
        config._attn_implementation = "sdpa"
        plain = type(net)(config)
        plain.load_state_dict(net.state_dict())
        distance = torch.arange(12)[:, None] - torch.arange(12)[None]
        with torch.no_grad():
            expected = plain(ids, attention_mask=((distance >= 0) & (distance < 3)).expand(4, 1, 12, 12)).logits
            self.follows.append(relative_error(net(ids).logits, expected) < 1e-5)


@pytest.fixture(scope="module")
def cycles(tmp_path_factory):
    """Uninterrupted V-cycles with a pattern from step 3 to 12, and their checkpoints."""
    made = {}
    for order in ("resize first", "resize last"):
        folder = tmp_path_factory.mktemp(order.replace(" ", "-"))
        made[order] = (folder, *cycle(folder, order, callbacks=[SaveAlways(folder)]))
    return made


def cycle(folder, order, *, resume=None, callbacks=(), first=3, **given):
    callback = method(**LATE, attention_pattern="window", attention_phase=(first, 12), **given)
    levels, ledger, follows, watch = (
        MultiLevelTraining([Level()], LEVELS),
        ComputeLedger(print_table=False),
        Follows(),
        Watch(callback),
    )
    methods = [levels, callback] if order == "resize first" else [callback, levels]
    module = AnyFamily(blocks=4)
    fit(folder, [*methods, ledger, follows, watch, *callbacks], module, strategy="resizable", resume=resume)
    return module, ledger, follows, watch


def test_a_v_cycle_in_the_dense_start(cycles):
    (_, module, ledger, follows, watch), (_, other, other_ledger, other_follows, other_watch) = cycles.values()
    assert follows.sizes == other_follows.sizes == [4] * 2 + [2] * 4 + [4] * 18
    expected = [3 <= step < 12 for step in range(STEPS)]
    assert follows.follows == expected
    assert other_follows.follows == expected
    assert {each.net.config._attn_implementation for each in (module, other)} == {"sdpa"}
    assert module.seen == other.seen
    assert watch.digests == other_watch.digests
    assert_equal(module, other)
    assert ledger.phases.total.flops == other_ledger.phases.total.flops
    assert not torch.nn.modules.module._global_module_registration_hooks


def test_phases_of_a_v_cycle(cycles):
    (_, _, ledger, *_), (_, _, other_ledger, *_) = cycles.values()
    phases = [(phase.size["axes"]["heads"], phase.size["stage"], phase.steps) for phase in ledger.phases.list]
    assert phases == [(4, 0, 2), (2, 0, 4), (4, 0, 2), (4, 1, 8), (4, 2, 4), (4, 3, 4)]
    assert [p.size for p in other_ledger.phases.list] == [p.size for p in ledger.phases.list]
    assert [p.flops for p in other_ledger.phases.list] == [p.flops for p in ledger.phases.list]


@pytest.mark.parametrize("order", ["resize first", "resize last"])
@pytest.mark.parametrize("first", [2, 6])
def test_a_pattern_that_begins_where_the_size_changes(tmp_path, order, first):
    _, _, follows, _ = cycle(tmp_path, order, first=first)
    assert follows.follows == [first <= step < 12 for step in range(STEPS)]


@pytest.mark.parametrize("order", ["resize first", "resize last"])
@pytest.mark.parametrize("steps", [2, 4, 6, 9, 14])
def test_a_v_cycle_is_resumed_bitwise(cycles, tmp_path, order, steps):
    folder, expected, ledger, follows, watch = cycles[order]
    module, again, *rest = cycle(tmp_path, order, resume=folder / f"batch-{steps}.ckpt")
    assert module.seen == expected.seen[steps:]
    assert_equal(module, expected)
    assert rest[0].follows == follows.follows[steps:]
    assert rest[1].digests == {step: digest for step, digest in watch.digests.items() if step >= steps}
    assert again.phases.total.flops == ledger.phases.total.flops


def test_a_v_cycle_with_units_off_is_refused(tmp_path):
    levels = MultiLevelTraining([Level()], [Phase(0, 7), Phase(1, 4), Phase(0)])
    with pytest.raises(MisconfigurationException, match="changes the size of the model at step 7"):
        fit(tmp_path, [levels, method()], AnyFamily(blocks=4), strategy="resizable")


# How blocks run


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    ("name", "units"),
    [("gpt2-tied", units) for units in sorted(UNITS)]
    + [("llama-gqa", "neurons and heads"), ("bert-mlm", "neurons and heads"), ("bert-mlm", "tiles")],
)
def test_activation_checkpointing_is_bitwise_equal(tmp_path, units, name, use_reentrant):
    given = dict(UNITS[units])
    if name != "bert-mlm":
        given.update({"attention_pattern": "fixed", "attention_phase": (5, 15)})
    # With a cache, Hugging Face's GPT-2 itself is not.
    plain = fit(tmp_path, [method(**given)], AnyFamily(name, dropout=0.1, cache=False))
    module = AnyFamily(name, dropout=0.1, cache=False, checkpointing=use_reentrant)
    recomputed = fit(tmp_path, [method(**given)], module)
    assert recomputed.seen == plain.seen
    assert_equal(recomputed, plain)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("units", ["neurons and heads", "elements"])
def test_compiled_blocks_train_alike(tmp_path, units, backend):
    torch._dynamo.reset()
    given = dict(UNITS[units])
    if units == "elements":
        # Beside changing sizes there would be more graphs than torch makes.
        given.update({"attention_pattern": "window", "attention_phase": (5, 15)})
    runs = []
    for compiled in (False, True):
        callback, module = method(**given), AnyFamily(dtype=torch.float64, cache=False)
        watch = Watch(callback)
        if compiled:
            compile_blocks(module.net, backend=backend)
        fit(tmp_path, [callback, watch], module)
        runs.append((watch.digests, module.seen, whole(module)))
    (digests, seen, weights), (compiled_digests, compiled_seen, compiled_weights) = runs
    assert compiled_digests == digests
    assert compiled_seen == pytest.approx(seen, abs=1e-9)
    for name, value in weights.items():
        assert (compiled_weights[name] - value).abs().max() < 1e-9, name
    assert all(is_compiled(block) for block in module.net.transformer.h)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm", "vit"])
def test_a_graph_for_each_number_of_units(tmp_path, name, graphs):
    # With a cache, each block of Hugging Face's decoders has a graph of its own.
    module = AnyFamily(name, cache=False)
    compile_blocks(module.net, backend=graphs, dynamic=False)
    callback = method()
    fit(tmp_path, [callback], module)
    assert graphs.count <= len({tuple(counts.items()) for counts in callback.targets.stage_counts})


@pytest.mark.parametrize("given", [ELEMENTS, TILES, {}], ids=["elements", "tiles", "neurons and heads"])
def test_a_copy_in_mid_run_is_a_model_of_its_own(tmp_path, given):
    """It computes the same as the original did, and goes on computing it."""

    class Copies(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 10:
                self.copy = copy.deepcopy(pl_module.net)
                with torch.no_grad():
                    self.said = pl_module.logits(torch.arange(8))

    copies = Copies()
    module = fit(tmp_path, [method(**given), copies])
    with torch.no_grad():
        again = copies.copy(input_ids=module.ids[:8]).logits
    assert torch.equal(again, copies.said)
    assert copies.copy.state_dict().keys() == module.net.state_dict().keys()
