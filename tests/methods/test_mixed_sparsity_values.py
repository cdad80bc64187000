"""Mixed sparsity training in whole runs: what is off is off in every step, and nothing else is touched."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as L
import pytest
import torch

from lit_accel import ComputeLedger
from lit_accel.anatomy import anatomy_of
from tests.methods.mixed_sparsity import (
    ELEMENTS,
    FAMILIES,
    N_OF_M,
    TILES,
    AnyFamily,
    assert_equal,
    assert_same_moments,
    entries_on,
    fit,
    method,
    units_for,
    whole,
    whole_moments,
)
from tests.models import outputs, relative_error, tokens

ADAMW = partial(torch.optim.AdamW, weight_decay=0.1)
OPTIMIZERS = {
    "adamw": partial(ADAMW, foreach=False),
    "foreach": partial(ADAMW, foreach=True),
    "fused": partial(ADAMW, fused=True),
    "amsgrad": partial(ADAMW, amsgrad=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1, nesterov=True),
    "rmsprop": partial(torch.optim.RMSprop, momentum=0.9),
}


def matrices_on(callback, tensors):
    """Say which entries of matrices are on, for entries, N:M groups and tiles of 4 by 4; stored inputs first or not."""
    found = {}
    for name, mask in callback.masks.items():
        weight = tensors[name]
        is_input_first = "attn." in name or "mlp.c_" in name
        of_outputs = weight.t() if is_input_first else weight
        if callback.ffn_units == "block":
            on = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
        else:
            on = mask.reshape(of_outputs.shape)
        assert on.shape == of_outputs.shape
        found[name] = on.t() if is_input_first else on
    return found


class Inspect(L.Callback):
    """Looks at what is off after every optimizer step. Stands right of the method."""

    def __init__(self, of, name):
        self.of, self.name, self.num_checked = of, name, 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        tensors, moments = whole(pl_module), whole_moments(pl_module, trainer.optimizers[0])
        has_neurons = any(": " in name for name in self.of.masks)
        on = entries_on(self.name, tensors, self.of.masks, ["out"]) if has_neurons else matrices_on(self.of, tensors)
        assert on
        parameters = dict(pl_module.net.named_parameters())
        for name, mask in on.items():
            assert (tensors[name][~mask] == 0).all(), name
            assert all((moment[~mask] == 0).all() for moment in moments[name].values()), name
            assert moments[name]
            if parameters[name].shape == mask.shape:
                assert (parameters[name].grad[~mask] == 0).all(), name
            self.num_checked += int((~mask).sum())


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize(
    ("units", "execution"),
    [({}, "compact"), ({}, "masked"), (ELEMENTS, "compact"), (N_OF_M, "compact"), (TILES, "compact")],
    ids=["compact", "masked", "elements", "2:4", "tiles"],
)
def test_what_is_off_is_zero_after_every_step(tmp_path, units, execution, optimizer):
    callback = method(**units, execution=execution)
    check = Inspect(callback, "gpt2-tied")
    fit(tmp_path, [callback, check], AnyFamily(make_optimizer=OPTIMIZERS[optimizer]), gradient_clip_val=0.5)
    assert check.num_checked > 0


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_comes_out_of_units_that_are_off_is_zero_in_every_family(tmp_path, name, execution):
    callback = method(**units_for(name), execution=execution)
    check = Inspect(callback, name)
    fit(tmp_path, [callback, check], AnyFamily(name), max_steps=12)
    assert check.num_checked > 0


# One update


class Before(L.Callback):
    """Notes the whole model where the method is about to update it. Stands left of it."""

    def __init__(self):
        self.seen = {}

    def note(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        self.seen = {"weights": whole(pl_module), "moments": whole_moments(pl_module, optimizer)}

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.note(trainer, pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.note(trainer, pl_module)


class After(L.Callback):
    """Compares with it. Stands right of the method."""

    def __init__(self, of, before, name):
        self.of, self.before, self.name = of, before, name
        self.masks, self.steps = None, []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.compare(trainer, pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.compare(trainer, pl_module)

    def compare(self, trainer, pl_module):
        masks = {name: mask.clone() for name, mask in self.of.masks.items()}
        old, self.masks = self.masks or {name: torch.ones_like(mask) for name, mask in masks.items()}, masks
        is_update = any(not torch.equal(old[name], mask) for name, mask in masks.items())
        weights, moments = whole(pl_module), whole_moments(pl_module, trainer.optimizers[0])
        stays = {name: old[name] & mask for name, mask in masks.items()}
        units = {name: mask & ~old[name] for name, mask in masks.items()}
        if any(": " in name for name in masks):
            stays, units = (partial(entries_on, self.name, weights, which) for which in (stays, units))
            comes_out, stays, born = stays(["out"]), stays(), units()
        else:
            comes_out = stays = matrices_on(_With(self.of, stays), weights)
            born = matrices_on(_With(self.of, units), weights)
        for name, weight in weights.items():
            was = self.before.seen["weights"][name]
            kept = comes_out.get(name, torch.ones_like(weight, dtype=torch.bool))
            assert torch.equal(weight[kept], was[kept]), name
            assert (weight[~kept] == 0).all(), name
        for name, states in moments.items():
            kept = stays.get(name, torch.ones_like(weights[name], dtype=torch.bool))
            for key, state in states.items():
                was = self.before.seen["moments"][name][key]
                assert torch.equal(state[kept], was[kept]), (name, key)
                assert (state[~kept] == 0).all(), (name, key)
                assert name not in born or (state[born[name]] == 0).all()
        if is_update:
            self.steps.append(trainer.global_step)


class _With:
    def __init__(self, of, masks):
        self.ffn_units, self.masks = of.ffn_units, masks


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("units", [{}, ELEMENTS, N_OF_M, TILES], ids=["neurons and heads", "elements", "2:4", "tiles"])
def test_an_update_leaves_what_stays_alone(tmp_path, units, execution):
    """Bit by bit, weights and moments; what is dropped and what is born has none."""
    callback, before = method(**units, execution=execution), Before()
    after = After(callback, before, "gpt2-tied")
    fit(tmp_path, [before, callback, after], gradient_clip_val=0.5)
    assert set(after.steps) >= {3, 4, 6, 19}


@pytest.mark.parametrize("name", ["llama-gqa", "bert-mlm", "vit", "swin"])
def test_an_update_leaves_what_stays_alone_in_every_family(tmp_path, name):
    callback, before = method(**units_for(name)), Before()
    after = After(callback, before, name)
    fit(tmp_path, [before, callback, after], AnyFamily(name))
    assert set(after.steps) >= {3, 4, 6, 14, 19}


class Probe(L.Callback):
    """Notes what the model says of the same inputs after each step. Stands right of the method."""

    def __init__(self):
        self.said = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.eval()
        with torch.no_grad():
            self.said[trainer.global_step - 1] = pl_module.logits(torch.arange(8))
        pl_module.train()


@pytest.mark.parametrize(
    ("name", "units", "execution"),
    [("gpt2-tied", units, execution) for units in (ELEMENTS, N_OF_M, TILES) for execution in ("compact", "masked")]
    + [(name, {}, execution) for name in sorted(FAMILIES) for execution in ("compact", "masked")],
)
def test_growth_preserves_the_function(tmp_path, name, units, execution):
    """Nothing but updates changes a model whose rate is zero."""
    callback, probe = method(**{**units, **units_for(name)}, execution=execution), Probe()
    fit(tmp_path, [callback, probe], AnyFamily(name, lr=0.0))
    for step in (14, 19):
        assert relative_error(probe.said[step], probe.said[step - 1]) < 1e-6
    # In the stages of N:M groups as many are on.
    for step in (3,) if units is N_OF_M else (3, 6):
        assert relative_error(probe.said[step], probe.said[step - 1]) > 1e-3
    for step in (1, 2, 5, 7, 9, 11, 13, 15, 16, 17, 18, 20, 21, 22, 23):
        assert torch.equal(probe.said[step], probe.said[step - 1])


# Weight decay and clipping


class Decayed(L.Callback):
    """Compares each step with one that does nothing but decay. Stands right of the method."""

    def __init__(self, of, name, factor):
        self.of, self.name, self.factor, self.before, self.num_off = of, name, factor, None, 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = whole(pl_module)
        before = self.before or whole(AnyFamily(self.name))
        on = entries_on(self.name, weights, self.of.masks)
        out = entries_on(self.name, weights, self.of.masks, ["out"])
        for name, weight in weights.items():
            off = ~on.get(name, torch.ones_like(weight, dtype=torch.bool))
            expected = before[name] * self.factor
            assert torch.equal(weight[~off], expected[~off]), name
            assert torch.equal(weight[off], torch.zeros_like(weight[off]) if name in out else before[name][off]), name
            self.num_off += int(off.sum())
        self.before = weights


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm", "vit"])
def test_weight_decay_alone_moves_nothing_that_is_off(tmp_path, name, execution):
    class NoGradient(AnyFamily):
        def loss(self, rows):
            return 0 * super().loss(rows)

    callback = method(execution=execution)
    check = Decayed(callback, name, 1 - 0.5 * 0.25)
    module = NoGradient(name, lr=0.5, make_optimizer=partial(torch.optim.AdamW, weight_decay=0.25))
    fit(tmp_path, [callback, check], module)
    assert check.num_off > 0


@pytest.mark.parametrize("units", [{}, ELEMENTS], ids=["neurons and heads", "elements"])
@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_clipping_uses_the_norm_of_what_is_on(tmp_path, units, execution):
    class Norms(L.Callback):
        def __init__(self):
            self.norms = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            tensors = whole(pl_module)
            on = matrices_on(callback, tensors) if units else entries_on("gpt2-tied", tensors, callback.masks)
            total = 0.0
            for name, parameter in pl_module.net.named_parameters():
                gradient = parameter.grad
                if name in on and gradient.shape == on[name].shape:
                    gradient = gradient[on[name]]
                total += gradient.double().square().sum().item()
            self.norms.append(total**0.5)

    callback, norms = method(**units, execution=execution), Norms()
    fit(tmp_path, [callback, norms], gradient_clip_val=1e-3)
    assert norms.norms == pytest.approx([1e-3] * 24, rel=1e-3)


# Nothing is off


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("units", [{}, ELEMENTS], ids=["neurons and heads", "elements"])
def test_a_sparsity_of_zero_is_bitwise_no_callback_with_dropout_on(tmp_path, name, units):
    options = {"max_steps": 20, "gradient_clip_val": 0.5}
    stages = [(0, 0.0), (5, 0.0), (0.5, 0.0)]
    plain = fit(tmp_path, [], AnyFamily(name, dropout=0.1), **options)
    neutral = fit(tmp_path, [method(**units, stages=stages)], AnyFamily(name, dropout=0.1), **options)
    assert len(set(plain.seen)) == 20
    assert neutral.seen == plain.seen
    assert_equal(neutral, plain)
    assert_same_moments(neutral, plain)


def test_a_sparsity_of_zero_costs_what_no_callback_costs(tmp_path):
    books = []
    for callbacks in ([], [method(stages=[(0, 0.0)])]):
        ledger = ComputeLedger(print_table=False)
        module = fit(tmp_path, [*callbacks, ledger], AnyFamily(dropout=0.1), max_steps=20)
        amounts = [{k: v for k, v in each.items() if k != "seconds"} for each in ledger.phases.to_state()]
        books.append((module.seen, amounts))
    assert books[0] == books[1]


# The product


@pytest.mark.parametrize(
    ("name", "units"),
    [(name, {}) for name in sorted(FAMILIES)] + [("gpt2-tied", each) for each in (ELEMENTS, N_OF_M, TILES)],
)
def test_the_final_model_is_an_ordinary_dense_one(tmp_path, name, units):
    callback = method(**{**units, **units_for(name), "attention_pattern": "union" if "gpt2" in name else None})
    module = AnyFamily(name)
    size = anatomy_of(module.net).size
    fit(tmp_path, [callback], module, max_steps=120)
    fresh = AnyFamily(name, seed=9).net
    assert repr(module.net) == repr(fresh)
    assert anatomy_of(module.net).size == size
    assert {key: value.shape for key, value in module.net.state_dict().items()} == {
        key: value.shape for key, value in fresh.state_dict().items()
    }
    assert [key for key, _ in module.net.named_parameters()] == [key for key, _ in fresh.named_parameters()]
    for (path, mine), (_, theirs) in zip(module.net.named_modules(), fresh.named_modules(), strict=True):
        assert type(mine) is type(theirs)
        assert "forward" not in vars(mine)
        assert vars(mine).keys() == vars(theirs).keys()
        for key, value in vars(theirs).items():
            if isinstance(value, int | float | str | tuple | None):
                assert vars(mine)[key] == value, (path, key)
            elif "hooks" in key:
                assert len(vars(mine)[key]) == len(value), (path, key)
    if hasattr(fresh, "config"):
        assert module.net.config._attn_implementation == fresh.config._attn_implementation
    zeros = {key: int((value == 0).sum()) for key, value in module.net.named_parameters()}
    assert not any(zeros.values()), {key: number for key, number in zeros.items() if number}
    fresh.load_state_dict(module.net.state_dict())
    inputs = tokens(fresh)
    for mine, theirs in zip(outputs(module.net.eval(), inputs), outputs(fresh.eval(), inputs), strict=True):
        assert torch.equal(mine, theirs)
