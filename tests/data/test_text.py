"""The text data module as a user meets it: sources, tokenizers, windows, masks and errors."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer

from lit_accel.data import TextDataModule
from lit_accel.data.corpus import find_border
from lit_accel.data.masking import mask_tokens
from lit_accel.data.sources import open_source
from lit_accel.data.tokenizers import BYTES_VOCAB_SIZE, byte_tokenizer, train_bpe
from lit_accel.data.windows import EvaluationSampler, TokenWindows, TrainingSampler
from lit_accel.draws import generator

CORPUS = {"max_bytes": 60_000, "block_size": 16, "batch_size": 4}
PROSE = ["The quick brown fox.\r\n", "jumps over ünïcödé 🦊\n", "", "x" * 300, "and\tthe lazy dog\n"] * 8


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def prepared(cache, **arguments):
    data = TextDataModule(**{**CORPUS, "cache_dir": cache, **arguments})
    data.prepare_data()
    data.setup("fit")
    return data


def all_tokens(data, part):
    return np.concatenate([batch["input_ids"].flatten() for batch in getattr(data, f"{part}_dataloader")()])


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_standard_library_is_there_on_every_machine(cache, tokenizer):
    data = prepared(cache, tokenizer=tokenizer, vocab_size=400)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].max() < data.vocab_size == {"bytes": BYTES_VOCAB_SIZE, "bpe": 400}[tokenizer]


def test_windows_hold_the_text_and_nothing_else(tmp_path, cache):
    text = "".join(PROSE).encode()
    (tmp_path / "text.txt").write_bytes(text)
    data = prepared(cache, source=str(tmp_path / "text.txt"), tokenizer="bytes", val_fraction=0.2, batch_size=1)
    border = find_border(np.array([len(text)]), 0.2)
    cut = [text[i : i + 16] for i in range(0, border - 15, 16)]
    assert sorted(bytes(row.tolist()) for row in all_tokens(data, "train").reshape(-1, 16)) == sorted(cut)
    held_out = bytes(token for token in all_tokens(data, "val").tolist() if token < 256)
    assert text[border:].startswith(held_out)
    assert len(text) - border - len(held_out) < 16


def test_no_training_window_overlaps_the_held_out_text(tmp_path, cache):
    (tmp_path / "train.txt").write_text("a" * 5000)
    (tmp_path / "val.txt").write_text("b" * 500)
    data = prepared(cache, source=str(tmp_path), tokenizer="bytes", val_fraction=0.095)
    assert set(all_tokens(data, "train").tolist()) <= {ord("a"), 256}
    assert set(all_tokens(data, "val").tolist()) <= {ord("b"), 256}


@pytest.mark.parametrize("saved", [Dataset, DatasetDict])
def test_a_dataset_on_disk(tmp_path, cache, saved):
    dataset = Dataset.from_dict({"words": PROSE})
    (DatasetDict({"train": dataset}) if saved is DatasetDict else dataset).save_to_disk(tmp_path / "set")
    arguments = {"text_column": "words", "tokenizer": "bytes", "batch_size": 1}
    data = prepared(cache, source=f"hf:{tmp_path / 'set'}", **arguments)
    assert len(all_tokens(data, "train")) > 500


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_saved_tokenizer_is_used_as_it_is(tmp_path, cache, kind):
    trained = prepared(cache, tokenizer="bpe", vocab_size=400)
    trained.save_tokenizer(tmp_path)
    name = tmp_path if kind == "folder" else tmp_path / "tokenizer.json"
    data = prepared(cache, tokenizer=str(name))
    assert data.vocab_size == 400
    assert np.array_equal(all_tokens(data, "val"), all_tokens(trained, "val"))
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id is not None


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200))
def test_encoding_loses_nothing(text):
    for tokenizer in (byte_tokenizer(), BPE):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


BPE = train_bpe(PROSE, 300)


def test_the_cache_is_used_again_and_never_stale(tmp_path, cache):
    (tmp_path / "a.txt").write_text("one " * 400)
    first = prepared(cache, source=str(tmp_path), tokenizer="bytes")
    folder = first._folder
    written = (folder / "train.bin").stat().st_mtime_ns
    prepared(cache, source=str(tmp_path), tokenizer="bytes")
    assert (folder / "train.bin").stat().st_mtime_ns == written
    (tmp_path / "a.txt").write_text("two " * 401)
    assert prepared(cache, source=str(tmp_path), tokenizer="bytes")._folder != folder
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


@settings(max_examples=60, deadline=None)
@given(
    num_windows=st.integers(1, 80),
    batch_size=st.integers(1, 5),
    num_replicas=st.integers(1, 4),
    epoch=st.integers(0, 3),
    done=st.integers(0, 100),
    is_whole=st.booleans(),
)
def test_each_window_once_an_epoch_over_all_ranks(num_windows, batch_size, num_replicas, epoch, done, is_whole):
    windows = TokenWindows(None, "uint16", num_windows * 4, 4, None)  # type: ignore[arg-type]
    step = batch_size * num_replicas
    if num_windows < step:
        with pytest.raises(ValueError, match="fewer than"):
            TrainingSampler(windows, batch_size, num_replicas=num_replicas)
        return
    # After a resume with another batch size or number of processes it need not be a multiple of the step.
    done = min(done, num_windows // step) * step if is_whole else min(done, num_windows)

    def ranks(start):
        samplers = [
            TrainingSampler(
                windows, batch_size, num_replicas=num_replicas, rank=rank, start_epoch=epoch, start_sample=start
            )
            for rank in range(num_replicas)
        ]
        return [[key - epoch * num_windows for key in sampler] for sampler in samplers]

    whole = ranks(0)
    assert len({len(keys) for keys in whole}) == 1
    assert len(whole[0]) % batch_size == 0
    seen = [key for keys in whole for key in keys]
    assert len(seen) == len(set(seen)) == num_windows // step * step
    assert set(seen) <= set(range(num_windows))
    # Starting later is the rest of the same order, in whole steps.
    rest, order = ranks(done), [key for step_keys in zip(*whole, strict=True) for key in step_keys]
    assert {len(keys) for keys in rest} == {(num_windows - done) // step * batch_size}
    if is_whole:
        assert rest == [keys[done // num_replicas :] for keys in whole]
    later = [key for step_keys in zip(*rest, strict=True) for key in step_keys]
    common = max(0, min(len(order) - done, len(later)))
    assert later[:common] == order[done : done + common]
    assert not set(later) & set(order[:done])


@given(num_windows=st.integers(4, 60), num_replicas=st.integers(1, 4), wanted=st.integers(4, 80))
def test_evaluation_is_spread_evenly_and_disjoint(num_windows, num_replicas, wanted):
    windows = TokenWindows(None, "uint16", num_windows * 4, 4, None)  # type: ignore[arg-type]
    ranks = [
        list(EvaluationSampler(windows, num_replicas=num_replicas, rank=rank, max_windows=wanted))
        for rank in range(num_replicas)
    ]
    assert len({len(keys) for keys in ranks}) == 1
    seen = [key for keys in ranks for key in keys]
    assert len(seen) == len(set(seen)) == min(wanted, num_windows) // num_replicas * num_replicas


@given(
    ends=st.lists(st.integers(1, 1000), min_size=1, max_size=20).map(np.cumsum),
    fraction=st.floats(0.01, 0.9),
)
def test_the_border_is_between_documents_or_exact(ends, fraction):
    border = find_border(ends, fraction)
    tail = max(1, round(ends[-1] * fraction))
    assert border == ends[-1] - tail or border in ends
    assert tail / 2 <= ends[-1] - border <= tail


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 200), probability=st.floats(0.05, 0.9), seed=st.integers(0, 2**40))
def test_masking(length, probability, seed):
    ids = torch.arange(length) % 50 + 5
    ids[0] = 0  # special
    inputs, labels = mask_tokens(
        ids, generator(seed), mask_id=1, num_tokens=60, special_ids=torch.tensor([0, 1]), probability=probability
    )
    selected = labels != -100
    assert selected.sum() == max(1, round(probability * (length - 1)))
    assert not selected[0]
    assert torch.equal(labels[selected], ids[selected])
    assert torch.equal(inputs[~selected], ids[~selected])


def test_masks_follow_bert():
    ids = torch.full((100_000,), 7)
    inputs, labels = mask_tokens(
        ids, generator(0), mask_id=1, num_tokens=1000, special_ids=torch.tensor([0, 1]), probability=0.15
    )
    chosen = inputs[labels != -100]
    assert (chosen == 1).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (chosen == 7).float().mean() == pytest.approx(0.1, abs=0.02)


def test_masks_of_training_depend_on_seed_epoch_and_window_and_those_held_out_on_the_window_alone(cache):
    def read(epoch=0, **arguments):
        data = prepared(cache, objective="masked", tokenizer="bytes", max_bytes=20_000, **arguments)
        data.set_position(epoch)
        train = {tuple(ids.tolist()) for batch in data.train_dataloader() for ids in batch["input_ids"]}
        val = torch.cat([batch["labels"] for batch in data.val_dataloader()])
        return train, val

    train, val = read()
    assert (val != -100).any()
    for arguments in ({"batch_size": 2}, {"num_workers": 2}):
        other_train, other_val = read(**arguments)
        # Full batches of two fit at least as many windows as those of four.
        assert train <= other_train
        assert torch.equal(val, other_val)
    for arguments in ({"epoch": 1}, {"seed": 1}):
        other_train, other_val = read(**arguments)
        assert len(train & other_train) < 0.1 * len(train)
        # Held-out losses of runs that differ in their seed are measured on the same masks.
        assert torch.equal(val, other_val)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "nowhere"}, "must be .*stdlib"),
        ({"tokenizer": "tests"}, "could not be loaded"),
        ({"vocab_size": 10}, "at least 262"),
        ({"objective": "span"}, '"causal" or "masked"'),
        ({"val_fraction": 1.0}, "between 0 and 1"),
        ({"block_size": 1}, "at least 2"),
        ({"batch_size": 0}, "at least 1"),
        ({"block_size": 50_000, "tokenizer": "bytes"}, "lower block_size or batch_size"),
    ],
)
def test_errors_teach(cache, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        prepared(cache, **arguments).train_dataloader()


def test_setup_before_prepare_data(tmp_path):
    with pytest.raises(RuntimeError, match="prepare_data"):
        TextDataModule(**CORPUS, cache_dir=tmp_path).setup("fit")


def test_a_folder_without_matching_files(tmp_path, cache):
    with pytest.raises(ValueError, match="file_pattern"):
        prepared(cache, source=str(tmp_path))


def test_another_end_of_text_is_another_corpus(tmp_path, cache):
    (tmp_path / "a.txt").write_text("one " * 400)
    folders = []
    for end_of_text in ("<|endoftext|>", "<|sep|>"):
        tokenizer = byte_tokenizer()
        tokenizer.eos_token = end_of_text
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        data = prepared(cache, source=str(tmp_path), tokenizer=str(tmp_path / "tokenizer"))
        folders.append(data._folder)
        written = np.concatenate([np.fromfile(data._folder / f"{part}.bin", "<u2") for part in ("train", "val")])
        assert (written == tokenizer.eos_token_id).sum() == 2  # the border is in the only document
    assert folders[0] != folders[1]


def test_ids_with_gaps(tmp_path, cache):
    """Of a vocabulary from which tokens were taken out, the largest id is more than there are tokens."""
    (tmp_path / "a.txt").write_text("hello world " * 400)
    words = Tokenizer(models.WordLevel({"hello": 0, "world": 70_000, "<eos>": 2}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    data = prepared(cache, source=str(tmp_path), tokenizer=str(tmp_path / "tokenizer.json"), block_size=16)
    assert data.vocab_size == 70_001
    ids = torch.cat([batch["input_ids"].flatten() for batch in data.train_dataloader()])
    assert {0, 70_000} <= set(ids.tolist()) <= {0, 2, 70_000}


def test_file_names_need_not_be_text(tmp_path, cache):
    for name in (b"\xff.txt", b"b.txt"):
        (tmp_path / os.fsdecode(name)).write_text("one " * 400)
    prepared(cache, source=str(tmp_path), tokenizer="bytes")


def test_a_column_of_numbers(tmp_path, cache):
    Dataset.from_dict({"text": [1, 2]}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="not text; set text_column"):
        prepared(cache, source=f"hf:{tmp_path / 'set'}")


def test_a_missing_column(tmp_path, cache):
    Dataset.from_dict({"words": PROSE}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"text_column to one of \['words'\]"):
        prepared(cache, source=f"hf:{tmp_path / 'set'}")


def test_a_dataset_without_splits_has_none_to_choose(tmp_path, cache):
    """Whatever was asked for, all of it would be read."""
    Dataset.from_dict({"text": ["some text " * 20] * 40}).save_to_disk(tmp_path / "set")
    source = f"hf:{tmp_path / 'set'}"
    with pytest.raises(ValueError, match=r"holds one dataset and no splits.*'train\[:10%\]'"):
        prepared(cache, source=source, split="train[:10%]")
    prepared(cache, source=source)


def test_hidden_files_are_not_read_and_linked_ones_are(tmp_path, cache):
    root, elsewhere = tmp_path / "notes", tmp_path / "elsewhere"
    for folder, letter in ((root, "a"), (root / ".ipynb_checkpoints", "b"), (root / "inside" / ".git", "c")):
        folder.mkdir(parents=True)
        (folder / "text.txt").write_text(letter * 3000)
    (root / ".hidden.txt").write_text("d" * 3000)
    elsewhere.mkdir()
    (elsewhere / "text.txt").write_text("e" * 3000)
    (root / "linked").symlink_to(elsewhere)
    (root / "inside" / "back").symlink_to(root)
    source = open_source(str(root))
    assert [piece.text[0] for piece in source.pieces()] == ["e", "a"]
    assert prepared(cache, source=str(root)).vocab_size


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.txt", ["a.txt", "docs/b.txt", "docs/deep/c.txt"]),
        ("docs/*.txt", ["docs/b.txt"]),
        ("**/*.txt", ["a.txt", "docs/b.txt", "docs/deep/c.txt"]),
        ("docs/**/*.txt", ["docs/b.txt", "docs/deep/c.txt"]),
    ],
)
def test_patterns_of_files_are_those_of_paths(pattern, found, tmp_path):
    for name in ("a.txt", "docs/b.txt", "docs/deep/c.txt", "docs/other.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [str(path.relative_to(tmp_path)) for path in open_source(str(tmp_path), file_pattern=pattern).paths] == found


@pytest.mark.parametrize("pattern", ["", "/abs/*.txt", "/abs/**/*.txt"])
def test_patterns_that_are_none_say_so(pattern, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"is no pattern|set file_pattern to what"):
        open_source(str(tmp_path), file_pattern=pattern)


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "qwen2"])
def test_a_folder_of_a_model_has_no_tokenizer(model_type, tmp_path, cache):
    """transformers makes an empty one of its configuration, with which a text has no tokens and a run no loss."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"special tokens and no others.*tokenizer\.save_pretrained"):
        prepared(cache, tokenizer=str(tmp_path / "model"))
