"""Where text comes from: files, the standard library, or a Hugging Face dataset; always as a stream of pieces."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

_MOST_WRONG = 0.01  # share of characters that may be broken in a file of text
_FEW_WRONG = 10  # so many may be in any file
PIECE_CHARACTERS = 1 << 20  # a piece of a long document; bounds the memory that reading and encoding need

KINDS = (
    '"stdlib" (the sources of the running Python\'s standard library), a path to a text file or to a folder of'
    ' text files, or "hf:NAME" (a Hugging Face dataset on the hub, or a folder written by Dataset.save_to_disk)'
)


class Piece(NamedTuple):
    """A stretch of text, and whether its document ends with it."""

    text: str
    ends_document: bool


class TextSource(Protocol):
    """A corpus that can be read from the start as often as needed, each time with the same result."""

    def fingerprint(self) -> str:
        """A string that changes when the text does; must not need to read all of it."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """All text, in a fixed order. Empty documents are left out."""
        ...


class FileSource:
    """Text files, each of them one document, read as UTF-8 with what is not UTF-8 replaced by U+FFFD.

    Args:
        root: Folder that the names in the fingerprint are relative to, so that a moved folder stays the same.
        paths: The files, in the order in which they are read.
    """

    def __init__(self, root: Path, paths: list[Path]) -> None:
        self.root = root
        self.paths = paths

    def fingerprint(self) -> str:
        """From names, sizes and times of change, as `make` does it; so a copy with new times counts as changed."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            stat = path.stat()
            # A name need not be text.
            digest.update(os.fsencode(path.relative_to(self.root)))
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def pieces(self) -> Iterator[Piece]:
        """Reads the files, at most `PIECE_CHARACTERS` characters at a time."""
        for path in self.paths:
            # newline="" keeps line ends as they are: the text must come back unchanged from its tokens.
            with path.open(encoding="utf-8", errors="replace", newline="") as file:
                text = file.read(PIECE_CHARACTERS)
                _require_text(path, text)
                while text:
                    following = file.read(PIECE_CHARACTERS)
                    yield Piece(text, ends_document=not following)
                    text = following


def _require_text(path: Path, text: str) -> None:
    """Refuse a file of which so much is no UTF-8 that it must be something else.

    Raises:
        ValueError: If it is.
    """
    # Of text in 16 bits every second byte is zero.
    num_wrong = text.count("\ufffd") + text.count("\0")
    if num_wrong > max(_FEW_WRONG, _MOST_WRONG * len(text)):
        raise ValueError(
            f"{path} is no text in UTF-8: {num_wrong / len(text):.0%} of its characters are not; convert it, for "
            "example with iconv -f LATIN1 -t UTF-8, or leave it out with file_pattern"
        )


class HuggingFaceSource:
    """One text column of a Hugging Face dataset, each row one document.

    Args:
        dataset: A `datasets.Dataset`.
        text_column: Name of the column.
    """

    def __init__(self, dataset: Any, text_column: str) -> None:
        if text_column not in dataset.column_names:
            raise ValueError(
                f"the dataset has no column {text_column!r}; set text_column to one of {dataset.column_names}"
            )
        if getattr(dataset.features[text_column], "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"the column {text_column!r} is {dataset.features[text_column]} and not text; set text_column to"
                f" another one of {dataset.column_names}"
            )
        self.dataset = dataset.select_columns([text_column])
        self.text_column = text_column

    def fingerprint(self) -> str:
        """The one that `datasets` keeps itself, from the data and every transform applied to it."""
        return f"{self.dataset._fingerprint}:{self.text_column}:{len(self.dataset)}"

    def pieces(self) -> Iterator[Piece]:
        """Reads the rows in order."""
        for batch in self.dataset.iter(batch_size=256):
            for text in filter(None, batch[self.text_column]):
                for start in range(0, len(text), PIECE_CHARACTERS):
                    end = start + PIECE_CHARACTERS
                    yield Piece(text[start:end], ends_document=end >= len(text))


def open_source(
    source: str,
    *,
    file_pattern: str = "*.txt",
    text_column: str = "text",
    dataset_config: str | None = None,
    split: str = "train",
) -> TextSource:
    """Finds the corpus that a name stands for.

    Args:
        source: "stdlib"; or "hf:NAME", where NAME is a folder written by `save_to_disk` if there is one, and a
            name on the hub otherwise; or a path to a text file or a folder. A folder called `stdlib` is "./stdlib".
        file_pattern: Which files of a folder to read, also in folders inside of it. Those whose names begin with a
            dot, or lie in a folder whose name does, are left out: they are of programs.
        text_column: Column of a dataset.
        dataset_config: Configuration of a dataset on the hub.
        split: Split of a dataset.

    Raises:
        ValueError: If it is none of these.
        ImportError: If it is a dataset and `datasets` is not installed.
    """
    if source == "stdlib":
        return _stdlib()
    if source.startswith("hf:"):
        return HuggingFaceSource(open_dataset(source.removeprefix("hf:"), dataset_config, split), text_column)
    path = Path(source).expanduser()
    if path.is_file():
        return FileSource(path.parent, [path])
    if not path.is_dir():
        raise ValueError(f"source={source!r} is no file or folder; it must be {KINDS}")
    if _is_saved_dataset(path):
        raise ValueError(f'source={source!r} was written by Dataset.save_to_disk; say so with source="hf:{source}"')
    try:
        # A pattern may go through any number of folders.
        deep = set(path.rglob(file_pattern)) if "**" in file_pattern else set()
        paths = sorted(
            found for found in visible_files(path) if found in deep or found.relative_to(path).match(file_pattern)
        )
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"file_pattern={file_pattern!r} is no pattern ({error}); set it to what the files are called, such as"
            ' "*.txt", or with folders inside of the source, such as "docs/*.md"'
        ) from error
    if not paths:
        raise ValueError(
            f"no file in source={source!r} matches file_pattern={file_pattern!r}; set file_pattern to what its files"
            ' are called, such as "*.md"'
        )
    return FileSource(path, paths)


def visible_files(root: Path) -> Iterator[Path]:
    """Yields the files of a folder and of those inside of it, linked ones too, but for hidden ones.

    Args:
        root: The folder.
    """
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        # A link may lead back to where it lies.
        if (real := os.path.realpath(folder)) in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _stdlib() -> FileSource:
    root = Path(sysconfig.get_path("stdlib"))
    # Tests hold files that are broken on purpose (odd encodings, syntax errors), and distributions differ in
    # whether they install them at all; without tests the corpus is nearly the same everywhere.
    excluded = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    paths = []
    for folder, folders, files in os.walk(root):
        # What is left out is not even looked into: tens of thousands of files may be installed there.
        folders[:] = [name for name in folders if name not in excluded]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return FileSource(root, sorted(path for path in paths if path.is_file()))


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def open_dataset(name: str, config: str | None, split: str) -> Any:
    """Opens a Hugging Face dataset.

    Args:
        name: A folder written by `save_to_disk` if there is one, and else a name on the hub.
        config: Configuration of a dataset on the hub, where it has several.
        split: One of its splits.

    Returns:
        A `datasets.Dataset`.

    Raises:
        ValueError: If the folder is of another kind, or there is no such split.
        ImportError: If `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'source="hf:{name}" needs the `datasets` package; install it with: pip install "lit-accel[hub]"'
        ) from error
    path = Path(name).expanduser()
    if not _is_saved_dataset(path):
        if path.is_dir():
            raise ValueError(
                f'source="hf:{name}" is a folder that Dataset.save_to_disk did not write;'
                f" for a folder of files leave out the prefix: source={name!r}"
            )
        try:
            return datasets.load_dataset(name, config, split=split)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f'source="hf:{name}" with dataset_config={config!r} and split={split!r} could not be opened: {reason};'
                " check its name on the hub, or give a folder written by Dataset.save_to_disk"
            ) from error
    try:
        dataset = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is a damaged dataset ({error}); save it again with Dataset.save_to_disk") from error
    if not isinstance(dataset, datasets.DatasetDict):
        if split != "train":
            raise ValueError(
                f'"hf:{name}" holds one dataset and no splits, so there is none that is {split!r}; leave the split out,'
                " or save a datasets.DatasetDict of several"
            )
        return dataset
    if split not in dataset:
        raise ValueError(f'"hf:{name}" has no split {split!r}; set split to one of {list(dataset)}')
    return dataset[split]
