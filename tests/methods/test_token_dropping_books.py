"""What is counted and said when a training step does more than call its model once."""

from __future__ import annotations

import csv

import pytest
import timm.layers
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_accel import ComputeLedger, ProgressiveLayerDropping, RandomLTD
from lit_accel.methods.token_dropping import TokenSchedule, callback
from lit_accel.methods.token_dropping.books import TokenCount
from tests.methods.test_token_dropping_refusals import refuse
from tests.methods.test_token_dropping_runs import LTD, Deep, assert_equal, fit

# The same number of tokens in every step.
CONSTANT = {"start_tokens": 6, "growth": 1000, "quantum": 1}


def run(folder, module, method=None, **options):
    method, ledger = method or RandomLTD(**CONSTANT), ComputeLedger(print_table=False)
    fit(folder, [method, ledger], module, **{"max_steps": 3, **options})
    return method.total, ledger.phases.total


class WithTeacher(Deep):
    """Its own model is its teacher, in evaluation mode and without gradients, before the backward pass."""

    def loss(self, batch):
        loss = super().loss(batch)
        with torch.no_grad():
            self.net.eval()
            target = super().loss(batch)
            self.net.train()
        return loss + 0 * target


@pytest.mark.parametrize("name", ["vit", "gpt2-tied"])
def test_recomputed_blocks_are_booked_on_no_other_call(tmp_path, name, recwarn):
    """timm calls a block again in the backward pass, after the teacher."""
    plain, _ = run(tmp_path, WithTeacher(name))
    recomputed, ledger = run(tmp_path, WithTeacher(name, checkpointing=True))
    alone, alone_ledger = run(tmp_path, Deep(name, checkpointing=True))
    assert recomputed == plain == alone
    dense = Deep(name)
    _, dense_ledger = run(tmp_path, dense, RandomLTD(start_tokens=1.0))
    # The teacher: a forward pass of everything, in every step.
    assert ledger.flops - alone_ledger.flops == ledger.dense_flops - alone_ledger.dense_flops
    assert ledger.flops - alone_ledger.flops == pytest.approx(dense_ledger.flops / 3, rel=0.02)
    assert not [warning for warning in recwarn if "dropped no token" in str(warning.message)]


class Parts(Deep):
    """Calls the body of its model, and a head of its own; if it is asked to, the model as well."""

    def __init__(self, *args, beside=False, with_gradients=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.beside, self.with_gradients = beside, with_gradients

    def loss(self, batch):
        with torch.set_grad_enabled(self.with_gradients):
            if self.is_vision:
                part = self.net.forward_features(batch[0])
            else:
                part = getattr(self.net, self.net.base_model_prefix)(batch).last_hidden_state
        return part.square().mean() + (super().loss(batch) if self.beside else 0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "scope"), [("gpt2-tied", "layer"), ("bert-mlm", "layer"), ("vit", "layer"), ("vit", "input")]
)
def test_calls_of_parts_drop_nothing_count_nothing_and_are_warned_about(tmp_path, name, scope, checkpointing):
    plain, module = (Parts(name, checkpointing=checkpointing) for _ in range(2))
    fit(tmp_path, [], plain, max_steps=3)
    with pytest.warns(UserWarning, match="RandomLTD: the transformer was not called in a batch"):
        total, _ = run(tmp_path, module, RandomLTD(**CONSTANT, scope=scope))
    assert total == TokenCount()
    assert module.seen == plain.seen
    assert_equal(module, plain)


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("name", ["bert-mlm", "vit"])
def test_beside_the_model_calls_of_its_parts_are_warned_about_where_they_are_trained(
    tmp_path, name, with_gradients, recwarn
):
    total, _ = run(tmp_path, Parts(name, beside=True, with_gradients=with_gradients))
    assert total == run(tmp_path, Deep(name))[0]
    warned = [warning for warning in recwarn if "a part of the transformer was called besides" in str(warning.message)]
    assert len(warned) == with_gradients


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_whether_a_recomputed_block_saw_every_token_must_be_known(tmp_path, use_reentrant, monkeypatch):
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", use_reentrant)
    with pytest.raises(RuntimeError, match=r"the transformer was called.* and a part of it"):
        run(tmp_path, Parts("vit", beside=True, checkpointing=True))
    # Of what is not trained nothing is recomputed.
    teacher = {"beside": True, "with_gradients": False}
    assert run(tmp_path, Parts("vit", checkpointing=True, **teacher))[0] == run(tmp_path, Parts("vit", **teacher))[0]


def test_a_block_that_is_skipped_keeps_no_token_and_counts_for_no_average(tmp_path):
    def kept(folder, *others):
        method = RandomLTD(**CONSTANT)
        logger = CSVLogger(folder)
        fit(folder, [method, *others], Deep(), max_steps=8, logger=logger, log_every_n_steps=8)
        rows = csv.DictReader((tmp_path / logger.log_dir / "metrics.csv").open())
        return [float(row["token_dropping/kept_tokens"]) for row in rows if row.get("token_dropping/kept_tokens")]

    assert kept(tmp_path) == kept(tmp_path, ProgressiveLayerDropping(theta=0.3, gamma=5.0)) == [6]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["gpt2-tied", "vit"])
def test_what_is_printed_is_what_the_ledger_counts(tmp_path, name, checkpointing, monkeypatch):
    messages = []
    monkeypatch.setattr(callback, "rank_zero_info", messages.append)
    method, ledger = RandomLTD(**LTD, num_tokens=None if name == "vit" else 12), ComputeLedger(print_table=False)
    fit(tmp_path, [method, ledger], Deep(name, checkpointing=checkpointing))
    total = ledger.phases.total
    (message,) = messages
    assert f"RandomLTD alone will save {1 - total.flops / total.dense_flops:.1%} of the FLOPs" in message
    assert "4 of its 6 blocks" in message


@pytest.mark.parametrize("keep_prefix", [0, 1])
def test_by_input_what_the_model_puts_in_front_cannot_be_dropped(tmp_path, keep_prefix):
    method = RandomLTD(**CONSTANT, scope="input", keep_prefix=keep_prefix)
    refuse(tmp_path, [method], [f"keep_prefix is {keep_prefix}", "Leave keep_prefix out"], Deep("deit-distilled"))


def test_by_deepspeeds_formula_short_sequences_are_never_dropped_from():
    schedule = TokenSchedule(128, 100, 8, compat="deepspeed")
    assert {schedule.kept_tokens(step, 64) for step in range(500)} == {64}
    late = TokenSchedule(8, 4, 8, compat="deepspeed")
    assert [late.kept_tokens(step, 30) for step in (3, 4, 5)] == [24, 24, 30]
    assert not late.is_over(4)


def test_by_deepspeeds_formula_tokens_are_dropped_until_it_is_over(tmp_path):
    method = RandomLTD(8, growth=4, quantum=8, compat="deepspeed", num_tokens=12)
    total, _ = run(tmp_path, Deep(), method, max_steps=12)
    assert method.schedule.kept_tokens(6, 12) == 8  # two steps after the growth
    steps = [method.schedule.kept_tokens(step, 12) for step in range(12)]
    assert total.layer_tokens == sum(8 * (2 * 12 + 4 * kept) for kept in steps)
