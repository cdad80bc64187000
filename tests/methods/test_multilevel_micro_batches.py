"""Merged micro-batches: the same optimizer steps from fewer, larger calls."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from types import MappingProxyType

import lightning.pytorch as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import BatchEncoding

from lit_accel import ComputeLedger, Level, MultiLevelTraining, Phase
from lit_accel.compute import read_ledger
from lit_accel.methods.multilevel.micro_batches import merge_batches
from tests.training import TinyModule, loader, make_trainer

PHASES = [Phase(0, 2), Phase(1, 4), Phase(0)]


class Calls(TinyModule):
    """Remembers how many sequences each call had."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.calls: list[int] = []

    def training_step(self, batch, batch_idx):
        self.calls.append(len(batch))
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "note": "of the user"}


class EachStepHasAGradient(L.Callback):
    """Looks at the gradients of every optimizer step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        assert all(parameter.grad is not None for parameter in pl_module.parameters())


def fit(tmp_path, merge, *, accumulate=4, num_samples=256, callbacks=(), resume=None, kind=Calls, **kwargs):
    module = kind(dtype=torch.float64, scheduler="linear")
    method = MultiLevelTraining([Level(merge_batches=merge)], PHASES)
    trainer = make_trainer(
        tmp_path, callbacks=[method, *callbacks], accumulate_grad_batches=accumulate, max_steps=9, **kwargs
    )
    data = loader(batch_size=4, num_samples=num_samples)
    trainer.fit(module, data, loader(num_samples=8), ckpt_path=resume)
    assert "training_step" not in vars(trainer.strategy)
    return module, trainer


@pytest.mark.parametrize("merge", [2, 4])
# 40 samples are 10 micro-batches: the third window of each epoch has two of them only.
@pytest.mark.parametrize("data", [{"num_samples": 256}, {"num_samples": 40}, {"limit_train_batches": 7}])
def test_merging_changes_no_optimizer_step(tmp_path, merge, data):
    plain, _ = fit(tmp_path, 1, **data)
    merged, _ = fit(tmp_path, merge, **data)
    assert merged.rates == plain.rates
    for (name, actual), expected in zip(merged.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=name)


# In the middle of a window of the small level, after one or two of its four micro-batches.
@pytest.mark.parametrize(("merge", "stopped_after"), [(2, 13), (4, 13), (4, 14)])
def test_merging_changes_no_optimizer_step_after_a_resume_in_mid_window(tmp_path, merge, stopped_after):
    save = ModelCheckpoint(tmp_path, filename="{step}", monitor="val/loss", save_top_k=-1)
    fit(tmp_path, merge, callbacks=[save], val_check_interval=stopped_after, enable_checkpointing=True)
    resumed = {"resume": tmp_path / "step=3.ckpt", "callbacks": [EachStepHasAGradient()]}
    plain, _ = fit(tmp_path, 1, **resumed)
    merged, _ = fit(tmp_path, merge, **resumed)
    assert merged.rates == plain.rates
    assert len(merged.calls) < len(plain.calls)
    for (name, actual), expected in zip(merged.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=name)


def test_an_epoch_that_is_broken_off_in_mid_window_leaves_nothing_for_the_next(tmp_path):
    class BreaksOff(Calls):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 14 and self.trainer.current_epoch == 0 else None

    plain, _ = fit(tmp_path, 1, kind=BreaksOff)
    merged, _ = fit(tmp_path, 4, kind=BreaksOff)
    for (name, actual), expected in zip(merged.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=name)


def test_only_the_small_level_is_called_with_more(tmp_path):
    module, _ = fit(tmp_path, 4)
    full = max(module.sizes)
    assert {calls for calls, size in zip(module.calls, module.sizes, strict=True) if size == full} == {4}
    assert {calls for calls, size in zip(module.calls, module.sizes, strict=True) if size < full} == {16}
    assert len(module.calls) == (2 + 3) * 4 + 4


def test_the_ledger_counts_the_same(tmp_path):
    totals = []
    for merge in (1, 4):
        folder = tmp_path / str(merge)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(tmp_path, merge, callbacks=[ComputeLedger(folder=str(folder), print_table=False)])
        assert not [w for w in caught if "was not called" in str(w.message)]
        ledger = read_ledger(folder)
        totals.append((ledger.flops[-1], ledger.tokens[-1]))
    assert totals[0] == totals[1]


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"merge_batches=3.*multiple of it"):
        fit(tmp_path, 3)
    with pytest.raises(ValueError, match="merge_batches is 0; it is a whole number, at least 1"):
        fit(tmp_path, 0)


def test_manual_optimization_is_refused(tmp_path):
    module = TinyModule()
    module.automatic_optimization = False
    method = MultiLevelTraining([Level(merge_batches=2)], PHASES)
    trainer = make_trainer(tmp_path, callbacks=[method], max_steps=9)
    trainer.accumulate_grad_batches = 2
    with pytest.raises(MisconfigurationException, match="automatic optimization"):
        trainer.fit(module, loader())


tensors = st.builds(lambda rows, seed: torch.full((rows, 2), float(seed)), st.integers(1, 3), st.integers(0, 9))
batch_structures = st.recursive(
    tensors,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)


@given(batch=batch_structures, number=st.integers(1, 3))
def test_batches_of_any_structure_are_merged_leaf_by_leaf(batch, number):
    def check(merged, part):
        assert type(merged) is type(part)
        if isinstance(part, torch.Tensor):
            assert torch.equal(merged, torch.cat([part] * number))
        else:
            assert len(merged) == len(part)
            for key in part if isinstance(part, dict) else range(len(part)):
                check(merged[key], part[key])

    check(merge_batches([batch] * number), batch)


@dataclass(frozen=True)
class Texts:
    input_ids: torch.Tensor
    language: str = "en"


def test_a_merged_batch_is_of_the_kind_that_the_training_step_knows():
    ids = [torch.full((2, 3), index) for index in range(3)]
    encoded = merge_batches([BatchEncoding({"input_ids": part}) for part in ids])
    assert isinstance(encoded, BatchEncoding)
    assert torch.equal(encoded.input_ids, torch.cat(ids))
    texts = [Texts(part) for part in ids]
    merged = merge_batches(texts)
    assert isinstance(merged, Texts)
    assert torch.equal(merged.input_ids, torch.cat(ids))
    assert texts[0].input_ids is ids[0]
    counted = merge_batches([OrderedDict(input_ids=part) for part in ids])
    assert type(counted) is OrderedDict
    frozen = merge_batches([MappingProxyType({"input_ids": part}) for part in ids])
    assert torch.equal(frozen["input_ids"], torch.cat(ids))
    with pytest.raises(ValueError, match="'en' and other values"):
        merge_batches([texts[0], Texts(ids[1], "fr")])


def test_batches_that_cannot_be_merged():
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 4\).*Pad them"):
        merge_batches([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="'en' and other values"):
        merge_batches([{"language": "en"}, {"language": "fr"}])
    assert merge_batches([{"language": "en"}, {"language": "en"}]) == {"language": "en"}
