"""What mixed sparsity training costs: what is charged is what ran, and what was predicted."""

from __future__ import annotations

import csv
import math
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_accel import ComputeLedger
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import read_ledger
from lit_accel.compute.flops import head_accountings, training_flops
from tests.methods.mixed_sparsity import ELEMENTS, N_OF_M, STEPS, TILES, UNITS, AnyFamily, Watch, fit, method, units_for

NUM_TOKENS = 12
LONGER = {"stages": [(0, 0.0), (2, 0.25), (5, 0.5), (14, 0.375), (16, 0.25), (20, 0.0)]}


def books(folder, name="gpt2-tied", module=None, trainer=None, **given):
    callback, ledger = method(**given), ComputeLedger(print_table=False)
    watch, shapes = Watch(callback), Shapes()
    module = AnyFamily(name) if module is None else module
    fit(folder, [callback, ledger, watch, shapes], module, log_every_n_steps=1, **(trainer or {}))
    return callback, ledger, watch, shapes


class Shapes(L.Callback):
    """Notes the sizes of the matrices that each forward call multiplies by. Stands right of the method."""

    def __init__(self):
        self.calls = []

    def on_train_start(self, trainer, pl_module):
        pl_module.net.register_forward_pre_hook(partial(self.note, pl_module), with_kwargs=True)

    def note(self, pl_module, net, args, kwargs):
        if net.training and torch.is_grad_enabled():
            shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
            self.calls.append((pl_module.trainer.global_step, shapes))


@pytest.mark.parametrize("units", ["neurons and heads", "tiles"])
def test_what_is_charged_is_the_size_of_what_ran(tmp_path, units):
    """By hand, for GPT-2: three times two FLOPs for each entry of a matrix and each token, and attention's pairs."""
    callback, ledger, _, shapes = books(tmp_path, **UNITS[units])
    total = 0
    for _, sizes in shapes.calls:
        is_matrix = [name for name in sizes if name.endswith("weight") and ".h." in name and "ln_" not in name]
        entries = sum(math.prod(sizes[name]) for name in is_matrix) + math.prod(sizes["transformer.wte.weight"])
        if units == "tiles":
            widths = 2 * 16
        else:
            widths = sum(sizes[f"transformer.h.{block}.attn.c_proj.weight"][0] for block in (0, 1))
        pairs = NUM_TOKENS * (NUM_TOKENS + 1) // 2
        total += 3 * (2 * 8 * NUM_TOKENS * entries + 2 * 2 * 8 * widths * pairs)
    assert len(shapes.calls) == STEPS
    assert ledger.phases.total.flops == total


def test_what_is_charged_for_entries(tmp_path):
    """By hand, for GPT-2: entries that are on, and the gradients of all where units are to be chosen by them."""
    callback, ledger, watch, _ = books(tmp_path, ffn_units="element", attention_units="element")
    on = [sum(int(mask.sum()) for mask in watch.masks[step].values()) for step in range(STEPS)]
    all_ = sum(mask.numel() for mask in watch.masks[0].values())
    total = 0
    for step in range(STEPS):
        before = on[step - 1] if step else all_
        # Updates that only drop do so before the forward pass; so do those in which all that were off come back.
        chooses = step in (6, 8, 10, 12, 14)
        used, of_gradient = (before, all_) if chooses else (on[step],) * 2
        entries = 2 * used + of_gradient + 3 * 64 * 16
        total += 2 * 8 * NUM_TOKENS * entries + 3 * 2 * 2 * 8 * 2 * 16 * (NUM_TOKENS * (NUM_TOKENS + 1) // 2)
    assert ledger.phases.total.flops == total


CASES = {
    **{f"gpt2-tied, {units}": ("gpt2-tied", given) for units, given in UNITS.items()},
    "gpt2-tied, head too": ("gpt2-tied", {"head_units": "element"}),
    "gpt2-tied, masked": ("gpt2-tied", {"execution": "masked"}),
    "gpt2-tied, no gradient": ("gpt2-tied", {"gradient_share": 0.0}),
    "gpt2-tied, union": ("gpt2-tied", {**ELEMENTS, "attention_pattern": "union", "attention_phase": (5, 15)}),
    "gpt2-untied, elements": ("gpt2-untied", ELEMENTS),
    "llama-gqa, window": ("llama-gqa", {"attention_pattern": "window", "attention_phase": (5, 15)}),
    "bert-mlm": ("bert-mlm", {}),
    "bert-mlm, tiles": ("bert-mlm", TILES),
    "vit": ("vit", {}),
    "deit-distilled, 2:4": ("deit-distilled", N_OF_M),
    "swin": ("swin", units_for("swin")),
}


@pytest.mark.parametrize("stages", ["short", "longer"])
@pytest.mark.parametrize("case", sorted(CASES))
def test_the_books_are_a_plain_sum_and_what_was_predicted(tmp_path, case, stages):
    name, given = CASES[case]
    callback, ledger, watch, _ = books(tmp_path, name, **given, **(LONGER if stages == "longer" else {}))
    targets, total = callback.targets, ledger.phases.total
    num_tokens = total.tokens // (8 * STEPS)
    cost = partial(training_flops, targets.anatomy, 8, num_tokens)
    spent, masked, dense_head, excluded = 0, 0, 0, 0
    counts = {key: space.num_units for key, space in targets.spaces.items()}
    for step in range(STEPS):
        chooses = False
        if step in watch.changes or targets.schedule.is_event(step):
            changes = targets.changes(step, counts)
            chooses = targets.needs_gradient(changes)
        after = {key: int(mask[0].sum()) for key, mask in watch.masks[step].items()}
        active = targets.active(step, counts if chooses else after, with_dense_gradients=chooses)
        flops = cost(active=active)
        by_head = head_accountings(targets.anatomy, flops, cost(), active)
        spent, masked = spent + flops.total, masked + by_head.masked
        dense_head, excluded = dense_head + by_head.dense, excluded + by_head.excluded
        counts = after
    assert total.flops == spent
    assert (total.head_masked_flops, total.head_dense_flops, total.head_excluded_flops) == (
        masked,
        dense_head,
        excluded,
    )
    assert total.dense_flops == STEPS * cost().total
    assert total.dense_head_excluded_flops == STEPS * (cost().total - cost().head)
    shares = targets.shares(num_tokens, num_sequences=8)
    assert shares.masked == pytest.approx(masked / total.dense_flops, rel=1e-12 if "tied" not in case else 1e-4)
    assert shares.dense == pytest.approx(dense_head / total.dense_flops, rel=1e-12)
    assert shares.excluded == pytest.approx(excluded / total.dense_head_excluded_flops, rel=1e-12)
    # Sparsity is a saving by every way to count, and the head that is not sparse makes it smaller.
    assert shares.excluded < 1 and shares.masked < 1 and shares.masked <= shares.dense + 1e-12
    if "head" not in case and "elements" not in case and "union" not in case:
        assert total.flops == total.head_dense_flops


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activation_checkpointing_is_charged(tmp_path, checkpointing):
    totals = {}
    for module in (AnyFamily(), AnyFamily(checkpointing=checkpointing)):
        callback, ledger, *_ = books(tmp_path, module=module)
        totals[module.net.is_gradient_checkpointing] = ledger.phases.total.flops
    shares = [callback.targets.shares(NUM_TOKENS, activation_checkpointing=each).dense for each in (True, False)]
    dense = [
        training_flops(anatomy_of(AnyFamily().net), 8, 12, activation_checkpointing=c).total for c in (True, False)
    ]
    assert totals[True] / (STEPS * dense[0]) == pytest.approx(shares[0], rel=1e-12)
    assert totals[False] / (STEPS * dense[1]) == pytest.approx(shares[1], rel=1e-12)


def test_phases_and_columns(tmp_path):
    callback, ledger, watch, _ = books(tmp_path)
    assert [(phase.size["stage"], phase.steps) for phase in ledger.phases.list] == [
        (0, 3),
        (1, 3),
        (2, 8),
        (3, 5),
        (4, 5),
    ]
    assert len({phase.num_parameters for phase in ledger.phases.list}) == 3
    with open(tmp_path / "compute_ledger.csv") as file:
        table = list(csv.DictReader(file))
    assert [int(row["phase"]) for row in table] == [0] * 3 + [1] * 3 + [2] * 8 + [3] * 5 + [4] * 5
    assert [int(row["step"]) for row in table] == list(range(1, STEPS + 1))
    total = ledger.phases.total
    for column in (
        "flops",
        "head_masked_flops",
        "head_dense_flops",
        "head_excluded_flops",
        "dense_head_excluded_flops",
    ):
        assert float(table[-1][column]) == getattr(total, column)
    assert total.head_excluded_flops < total.head_masked_flops < total.head_dense_flops == total.flops
    assert read_ledger(tmp_path).by_head["head_masked_flops"][-1] == total.head_masked_flops
    # By the head's sparsity, of a step without any choice.
    sparse, before = ({key: float(table[step][key]) for key in table[0] if "flops" in key} for step in (13, 12))
    step = {key: value - before[key] for key, value in sparse.items()}
    head = 3 * 2 * 8 * NUM_TOKENS * 64 * 16
    assert step["head_dense_flops"] - step["head_excluded_flops"] == head
    assert step["head_masked_flops"] - step["head_excluded_flops"] == head / 2


def test_a_phase_does_not_depend_on_where_callbacks_stand(tmp_path):
    phases = []
    for order in (1, -1):
        callback, ledger = method(attention_pattern="window", attention_phase=(5, 15)), ComputeLedger(print_table=False)
        fit(tmp_path, [callback, ledger][::order], log_every_n_steps=1)
        phases.append([(p.size, p.steps, p.flops, p.num_parameters, p.head_masked_flops) for p in ledger.phases.list])
    assert phases[0] == phases[1]


@pytest.mark.parametrize("number", [2, 3])
def test_micro_batches_of_an_update_are_all_charged_for_it(tmp_path, number):
    callback, ledger, watch, shapes = books(tmp_path, trainer={"accumulate_grad_batches": number})
    steps = [step for step, _ in shapes.calls]
    # Each micro-batch ran the same model. 64 batches are not divisible: the last step of an epoch may have fewer.
    for step in range(STEPS):
        ran = [sizes for each, sizes in shapes.calls if each == step]
        assert all(sizes == ran[0] for sizes in ran)
    whole = {name: tuple(p.shape) for name, p in AnyFamily().net.named_parameters()}
    # Whole where units are chosen by gradient, and where all are on.
    runs_whole = {step for step in range(STEPS) if all(sizes == whole for each, sizes in shapes.calls if each == step)}
    assert runs_whole == {0, 1, 2, 6, 8, 10, 14, 19, 20, 21, 22, 23}
    assert len(steps) == ledger.phases.total.tokens // (8 * NUM_TOKENS)


def test_logs_of_the_ledger(tmp_path):
    callback, ledger, logger = method(), ComputeLedger(print_table=False), CSVLogger(tmp_path, name="run")
    fit(tmp_path, [callback, ledger], logger=logger, log_every_n_steps=8)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        last = [row for row in csv.DictReader(file) if row["compute/saved_share"]][-1]
    shares = callback.targets.shares(NUM_TOKENS)
    assert float(last["compute/saved_share"]) == pytest.approx(1 - shares.dense)
    assert float(last["compute/saved_share_head_masked"]) == pytest.approx(1 - shares.masked, rel=1e-4)
    assert float(last["compute/saved_share_head_excluded"]) == pytest.approx(1 - shares.excluded)
