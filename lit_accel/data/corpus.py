"""Token files: a corpus encoded once, kept on disk, and memory-mapped from then on.

A corpus is a folder named after a fingerprint of everything it depends on:

    <cache_dir>/<fingerprint>/train.bin, val.bin    token ids, uint16 or uint32, one after the other
                             /tokenizer/            readable by transformers.AutoTokenizer
                             /corpus.json           counts and types; see `Corpus`

So a changed setting or a changed text finds another folder, and never a stale one. It is built under another name
and renamed when complete: of two processes that build the same corpus, the second throws its own away.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from lit_accel.data.sources import Piece, TextSource
from lit_accel.data.tokenizers import (
    Encoder,
    byte_tokenizer,
    encoder,
    end_of_text_id,
    load_tokenizer,
    num_ids,
    train_bpe,
)

VERSION = 1  # of the files; raise it when the same settings give other tokens
_BATCH_BYTES = 4 << 20  # text encoded at a time


@dataclass(frozen=True)
class Corpus:
    """What `corpus.json` says.

    Attributes:
        version: Version of the format.
        dtype: Type of the ids, "uint16" or "uint32".
        num_train_tokens: Tokens in train.bin.
        num_val_tokens: Tokens in val.bin.
        num_bytes: UTF-8 bytes of the text.
        tokens_fingerprint: Hash of both files, to recognise the same tokens wherever they were made.
    """

    version: int
    dtype: str
    num_train_tokens: int
    num_val_tokens: int
    num_bytes: int
    tokens_fingerprint: str


@dataclass(frozen=True)
class CorpusSettings:
    """What the tokens are made from.

    Attributes:
        tokenizer: "bytes", "bpe", or the name of a saved tokenizer.
        vocab_size: Size of the "bpe" tokenizer; not used by others.
        val_fraction: Share of the bytes, at the end of the text, that is held out.
        max_bytes: Use only so many bytes from the start of the text; None is all.
    """

    tokenizer: str
    vocab_size: int
    val_fraction: float
    max_bytes: int | None


def corpus_folder(cache_dir: Path, source: TextSource, settings: CorpusSettings) -> Path:
    """The folder in which the corpus lies, or will."""
    facts = {"version": VERSION, "source": source.fingerprint(), **asdict(settings)}
    if settings.tokenizer != "bpe":
        del facts["vocab_size"]
    if settings.tokenizer not in ("bytes", "bpe"):
        # Its content and not its name, which may come to stand for something else.
        tokenizer = load_tokenizer(settings.tokenizer)
        facts["tokenizer"] = tokenizer.backend_tokenizer.to_str()
        facts["end_of_text"] = end_of_text_id(tokenizer)
    return cache_dir / hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()


def load_corpus(folder: Path) -> Corpus | None:
    """Reads `corpus.json`; None if there is no such corpus.

    Raises:
        ValueError: If the corpus is damaged, or its cache is no folder.
    """
    try:
        corpus = Corpus(**json.loads((folder / "corpus.json").read_text()))
        size = np.dtype(corpus.dtype).itemsize
        is_whole = (folder / "tokenizer" / "tokenizer.json").is_file() and all(
            (folder / f"{part}.bin").stat().st_size == num_tokens * size
            for part, num_tokens in (("train", corpus.num_train_tokens), ("val", corpus.num_val_tokens))
        )
    except FileNotFoundError:
        is_missing = not (folder / "corpus.json").exists()
        if is_missing:
            return None
        is_whole = False
    except NotADirectoryError as error:
        raise ValueError(f"cache_dir is {folder.parent}, which is no folder; give another one") from error
    except (ValueError, TypeError):
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"the token files in {folder}, or the tokenizer beside them, are damaged; remove that folder, and they will"
            " be made again"
        )
    return corpus


def build_corpus(folder: Path, source: TextSource, settings: CorpusSettings) -> None:
    """Encodes a corpus into `folder`, unless it is there already.

    Reads the text two times, or three where a tokenizer is trained. Memory does not grow with the text, except that
    training a BPE counts the different words.

    Args:
        folder: Where to; see `corpus_folder`.
        source: The text.
        settings: What to do with it.

    Raises:
        ValueError: If there is no text.
    """
    if load_corpus(folder) is not None:
        return
    unfinished = folder.parent / f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}"
    unfinished.mkdir(parents=True)
    try:
        _write_corpus(unfinished, source, settings)
        try:
            unfinished.rename(folder)
        except OSError:
            if load_corpus(folder) is None:  # else another process was faster, and has the same
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_corpus(folder: Path, source: TextSource, settings: CorpusSettings) -> None:
    def read(description: str, total: int | None = None) -> Iterator[Piece]:
        pieces = source.pieces()
        return _with_progress(_first(pieces, settings.max_bytes), description, total)

    document_ends = _document_ends(read("Reading the text"))
    if len(document_ends) == 0:
        raise ValueError("the source has no text in it; give files that are not empty")
    num_bytes = int(document_ends[-1])
    border = find_border(document_ends, settings.val_fraction)

    if settings.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
    elif settings.tokenizer == "bpe":
        # On the training part only: merges chosen with the held-out text in view would make its loss too good.
        texts = (piece.text for piece in _first(read("Training the tokenizer", border), border))
        tokenizer = train_bpe(texts, settings.vocab_size)
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")

    dtype = "uint16" if num_ids(tokenizer) <= 1 << 16 else "uint32"
    encode = encoder(tokenizer, raw_bytes=settings.tokenizer == "bytes")
    digest = hashlib.blake2b(digest_size=16)
    pieces = split(read("Encoding", num_bytes), border)
    counts = {"train": 0, "val": 0}
    with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
        files: dict[str, BinaryIO] = {"train": train, "val": val}
        for part, batch in _batches(pieces):
            tokens = _encode(batch, encode, end_of_text_id(tokenizer)).astype(dtype)
            files[part].write(tokens.tobytes())
            digest.update(tokens.astype("<u4").tobytes())
            counts[part] += len(tokens)
    digest.update(str(counts).encode())
    corpus = Corpus(VERSION, dtype, counts["train"], counts["val"], num_bytes, digest.hexdigest())
    (folder / "corpus.json").write_text(json.dumps(asdict(corpus), indent=2) + "\n")


def find_border(document_ends: np.ndarray, val_fraction: float) -> int:
    """Chooses the byte at which the held-out part begins.

    It is the first border between documents in the tail if that leaves at least half of the tail, and otherwise
    (as always in a text of one document) the exact byte.

    Args:
        document_ends: Bytes up to the end of each document, int64 of shape (num_documents,), increasing.
        val_fraction: Share of the bytes to hold out, in (0, 1).
    """
    num_bytes = int(document_ends[-1])
    exact = num_bytes - max(1, round(num_bytes * val_fraction))
    between = int(document_ends[np.searchsorted(document_ends, exact)])
    return between if (num_bytes - between) * 2 >= num_bytes - exact else exact


def split(pieces: Iterable[Piece], border: int) -> Iterator[tuple[str, Piece]]:
    """Tells of each piece whether it is for training ("train") or held out ("val"), cutting one if need be."""
    for piece in pieces:
        head, tail, border = _cut(piece.text, border)
        if head:
            yield "train", Piece(head, piece.ends_document or bool(tail))
        if tail:
            yield "val", Piece(tail, piece.ends_document)


def _first(pieces: Iterable[Piece], num_bytes: int | None) -> Iterator[Piece]:
    """The first so many bytes of a text, less what would be a part of a character."""
    if num_bytes is None:
        yield from pieces
        return
    for part, piece in split(pieces, num_bytes):
        if part == "val":
            return
        yield piece


def _cut(text: str, num_bytes: int) -> tuple[str, str, int]:
    """Cuts a text after so many UTF-8 bytes, or before the character there; and counts the bytes left."""
    data = text.encode()
    if len(data) <= num_bytes:
        return text, "", num_bytes - len(data)
    head = data[:num_bytes].decode(errors="ignore")
    return head, text[len(head) :], 0


def _document_ends(pieces: Iterable[Piece]) -> np.ndarray:
    ends, position = [], 0
    for piece in pieces:
        position += len(piece.text.encode())
        if piece.ends_document:
            ends.append(position)
    if ends[-1:] != [position] and position > 0:  # max_bytes can end the text between two pieces of a document
        ends.append(position)
    return np.array(ends, dtype=np.int64)


def _batches(pieces: Iterable[tuple[str, Piece]]) -> Iterator[tuple[str, list[Piece]]]:
    """Groups pieces of the same part, enough to keep the tokenizer's threads busy and no more."""
    batch: list[Piece] = []
    part, size = "train", 0
    for piece_part, piece in pieces:
        if batch and (piece_part != part or size >= _BATCH_BYTES):
            yield part, batch
            batch, size = [], 0
        batch.append(piece)
        part, size = piece_part, size + len(piece.text)
    if batch:
        yield part, batch


def _encode(batch: list[Piece], encode: Encoder, end_id: int) -> np.ndarray:
    end = np.array([end_id], dtype=np.uint32)
    parts: list[Any] = []
    for piece, ids in zip(batch, encode([piece.text for piece in batch]), strict=True):
        parts += [ids, end] if piece.ends_document else [ids]
    return np.concatenate(parts)


def _with_progress(pieces: Iterable[Piece], description: str, total: int | None) -> Iterator[Piece]:
    """Shows on a terminal how many bytes have gone by."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        for piece in pieces:
            yield piece
            progress.advance(task, len(piece.text.encode()))
