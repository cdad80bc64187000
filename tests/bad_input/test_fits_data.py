"""Data, plans and files in Python that cannot work: refused before any training step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_accel import (
    RandomLTD,
)
from lit_accel.anatomy import AnatomyError
from lit_accel.data import ImageDataModule, TextDataModule
from lit_accel.planning import plan
from lit_accel.tasks import CausalLM, ImageClassification, MaskedLM
from tests.bad_input.harness import TEXT, run_call
from tests.bad_input.rows import Call
from tests.training import TinyModule, loader, make_trainer

GPT = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16}
VIT = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()


def fit(*callbacks, module=None, data=None, **kwargs):
    """Fit a small module with callbacks."""
    trainer = make_trainer(Path.cwd(), callbacks=callbacks, **{"max_steps": 10, **kwargs})
    trainer.fit(module or TinyModule(), loader() if data is None else data)


def text(**kwargs):
    Path("text.txt").write_text(TEXT)
    return TextDataModule("text.txt", **{"tokenizer": "bytes", "block_size": 8, "batch_size": 2, **kwargs})


def images(**kwargs):
    return ImageDataModule(**{"image_size": 8, "in_chans": 1, "batch_size": 2, **kwargs})


def gpt(**kwargs):
    return CausalLM("gpt2", **{"overrides": GPT, "vocab_size": 262, **kwargs})


def vit(**kwargs):
    given = {"model_kwargs": VIT, "num_classes": 10, "in_chans": 1, "image_size": 8, **kwargs}
    return ImageClassification("deit_tiny_patch16_224", **given)


def batches(*tensors):
    return DataLoader(TensorDataset(*tensors), batch_size=2)


def dictionaries(**values):
    return DataLoader([dict(values) for _ in range(4)], batch_size=2)


def resumed(content):
    Path("bad.bin").write_bytes(content)
    make_trainer(Path.cwd(), callbacks=[RandomLTD()], max_steps=10).fit(TinyModule(), loader(), ckpt_path="bad.bin")


def call(name, make, message, error=MisconfigurationException, **kwargs):
    return Call(name, make, message, error=error, **kwargs)


anatomy = partial(call, error=AnatomyError)
value = partial(call, error=ValueError)
kind = partial(call, error=TypeError)

ROWS = [
    # Data
    value(
        "more tokens than rows",
        lambda: fit(module=gpt(vocab_size=100), data=text()),
        "The vocabulary of TextDataModule has 262 tokens, and the model's embedding",
    ),
    value(
        "texts longer than positions",
        lambda: fit(module=gpt(), data=text(block_size=32)),
        "The texts of TextDataModule have 32 tokens (block_size), and the model has",
    ),
    value(
        "a causal model of masked text",
        lambda: fit(module=gpt(), data=text(objective="masked")),
        'CausalLM needs data with objective="causal", and that of TextDataModule is',
    ),
    value(
        "images for a language model",
        lambda: fit(module=gpt(), data=images()),
        "CausalLM learns from text, and ImageDataModule has images of classes. Give",
    ),
    value(
        "text for a classifier",
        lambda: fit(module=vit(), data=text()),
        "ImageClassification learns from images of classes, and TextDataModule has",
    ),
    value(
        "more classes than outputs",
        lambda: fit(module=vit(num_classes=5), data=images()),
        "The images of ImageDataModule are of 10 classes, and the model has 5",
    ),
    value(
        "images of another size",
        lambda: fit(module=vit(image_size=16), data=images()),
        "The images of ImageDataModule are 8 pixels a side (image_size), and the",
    ),
    value(
        "images of other channels",
        lambda: fit(module=vit(in_chans=3), data=images()),
        "The images of ImageDataModule have 1 channels (in_chans), and the model",
    ),
    value(
        "odd batches of a mixture",
        lambda: fit(module=vit(mixup=0.5), data=images(batch_size=3)),
        "mixup and cutmix blend images by twos, and the batch_size of",
    ),
    kind(
        "batches that are pairs",
        lambda: fit(module=gpt(), data=batches(torch.ones(4, 8).long(), torch.ones(4, 8).long())),
        "CausalLM wants batches that are mappings with input_ids and labels, and",
    ),
    kind(
        "batches without labels",
        lambda: fit(module=gpt(), data=dictionaries(input_ids=torch.ones(8).long())),
        "CausalLM wants batches that are mappings with input_ids and labels, and",
    ),
    kind(
        "tokens that are fractions",
        lambda: fit(module=gpt(), data=dictionaries(input_ids=torch.ones(8), labels=torch.ones(8).long())),
        "input_ids of a batch are whole numbers of shape (batch, tokens), and",
    ),
    kind(
        "tokens without a batch",
        lambda: fit(module=gpt(), data=dictionaries(input_ids=1, labels=1)),
        "input_ids of a batch are whole numbers of shape (batch, tokens), and",
    ),
    kind(
        "images without classes",
        lambda: fit(module=vit(), data=batches(torch.ones(4, 1, 8, 8))),
        "ImageClassification wants batches of two tensors, images of shape (batch,",
    ),
    kind(
        "images without channels",
        lambda: fit(module=vit(), data=batches(torch.ones(4, 8, 8), torch.ones(4).long())),
        "ImageClassification wants batches of two tensors, images of shape (batch,",
    ),
    value(
        "a masked objective without a mask token",
        lambda: fit(
            module=MaskedLM("bert", overrides={"num_hidden_layers": 1}),
            data=text(tokenizer=unmasked(), objective="masked"),
        ),
        'objective="masked" needs a tokenizer with a mask token, and',
    ),
    call(
        "an endless warm-up of what ends nowhere",
        lambda: fit(module=scheduled(), data=text(), max_steps=-1, max_epochs=-1),
        "WarmupDecay must know how long the run is. Give the Trainer max_steps, or",
    ),
    # Plans
    value(
        "a plan of no sequences",
        lambda: plan(make_trainer(Path.cwd(), max_steps=4), TinyModule(), loader(), num_sequences=0),
        "num_sequences is 0; it is a whole number, at least 1.",
    ),
    value(
        "a plan of half a token",
        lambda: plan(make_trainer(Path.cwd(), max_steps=4), TinyModule(), loader(), num_tokens=0.5),
        "num_tokens is 0.5; it is a whole number, at least 1.",
    ),
    call(
        "a plan of too many tokens",
        lambda: plan(make_trainer(Path.cwd(), max_steps=4), TinyModule(), loader(), num_sequences=1, num_tokens=999),
        "num_tokens is 999, and this gpt2 model has positions for 32 tokens. Give",
    ),
    call(
        "a plan without an end",
        lambda: plan(make_trainer(Path.cwd(), max_steps=-1, max_epochs=-1), TinyModule(), loader()),
        "A plan must know how long the run is. Give the Trainer max_steps, or",
    ),
    # Files
    value(
        "a damaged cache of tokens",
        lambda: damaged("train.bin", b"short"),
        "are damaged; remove that folder, and they will be made again",
    ),
    value(
        "a cache with a broken record",
        lambda: damaged("corpus.json", b"{"),
        "are damaged; remove that folder, and they will be made again",
    ),
    value(
        "a cache that has lost its tokens",
        lambda: damaged("val.bin", None),
        "are damaged; remove that folder, and they will be made again",
    ),
    value(
        "a cache that has lost its tokenizer",
        lambda: damaged("tokenizer/tokenizer.json", None),
        "are damaged; remove that folder, and they will be made again",
    ),
    call(
        "a checkpoint that is none",
        lambda: resumed(b"not a checkpoint at all"),
        "bad.bin is cut short, or no checkpoint: 23 bytes that are no whole file of",
    ),
    call(
        "an empty checkpoint",
        lambda: resumed(b""),
        "bad.bin is cut short, or no checkpoint: 0 bytes that are no whole file of",
    ),
]


def scheduled():
    from lit_accel.tasks import WarmupDecay

    return gpt(lr_scheduler=partial(WarmupDecay, num_warmup_steps=0.1))


def unmasked():
    from lit_accel.data.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.mask_token = None
    tokenizer.save_pretrained("unmasked")
    return "unmasked"


def damaged(name, content):
    """Read a cache of tokens of which a file was changed."""
    data = text(cache_dir="cache")
    data.prepare_data()
    (file,) = Path("cache").rglob(name)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    again = TextDataModule("text.txt", tokenizer="bytes", block_size=8, batch_size=2, cache_dir="cache")
    fit(module=gpt(), data=again)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_before_training(row, tmp_path, monkeypatch):
    run_call(row, tmp_path, monkeypatch)
