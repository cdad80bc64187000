"""Modules and methods in Python that cannot work: refused in ``fit``, before any training step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_accel import (
    Composition,
    ComputeLedger,
    Level,
    MixedSparsityTraining,
    MultiLevelTraining,
    Phase,
    ProgressiveLayerDropping,
    RandomLTD,
    SensitivityLayerDropping,
)
from lit_accel.anatomy import AnatomyError
from lit_accel.data import TextDataModule
from tests.bad_input.harness import TEXT, run_call
from tests.bad_input.rows import Call
from tests.training import TinyModule, loader, make_trainer

AT_THE_TRAINER = "Lightning's Trainer looks at all callbacks before any of them is asked"


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()


class Manual(TinyModule):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False


class TwoModels(TinyModule):
    def __init__(self):
        super().__init__()
        self.other = TinyModule().net


class Frozen(TinyModule):
    def __init__(self):
        super().__init__()
        self.net.transformer.h[0].requires_grad_(False)


def fit(*callbacks, module=None, data=None, **kwargs):
    """Fit a small module with callbacks."""
    trainer = make_trainer(Path.cwd(), callbacks=callbacks, **{"max_steps": 10, **kwargs})
    trainer.fit(module or TinyModule(), loader() if data is None else data)


def text(**kwargs):
    Path("text.txt").write_text(TEXT)
    return TextDataModule("text.txt", **{"tokenizer": "bytes", "block_size": 8, "batch_size": 2, **kwargs})


def batches(*tensors):
    return DataLoader(TensorDataset(*tensors), batch_size=2)


def call(name, make, message, error=MisconfigurationException, **kwargs):
    return Call(name, make, message, error=error, **kwargs)


anatomy = partial(call, error=AnatomyError)
value = partial(call, error=ValueError)

ROWS = [
    anatomy(
        "a module without a transformer",
        lambda: fit(RandomLTD(), module=Linear(), data=batches(torch.ones(4, 2))),
        "No transformer with a registered anatomy is inside Linear; it holds layer",
    ),
    anatomy(
        "a module of two transformers",
        lambda: fit(RandomLTD(), module=TwoModels()),
        "TwoModels holds 2 transformers: net (GPT2LMHeadModel), other",
    ),
    anatomy(
        "a ledger of no transformer",
        lambda: fit(ComputeLedger(), module=Linear(), data=batches(torch.ones(4, 2))),
        "No transformer with a registered anatomy is inside Linear; it holds layer",
    ),
    anatomy(
        "levels of a frozen block",
        lambda: fit(MultiLevelTraining(), module=Frozen()),
        "transformer.h.1.ln_1.weight and transformer.h.0.ln_1.weight differ in",
    ),
    call(
        "sparsity of a frozen block",
        lambda: fit(MixedSparsityTraining(), module=Frozen()),
        "transformer.h.0.mlp.c_fc.weight is frozen, and switching units off changes",
    ),
    call(
        "sparsity by hand",
        lambda: fit(MixedSparsityTraining(), module=Manual()),
        "MixedSparsityTraining changes the topology between the backward pass and",
    ),
    call(
        "measuring by hand",
        lambda: fit(SensitivityLayerDropping(), module=Manual()),
        'SensitivityLayerDropping: estimator="ablate" calls the training step to',
    ),
    call(
        "merged batches by hand",
        lambda: fit(MultiLevelTraining(levels=[Level(merge_batches=2)]), module=Manual(), accumulate_grad_batches=1),
        "A level has merge_batches=2, and the Trainer accumulate_grad_batches=1,",
    ),
    call(
        "a run without an end",
        lambda: fit(MultiLevelTraining(), max_steps=-1, max_epochs=-1),
        "MultiLevelTraining must know how long the run is. Give the Trainer",
    ),
    call(
        "a strategy that cannot resize",
        lambda: fit(MultiLevelTraining(), strategy="auto"),
        "MultiLevelTraining changes the model's size in mid-training, which",
    ),
    call(
        "averaged weights",
        lambda: fit(MultiLevelTraining(), StochasticWeightAveraging(swa_lrs=0.1)),
        "StochasticWeightAveraging averages weights of one size, and",
    ),
    call(
        "two methods that drop layers",
        lambda: fit(ProgressiveLayerDropping(), SensitivityLayerDropping()),
        "ProgressiveLayerDropping and SensitivityLayerDropping would both drop",
    ),
    call(
        "one method twice",
        lambda: fit(RandomLTD(), RandomLTD()),
        "Found more than one stateful callback of type `RandomLTD`. In the current",
        error=RuntimeError,
        raised_by="lightning",
        why=AT_THE_TRAINER,
    ),
    call(
        "all blocks pinned",
        lambda: fit(ProgressiveLayerDropping(pinned=range(4))),
        "ProgressiveLayerDropping needs at least two blocks that it may drop; of",
    ),
    call(
        "all blocks pinned for tokens",
        lambda: fit(RandomLTD(pinned=range(4))),
        "There is no layer to drop tokens in: of the 4 blocks of this gpt2 model 4",
    ),
    call(
        "a release as long as the run",
        lambda: fit(ProgressiveLayerDropping(direction="decreasing", release=10)),
        "release is 10 optimizer steps, but the run has 10: nothing would be",
    ),
    call(
        "dense steps that reach into a small level",
        lambda: fit(MultiLevelTraining(), Composition(dense_tail=0.9)),
        "dense_tail wants the whole model in steps from 1 on, and",
    ),
    value(
        "phases that leave steps over",
        lambda: fit(MultiLevelTraining(phases=[Phase(0, 1), Phase(1, 2), Phase(0, 2)])),
        "The phases are shorter than the run: phase 2 (level 0) would end at step",
    ),
    value(
        "a phase with no step",
        lambda: fit(MultiLevelTraining(phases=[Phase(0, 3), Phase(1, 7), Phase(0)])),
        "phase 2 (level 0) would have no optimizer step: it starts at step 10 of",
    ),
    value(
        "a length missing in the middle",
        lambda: fit(MultiLevelTraining(phases=[Phase(0), Phase(1, 2), Phase(0)])),
        "phase 0 (level 0): only the last phase may leave out its length.",
    ),
    value(
        "a negative learning-rate scale",
        lambda: fit(MultiLevelTraining(phases=[Phase(0, 2), Phase(1, 2, lr_scale=-1), Phase(0)])),
        "phase 1 (level 1): lr_scale is -1; it must be positive.",
    ),
    call(
        "an optimizer of unknown state",
        lambda: fit(MultiLevelTraining(), module=TinyModule(optimizer=torch.optim.Rprop)),
        "optimizer_state='project' can carry the state of Adam, AdamW, SGD, not of",
    ),
]


def unmasked():
    from lit_accel.data.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.mask_token = None
    tokenizer.save_pretrained("unmasked")
    return "unmasked"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_before_training(row, tmp_path, monkeypatch):
    run_call(row, tmp_path, monkeypatch)
