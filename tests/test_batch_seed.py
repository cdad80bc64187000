"""Dropout and stochastic depth are bitwise exact on resume with BatchSeed, and are not without."""

from __future__ import annotations

import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng

from lit_accel import BatchSeed, RandomLTD
from lit_accel.data import ImageDataModule, TextDataModule
from lit_accel.tasks import CausalLM, ImageClassification
from tests.training import TinyModule, loader, make_trainer

STEPS = 6


def text(folder):
    data = TextDataModule(max_bytes=40_000, tokenizer="bytes", block_size=16, batch_size=2, cache_dir=folder / "cache")
    overrides = {"n_layer": 3, "n_embd": 16, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.2}
    return CausalLM("gpt2", overrides=overrides, vocab_size=data.vocab_size), data


def vision(folder):
    data = ImageDataModule(source="digits", batch_size=4)
    kwargs = {"depth": 3, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "drop_path_rate": 0.5}
    return ImageClassification("vit_tiny_patch16_224", False, kwargs, 10, in_chans=3, image_size=data.image_size), data


def train(folder, make, seeds, *, saves=False, resume=None, **options):
    L.seed_everything(1, verbose=False)
    module, data = make(folder)
    callbacks = [*([BatchSeed(3)] if seeds else []), RandomLTD(start_tokens=2, quantum=1)]
    if saves:
        save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks.append(save)
    options = {"enable_checkpointing": saves, "limit_val_batches": 0, "max_epochs": -1, **options}
    trainer = make_trainer(folder, callbacks=callbacks, strategy="auto", max_steps=STEPS, **options)
    trainer.fit(module, data, ckpt_path=resume)
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("make", [text, vision])
@pytest.mark.parametrize("seeds", [True, False])
def test_resumes_bitwise(tmp_path, make, seeds):
    options = {"accumulate_grad_batches": 2}
    whole = train(tmp_path, make, seeds, saves=True, **options)
    # As after a restart of the process, where nobody has drawn what was drawn before.
    resumed = train(tmp_path, make, seeds, resume=tmp_path / "step=3.ckpt", **options)
    assert torch.equal(whole, resumed) is seeds


def test_draws_differ_between_batches_and_seeds(tmp_path):
    drawn = []

    class Draw(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))  # noqa: NPY002

    for seed in (0, 0, 1):
        trainer = make_trainer(tmp_path, callbacks=[BatchSeed(seed), Draw()], strategy="auto", max_steps=6)
        trainer.fit(TinyModule(), loader(num_samples=24))
    assert drawn[:6] == drawn[6:12]
    for values in zip(*drawn[6:], strict=True):
        assert len(set(values)) == 12


def test_by_default_the_seed_is_that_of_seed_everything(tmp_path):
    drawn = []

    class Draw(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            drawn.append(torch.rand(()).item())

    with isolate_rng(), pytest.MonkeyPatch.context() as patch:
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        for seed, given in ((None, None), (5, None), (6, None), (6, 5)):
            if seed is not None:
                L.seed_everything(seed, verbose=False)
            trainer = make_trainer(tmp_path, callbacks=[BatchSeed(given), Draw()], strategy="auto", max_steps=2)
            trainer.fit(TinyModule(), loader(num_samples=24))
    unseeded, five, six, given = (drawn[i : i + 2] for i in range(0, 8, 2))
    assert given == five
    assert len({*unseeded, *five, *six}) == 6


@pytest.mark.parametrize("seed", [1.5, True, "3"])
def test_refuses_what_is_no_seed(seed):
    with pytest.raises(ValueError, match="it is an integer"):
        BatchSeed(seed)


def test_ranks_that_share_their_data_draw_the_same(tmp_path):
    """As those of a tensor-parallel group do, of whom each computes a part of the same sequences."""

    def drawn(global_rank, data_rank):
        trainer = make_trainer(tmp_path, strategy="auto", max_steps=1)
        trainer.strategy.global_rank = global_rank
        trainer.strategy.distributed_sampler_kwargs = {"num_replicas": 2, "rank": data_rank}
        with isolate_rng():
            BatchSeed(3).on_train_batch_start(trainer, TinyModule(), None, 0)
            return torch.rand(()).item()

    first, beside, other = drawn(0, 0), drawn(1, 0), drawn(2, 1)
    assert first == beside != other
