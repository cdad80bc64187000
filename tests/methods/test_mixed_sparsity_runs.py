"""Mixed sparsity training in whole runs: when units change, what attention sees, and what others see of the model."""

from __future__ import annotations

import csv

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_accel import MixedSparsityMixin
from lit_accel.anatomy import anatomy_of
from lit_accel.draws import generator
from lit_accel.methods.mixed_sparsity import dynamics
from tests.methods.mixed_sparsity import (
    ELEMENTS,
    EVENTS,
    MST,
    N_OF_M,
    STEPS,
    TILES,
    UNITS,
    AnyFamily,
    Watch,
    assert_equal,
    fit,
    method,
    rows,
    whole,
)
from tests.models import relative_error

PATTERNS = {
    "window": lambda i, j: i - j < 3,
    "strided": lambda i, j: (i - j) % 3 == 0,
    "union": lambda i, j: (i - j < 3) | ((i - j) % 3 == 0),
    "fixed": lambda i, j: (i // 3 == j // 3) | (j % 3 == 2),
}


# When units change

# By a sparsity of 0, a quarter and a half.
ON = {
    "neurons and heads": {"neurons": (32, 24, 16), "heads": (4, 3, 2)},
    "2:4": {"weight": (4, 2, 2)},
    "tiles": {"attn.c_attn.weight": (4, 3, 2), "mlp.c_proj.weight": (8, 6, 4)},
    # By "er" a matrix keeps eps (outputs + inputs) entries. Of all matrices these sums come to 464, so half of the 5120
    # entries is eps = 2560 / 464. At three quarters, matrices of 16 x 16 would need more than they have: both are
    # dense, and for the others eps is (3840 - 512) / 400.
    "elements": {
        "attn.c_attn.weight": (768, 532, 353),
        "attn.c_proj.weight": (256, 256, 177),
        "mlp.c_fc.weight": (512, 399, 265),
        "mlp.c_proj.weight": (512, 399, 265),
        "wte.weight": (1024, 666, 441),
    },
}


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("units", sorted(UNITS))
def test_units_change_at_events_and_there_are_as_many_as_planned(tmp_path, units, execution):
    callback = method(**UNITS[units], execution=execution)
    watch = Watch(callback)
    fit(tmp_path, [callback, watch])
    assert {3, 4, 6, 19} <= set(watch.changes) <= set(EVENTS)
    if units == "elements":
        assert watch.changes == EVENTS
    stages = [0] * 3 + [1] * 3 + [2] * 8 + [1] * 5 + [0] * 5
    for step in range(STEPS):
        counts = callback.targets.counts(step)
        assert watch.num_on(step) == {name: [counts[name]] * len(mask) for name, mask in watch.masks[step].items()}
        for name, number in counts.items():
            for ending, numbers in ON.get(units, {}).items():
                assert not name.endswith(ending) or number == numbers[stages[step]]
        if units == "elements":
            total = sum(mask.numel() for mask in watch.masks[step].values())
            assert sum(counts.values()) == pytest.approx(total * (1 - [0, 0.25, 0.5][stages[step]]), abs=len(counts))


def test_units_of_restoration_only_come_back(tmp_path):
    callback = method(stages=[(0, 0.0), (3, 0.5), (10, 0.375), (13, 0.25), (16, 0.125), (19, 0.0)], **ELEMENTS)
    watch = Watch(callback)
    fit(tmp_path, [callback, watch])
    assert [step for step in watch.changes if step >= 10] == [10, 13, 16, 19]
    for step in range(10, STEPS):
        for name, mask in watch.masks[step].items():
            assert (mask | ~watch.masks[step - 1][name]).all()


def test_the_default_stages(tmp_path):
    """Of 100 steps the dense ones are the first and the last five; updates have no part in when stages begin."""
    callback = method(stages=None, update_every=100)
    watch = Watch(callback)
    fit(tmp_path, [callback, watch], max_steps=100)
    neurons = [watch.num_on(step)["transformer.h.0: neurons"][0] for step in range(100)]
    # Of 32, in multiples of 4.
    expected = [32] + [24] + [12] * 2 + [8] * 2 + [4] * 74 + [8] * 5 + [12] * 5 + [24] * 5 + [32] * 5
    assert neurons == expected


def test_no_two_draws_of_a_run_are_the_same(tmp_path, monkeypatch):
    """Else every update would look at the same units, and every layer grow the same pattern."""
    keys = []
    monkeypatch.setattr(dynamics, "generator", lambda *key: keys.append(key) or generator(*key))
    callback = method(gradient_share=0.0, **ELEMENTS)
    fit(tmp_path, [callback])
    assert len(keys) == len(set(keys)) > 2 * len(callback.targets.spaces)


@pytest.mark.parametrize("units", [TILES, N_OF_M], ids=["tiles", "2:4"])
def test_replaced_units_are_counted_in_all_groups(tmp_path, units):
    callback = method(**units)
    watch = Watch(callback)
    fit(tmp_path, [callback, watch])
    replaced = 0
    for step in range(1, STEPS):
        for name, new in watch.masks[step].items():
            old = watch.masks[step - 1][name]
            replaced += int(torch.minimum((old & ~new).sum(1), (new & ~old).sum(1)).sum())
    assert callback.state_dict()["units"]["num_replaced"] == replaced > 0


def test_seeds(tmp_path):
    digests = []
    for seed in (0, 0, 1):
        callback = method(seed=seed, gradient_share=0.0, drop_fraction=0.3, **ELEMENTS)
        watch = Watch(callback)
        fit(tmp_path, [callback, watch])
        digests.append(watch.digests)
    assert digests[1] == digests[0]
    changed = [step for step in range(STEPS) if digests[2][step] != digests[0][step]]
    # From the first update that draws until all are on again. The stage of step 6 drops what was grown last.
    assert changed[0] == 4 and changed[-1] <= 18 and {*range(8, 14)} <= {*changed}


# Attention


class Attention(L.Callback):
    """Notes by which mask the model attends, in training and in validation. Stands right of the method."""

    def __init__(self, name, pattern):
        i, j = torch.arange(12)[:, None], torch.arange(12)[None]
        self.masks = {"dense": j <= i, pattern: (j <= i) & PATTERNS[pattern](i, j)}
        self.name, self.trained, self.evaluated = name, {}, {}

    def which(self, pl_module, rows):
        plain = AnyFamily(self.name)
        plain.load_state_dict(pl_module.state_dict())
        with torch.no_grad():
            said = pl_module.logits(rows)
            for name, mask in self.masks.items():
                expected = plain.net(plain.ids[rows], attention_mask=mask.expand(len(rows), 1, 12, 12)).logits
                if relative_error(said, expected) < 1e-5:
                    return name
        return None

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.trained[trainer.global_step] = self.which(pl_module, torch.arange(4))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            self.evaluated[trainer.global_step - 1] = self.which(pl_module, torch.arange(4))


@pytest.mark.parametrize(
    ("name", "pattern", "evaluates"),
    [("gpt2-tied", pattern, True) for pattern in sorted(PATTERNS)]
    + [("gpt2-tied", "window", False), ("llama-gqa", "union", True), ("llama-gqa", "fixed", False)],
)
def test_attention_follows_the_pattern_in_its_phase(tmp_path, name, pattern, evaluates):
    callback = method(attention_pattern=pattern, attention_phase=(5, 9), evaluate_pattern=evaluates)
    watch, logger = Attention(name, pattern), CSVLogger(tmp_path, name="run")
    options = {"val_check_interval": 1, "max_steps": 12, "logger": logger, "log_every_n_steps": 1}
    module = fit(tmp_path, [callback, watch], AnyFamily(name), **options)
    assert watch.trained == {step: pattern if 5 <= step < 9 else "dense" for step in range(12)}
    assert watch.evaluated == {step: pattern if 5 <= step < 9 and evaluates else "dense" for step in range(12)}
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = [row for row in csv.DictReader(file) if row["mixed_sparsity/attention_pattern"]]
    follows = [0.0] * 5 + [1.0] * 4 + [0.0] * 3
    assert [float(row["mixed_sparsity/attention_pattern"]) for row in logged] == follows
    assert [float(row["mixed_sparsity/evaluation_pattern"]) for row in logged] == [each * evaluates for each in follows]
    watch.evaluated.clear()
    module.trainer.validate(module, rows(1), verbose=False)
    assert set(watch.evaluated.values()) == {"dense"}


def test_the_phase_of_attention_as_shares_of_the_run(tmp_path):
    callback, watch = method(attention_pattern="window", attention_phase=(0.25, 0.5)), Attention("gpt2-tied", "window")
    fit(tmp_path, [callback, watch])
    assert [step for step, mask in watch.trained.items() if mask == "window"] == list(range(6, 12))


# What others see


def test_size_axes_are_those_of_the_whole_model(tmp_path):
    class Check(L.Callback):
        num_small = 0

        def on_train_batch_end(self, trainer, pl_module, *_):
            assert anatomy_of(pl_module.net).size == size
            num_parameters = sum(parameter.numel() for parameter in pl_module.net.parameters())
            self.num_small += num_parameters < anatomy_of(pl_module.net).num_parameters

    module, check = AnyFamily(), Check()
    size = anatomy_of(module.net).size
    fit(tmp_path, [method(), check], module)
    # From the first sparse step to the last.
    assert check.num_small == 19 - 3


@pytest.mark.parametrize("units", sorted(UNITS))
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm", "vit"])
def test_validation_in_between_sees_the_function_of_the_checkpoint(tmp_path, name, units):
    class Check(L.Callback):
        num_checked = 0

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            path = tmp_path / "weights.ckpt"
            trainer.save_checkpoint(path, weights_only=True)
            plain = AnyFamily(name, seed=7)
            plain.load_state_dict(torch.load(path)["state_dict"])
            with torch.no_grad():
                mine, theirs = pl_module.logits(batch), plain.eval().logits(batch)
            assert mine.isfinite().all()
            assert relative_error(mine, theirs) < 1e-5
            self.num_checked += 1

    check, method_too = Check(), method(**UNITS[units])
    validated = fit(tmp_path, [method_too, check], AnyFamily(name), val_check_interval=4)
    assert check.num_checked >= 6 * 2
    assert torch.isfinite(validated.trainer.callback_metrics["val/loss"])
    assert validated.seen == fit(tmp_path, [method(**UNITS[units])], AnyFamily(name)).seen


def test_test_and_predict_after_fit(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = fit(tmp_path, [method(), saves], enable_checkpointing=True)
    trainer = module.trainer
    plain = AnyFamily(seed=7)
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"])
    data = rows(2)
    for path, expected in ((None, module), (tmp_path / "last.ckpt", plain)):
        said = torch.cat(trainer.predict(module, data, ckpt_path=path, weights_only=False))
        with torch.no_grad():
            assert torch.equal(said, torch.cat([expected.eval().logits(batch) for batch in data]))
    # A sparse one, whose units are zero on their output side.
    sparse = tmp_path / "step=10.ckpt"
    (tested,) = trainer.test(module, data, ckpt_path=sparse, verbose=False, weights_only=False)
    plain.load_state_dict(torch.load(sparse, weights_only=False)["state_dict"])
    with torch.no_grad():
        assert tested["test/loss"] == pytest.approx(sum(plain.loss(batch).item() for batch in data) / 2, rel=1e-5)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"])
@pytest.mark.parametrize("units", ["neurons and heads", "tiles"])
@pytest.mark.parametrize("step", [6, 8, 9])
def test_a_run_that_breaks_leaves_a_whole_model(tmp_path, step, units, hook):
    class Break(L.Callback):
        def raise_error(self, trainer, pl_module, *_):
            if trainer.global_step == step:
                self.weights = whole(pl_module)
                raise RuntimeError("broken on purpose")

    breaks = Break()
    setattr(breaks, hook, breaks.raise_error)
    module, fresh = AnyFamily(), AnyFamily(seed=1)
    callback = method(**UNITS[units], attention_pattern="window", attention_phase=(0, STEPS))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        fit(tmp_path, [callback, breaks], module)
    assert_equal(whole(module), breaks.weights)
    assert repr(module.net) == repr(fresh.net)
    fresh.load_state_dict(module.state_dict())
    data = torch.arange(8)
    with torch.no_grad():
        assert torch.equal(module.logits(data), fresh.logits(data))
    assert not any("forward" in vars(part) for part in module.net.modules())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.loss(data).backward()
    optimizer.step()


def test_a_second_run_begins_anew_and_a_longer_one_goes_on(tmp_path):
    callback, module = method(stages=[(0, 0.0), (3, 0.5), (30, 0.0)]), AnyFamily()
    watch = Watch(callback)
    fit(tmp_path, [callback, watch], module, max_steps=10)
    # The same run goes on.
    trainer = module.trainer
    trainer.fit_loop.epoch_loop.max_steps = STEPS
    trainer.fit(module, rows())
    assert list(watch.masks) == list(range(STEPS))
    assert watch.num_on(STEPS - 1) == watch.num_on(9) == watch.num_on(3)
    assert set(watch.changes) <= {3, *range(4, STEPS, 2)}
    # A run of another Trainer begins anew.
    again = AnyFamily()
    fit(tmp_path, [callback], again, max_steps=10)
    assert again.seen == module.seen[:10]


# Ways to train


@pytest.mark.parametrize("units", sorted(UNITS))
def test_accumulated_gradients_are_those_of_a_large_batch(tmp_path, units):
    runs = []
    for size, number in ((8, 3), (24, 1)):
        callback = method(**UNITS[units])
        watch = Watch(callback)
        module = AnyFamily(dtype=torch.float64)
        options = {"data": rows(num_batches=STEPS * 24 // size, batch_size=size), "accumulate_grad_batches": number}
        fit(tmp_path, [callback, watch], module, gradient_clip_val=0.5, **options)
        losses = [sum(module.seen[first : first + number]) / number for first in range(0, STEPS * number, number)]
        runs.append((watch.digests, whole(module), losses))
    (digests, weights, losses), (expected_digests, expected, expected_losses) = runs
    assert digests == expected_digests
    assert losses == pytest.approx(expected_losses, abs=1e-9)
    for name, value in expected.items():
        assert (weights[name] - value).abs().max() < 1e-9, name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("units", sorted(UNITS))
def test_half_precision(tmp_path, units, precision):
    losses = {}
    for each in ("32-true", precision):
        callback = method(**UNITS[units], attention_pattern="union", attention_phase=(5, 15))
        watch = Watch(callback)
        module = fit(tmp_path, [callback, watch], precision=each, gradient_clip_val=0.5)
        assert {3, 4, 6, 19} <= set(watch.changes)
        dtype = torch.bfloat16 if each == "bf16-true" else torch.float32
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
        for state in module.trainer.optimizers[0].state.values():
            assert state["exp_avg"].dtype == dtype
        losses[each] = module.seen
    assert losses[precision] != losses["32-true"]
    assert losses[precision] == pytest.approx(losses["32-true"], rel=0.05)


@pytest.mark.parametrize("name", ["gpt2-tied", "bert-mlm", "vit", "swin"])
def test_the_loss_falls(tmp_path, name):
    units = {"attention_units": "dense"} if "swin" in name else {}
    module = fit(tmp_path, [method(**units, stages=None)], AnyFamily(name, lr=1e-2), max_steps=60)
    assert sum(module.seen[-8:]) < 0.92 * sum(module.seen[:8])


def test_logs(tmp_path):
    callback, logger = method(), CSVLogger(tmp_path, name="run")
    watch = Watch(callback)
    fit(tmp_path, [callback, watch], logger=logger, log_every_n_steps=4)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = [row for row in csv.DictReader(file) if row["mixed_sparsity/sparsity"]]
    assert [int(row["step"]) for row in logged] == [3, 7, 11, 15, 19, 23]
    assert [float(row["mixed_sparsity/sparsity"]) for row in logged] == [0.25, 0.5, 0.5, 0.25, 0.0, 0.0]
    # A neuron is a row, a bias and a column of 16; a head four of 4 rows of 16, and three biases of 4.
    sizes = {"neurons": 2 * 16 + 1, "heads": 4 * 4 * 16 + 3 * 4}
    total = sum(parameter.numel() for parameter in AnyFamily().net.parameters())
    for row in logged:
        masks = watch.masks[int(row["step"])]
        off = sum(int((~mask).sum()) * sizes[name.split(": ")[1]] for name, mask in masks.items())
        assert float(row["mixed_sparsity/active_parameters"]) == total - off
    replaced = [0]
    for step in range(1, STEPS):
        pairs = [(watch.masks[step - 1][name], mask) for name, mask in watch.masks[step].items()]
        replaced.append(replaced[-1] + sum(int(min((old & ~new).sum(), (new & ~old).sum())) for old, new in pairs))
    assert replaced[-1] > 0
    assert [float(row["mixed_sparsity/replaced_units"]) for row in logged] == [
        replaced[s] for s in (3, 7, 11, 15, 19, 23)
    ]


def test_the_mixin_brings_the_callback(tmp_path):
    class Mine(MixedSparsityMixin, AnyFamily):
        pass

    given = {**MST, "seed": 5, "attention_pattern": "window", "attention_phase": (4, 12), "gradient_share": 0.5}
    mine = fit(tmp_path, [], Mine(**{f"mst_{name}": value for name, value in given.items()}))
    assert mine.seen == fit(tmp_path, [method(**given)]).seen
    assert mine.seen != fit(tmp_path, []).seen
