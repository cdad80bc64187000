"""Text that is not there, or is other than it should be."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.bad_input.harness import run_command
from tests.bad_input.rows import Command


def picture(mode="L", size=(8, 8), kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)).convert(mode).save(file, kind)
    return file.getvalue()


def text(name, args, message, **kwargs):
    return Command(name, (args,) if isinstance(args, str) else tuple(args), message, **kwargs)


# A tokenizer of two words, without one for the end of a text.
ENDLESS = {
    "version": "1.0",
    "added_tokens": [],
    **dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")),
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}
ROWS = [
    text(
        "a text that is not there",
        "--data.source=no.txt",
        "source='no.txt' is no file or folder; it must be \"stdlib\" (the sources of",
    ),
    text(
        "a folder without texts",
        "--data.source=docs",
        "no file in source='docs' matches file_pattern='*.txt'; set file_pattern to",
        files={"docs/a.md": "hello"},
    ),
    text(
        "an empty text",
        "--data.source=empty.txt",
        "the source has no text in it; give files that are not empty",
        files={"empty.txt": ""},
    ),
    text(
        "a text of one letter",
        "--data.source=short.txt",
        "the training part has 0 windows of 8 tokens, fewer than the 2 x 1",
        files={"short.txt": "a"},
    ),
    text(
        "a text shorter than a batch",
        "--data.source=short.txt",
        "the training part has 1 windows of 8 tokens, fewer than the 2 x 1",
        files={"short.txt": "a short text"},
    ),
    text(
        "bytes that are no text",
        "--data.source=picture.txt",
        "picture.txt is no text in UTF-8: 44% of its characters are not; convert",
        files={"picture.txt": picture() * 20},
    ),
    text(
        "text in another encoding",
        "--data.source=wide.txt",
        "wide.txt is no text in UTF-8: 50% of its characters are not; convert it,",
        files={"wide.txt": ("hello world " * 200).encode("utf-16")},
    ),
    text(
        "text in Latin-1",
        "--data.source=latin.txt",
        "latin.txt is no text in UTF-8: 33% of its characters are not; convert it,",
        files={"latin.txt": ("déjà vu à côté " * 200).encode("latin-1")},
    ),
    text("nothing held out", "--data.val_fraction=0", "val_fraction must be a number between 0 and 1, and is 0.0"),
    text("all held out", "--data.val_fraction=1", "val_fraction must be a number between 0 and 1, and is 1.0"),
    text(
        "too little held out",
        "--data.val_fraction=0.001",
        "evaluation needs a window of 8 tokens for each of 1 processes and has 0;",
    ),
    text(
        "windows of one token",
        "--data.block_size=1",
        "block_size must be a whole number, at least 2, a token and the one that",
    ),
    text("no batch", "--data.batch_size=0", "batch_size must be a whole number, at least 1, and is 0"),
    text(
        "a batch larger than the data",
        "--data.batch_size=100000",
        "the training part has 213 windows of 8 tokens, fewer than the 100000 x 1",
    ),
    text(
        "a vocabulary smaller than the bytes",
        ("--data.tokenizer=bpe", "--data.vocab_size=100"),
        "vocab_size must be a whole number, at least 262, the bytes and the special",
    ),
    text(
        "a tokenizer that is not there",
        "--data.tokenizer=./no_tokenizer",
        'tokenizer=\'./no_tokenizer\' could not be loaded; it must be "bytes", "bpe",',
    ),
    text(
        "a tokenizer.json that is none",
        "--data.tokenizer=tokenizer.json",
        "tokenizer='tokenizer.json' is no tokenizer.json that the tokenizers",
        files={"tokenizer.json": "{}"},
    ),
    text(
        "a tokenizer that marks no end",
        "--data.tokenizer=tokenizer.json",
        "the tokenizer has neither an eos_token nor a sep_token to put between",
        files={"tokenizer.json": json.dumps(ENDLESS)},
    ),
    text(
        "masks of everything",
        "--data.mask_probability=1",
        "mask_probability must be a number between 0 and 1, and is 1.0",
        base="bert",
    ),
    text(
        "fewer than no workers",
        "--data.num_workers=-1",
        "num_workers must be at least 0, which loads in the training process",
    ),
    text("no byte", "--data.max_bytes=0", "max_bytes must be None or at least 2, and is 0"),
    text(
        "a dataset folder that datasets did not write",
        "--data.source=hf:docs",
        'source="hf:docs" is a folder that Dataset.save_to_disk did not write; for',
        files={"docs/a.txt": "hello"},
    ),
    text(
        "a dataset that is not there",
        "--data.source=hf:no/such-dataset",
        "source=\"hf:no/such-dataset\" with dataset_config=None and split='train'",
    ),
    text(
        "a pattern that matches nothing",
        ("--data.source=docs", "--data.file_pattern=*.rst"),
        "no file in source='docs' matches file_pattern='*.rst'; set file_pattern to",
        files={"docs/a.txt": "hello"},
    ),
    text(
        "a cache that is a file",
        "--data.cache_dir=taken",
        "cache_dir is taken, which is no folder; give another one",
        files={"taken": "a file"},
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_before_training(row, tmp_path, monkeypatch, capsys, cache):
    run_command(row, tmp_path, cache, monkeypatch, capsys)
