"""Where images come from: arrays that scikit-learn or IDX files hold, folders, or a Hugging Face dataset."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from lit_accel.data.idx import read_idx
from lit_accel.data.sources import open_dataset, visible_files
from lit_accel.draws import generator

KINDS = (
    '"digits" (scikit-learn\'s 8 x 8 handwritten digits), "fashion_mnist" (IDX files in data_dir), a path to a folder'
    ' of images, or "hf:NAME" (a Hugging Face dataset on the hub, or a folder written by Dataset.save_to_disk)'
)
FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
FASHION_FOLDERS = ("data/fashion-mnist", "/usr/share/datasets/fashion-mnist")  # ours, and that of Debian's package

_SPLIT = 4  # sets the draw of the held-out part apart from other draws


class LabelledImages(Protocol):
    """Images in a fixed order, each of one class."""

    class_names: list[str]

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """One image, of any mode and size, and the number of its class."""
        ...

    def fingerprint(self) -> str:
        """A string that changes when the images do; must not need to open all of them."""
        ...


@dataclass(frozen=True)
class ImagePart:
    """Some of a source's images.

    Attributes:
        images: The source.
        indices: Which of them, int64 of shape (num_images,).
    """

    images: LabelledImages
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[int(self.indices[index])]

    def fingerprint(self) -> str:
        """That of the source, and which images of it."""
        return _digest(self.images.fingerprint().encode(), self.indices.tobytes())


class ImageParts(NamedTuple):
    """What is trained on, and what is held out."""

    train: ImagePart
    val: ImagePart


class ArrayImages:
    """Grey images in memory.

    Args:
        pixels: uint8 of shape (num_images, height, width).
        labels: Integers of shape (num_images,).
        class_names: What they stand for.

    Raises:
        ValueError: If shapes and labels do not fit together.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, class_names: list[str]) -> None:
        if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
            raise ValueError(
                f"images of shape {pixels.shape} and labels of shape {labels.shape} do not belong together; they must"
                " have shapes (images, height, width) and (images,)"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
            raise ValueError(f"labels must lie in 0 to {len(class_names) - 1}, and reach {labels.max()}")
        self.pixels = pixels
        self.labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])

    def fingerprint(self) -> str:
        """From every pixel and label."""
        return _digest(self.pixels.tobytes(), self.labels.astype(np.int64).tobytes())


class FolderImages:
    """A folder of folders, one for each class.

    Args:
        root: The folder.
        class_names: The folders that are allowed, in the order of their numbers; None takes those that there are,
            sorted.

    Raises:
        ValueError: If there is no image, a class that is not allowed, or one of those that there are has no image.
    """

    def __init__(self, root: Path, class_names: list[str] | None = None) -> None:
        # Names with a dot are of programs: .ipynb_checkpoints, and the ._image.png that macOS writes.
        found = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not found:
            raise ValueError(
                f"{root} has no folders in it; images must lie in one folder for each class, as {root}/CLASS/image.jpg"
            )
        self.root = root
        self.class_names = found if class_names is None else class_names
        if unknown := sorted(set(found) - set(self.class_names)):
            raise ValueError(f"{root} has folders of classes that the training part does not have: {unknown[:5]}")
        names, labels = [], []
        for label, class_name in enumerate(self.class_names):
            for name in _image_names(root, class_name):
                names.append(name)
                labels.append(label)
        if not names:
            raise ValueError(
                f"{root} has no image in its folders; files called .jpg, .jpeg and .png are read, and others after"
                " timm.data.add_img_extensions"
            )
        if class_names is None and len(set(labels)) < len(found):
            empty = [name for label, name in enumerate(found) if label not in set(labels)]
            raise ValueError(
                f"{root} has folders without an image, each of which would be a class: {empty[:5]}; remove them, or"
                " give source= the folder whose folders are the classes"
            )
        # Arrays and not lists: counting references would make each worker process copy a list of a million names.
        self._names = np.array([os.fsencode(name) for name in names])
        self._labels = np.array(labels)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.root / os.fsdecode(bytes(self._names[index]))
        try:
            with Image.open(path) as image:
                image.load()
                return image, int(self._labels[index])
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} is no image that can be read ({error}); remove it, or save it again") from error

    def fingerprint(self) -> str:
        """From the names: looking at each of a million files takes minutes."""
        return _digest(self._names.tobytes(), self._labels.tobytes())


class DatasetImages:
    """Two columns of a Hugging Face dataset.

    Args:
        dataset: A `datasets.Dataset`.
        image_column: Name of the column of images.
        label_column: Name of the column of classes: a `ClassLabel`, or integers from 0.

    Raises:
        ValueError: If a column is missing or of another type.
    """

    def __init__(self, dataset: Any, image_column: str, label_column: str) -> None:
        import datasets

        for argument, column in (("image_column", image_column), ("label_column", label_column)):
            if column not in dataset.column_names:
                raise ValueError(
                    f"the dataset has no column {column!r}; set {argument} to one of {dataset.column_names}"
                )
        if not isinstance(dataset.features[image_column], datasets.Image):
            raise ValueError(
                f"the column {image_column!r} is {dataset.features[image_column]} and not an image; set image_column to"
                f" another one of {dataset.column_names}, or cast it with"
                f" dataset.cast_column({image_column!r}, datasets.Image())"
            )
        self.dataset = dataset.select_columns([image_column, label_column])
        self.image_column = image_column
        self.label_column = label_column
        self.class_names = _class_names(dataset, label_column)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.dataset[index]
        if row[self.image_column] is None:
            raise ValueError(
                f"row {index} has no image in the column {self.image_column!r}; leave such rows out with"
                f" dataset.filter(lambda row: row[{self.image_column!r}] is not None)"
            )
        return row[self.image_column], int(row[self.label_column])

    def fingerprint(self) -> str:
        """The one that `datasets` keeps itself, from the data and every transform applied to it."""
        return f"{self.dataset._fingerprint}:{self.image_column}:{self.label_column}:{len(self)}"


def open_images(
    source: str,
    *,
    data_dir: str | Path | None = None,
    image_column: str = "image",
    label_column: str = "label",
    dataset_config: str | None = None,
    split: str = "train",
    val_split: str | None = None,
    val_fraction: float = 0.2,
) -> ImageParts:
    """Finds the images that a name stands for.

    Args:
        source: "digits"; "fashion_mnist"; "hf:NAME", where NAME is a folder written by `save_to_disk` if there is
            one, and a name on the hub otherwise; or a path to a folder. A folder called `digits` is "./digits".
        data_dir: Folder of the IDX files of "fashion_mnist".
        image_column: Column of a dataset.
        label_column: Column of a dataset.
        dataset_config: Configuration of a dataset on the hub.
        split: Split of a dataset to train on.
        val_split: Split of a dataset that is held out; None holds out a share of `split`.
        val_fraction: Share of the images that is held out, where the source does not say which are. They are always
            the same ones.

    Raises:
        ValueError: If it is none of these, or its images cannot be used.
        ImportError: If it is a dataset and `datasets` is not installed.
    """
    if source == "digits":
        return _split(_digits(), val_fraction)
    if source == "fashion_mnist":
        return _fashion_mnist(data_dir)
    if source.startswith("hf:"):
        name = source.removeprefix("hf:")
        train = DatasetImages(open_dataset(name, dataset_config, split), image_column, label_column)
        if val_split is None:
            return _split(train, val_fraction)
        if val_split == split:
            raise ValueError(
                f"split and val_split are both {split!r}: what is trained on cannot be held out; name another one, or"
                " leave val_split out to hold out a share"
            )
        val = DatasetImages(open_dataset(name, dataset_config, val_split), image_column, label_column)
        if list(val.class_names) != list(train.class_names[: len(val.class_names)]):
            raise ValueError(f"split {val_split!r} has other classes than split {split!r}")
        return ImageParts(_all(train), _all(val))
    path = Path(source).expanduser()
    if not path.is_dir():
        raise ValueError(f"source={source!r} is no folder; it must be {KINDS}")
    return _folder(path, val_fraction)


def _digits() -> ArrayImages:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # they count 0 to 16
    return ArrayImages(pixels, digits.target, [str(digit) for digit in range(10)])


def _fashion_mnist(data_dir: str | Path | None) -> ImageParts:
    candidates = [Path(folder).expanduser() for folder in (FASHION_FOLDERS if data_dir is None else [data_dir])]
    folder = next((path for path in candidates if path.is_dir()), None)
    if folder is None:
        raise ValueError(
            f'source="fashion_mnist" needs a folder of IDX files, and there is no {" or ".join(map(str, candidates))};'
            f" set data_dir to a folder that holds {_idx_names()}, each also as .gz"
            " (Debian and Ubuntu: apt install dataset-fashion-mnist)"
        )

    def read(part: str) -> ImagePart:
        pixels, labels = (
            read_idx(_idx_file(folder, f"{part}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1")
        )
        return _all(ArrayImages(pixels, labels, FASHION_CLASSES))

    return ImageParts(read("train"), read("t10k"))


def _idx_names() -> str:
    return ", ".join(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"{folder} has no {name}, nor {name}.gz; set data_dir to a folder that holds {_idx_names()}")


def _folder(path: Path, val_fraction: float) -> ImageParts:
    train, val = path / "train", path / "val"
    if train.is_dir() and val.is_dir():
        images = FolderImages(train)
        return ImageParts(_all(images), _all(FolderImages(val, images.class_names)))
    if train.is_dir() and any(inside.is_dir() for inside in train.iterdir()):
        raise ValueError(
            f"{path} has a folder train of classes and no folder val; name the held-out part val, or give"
            f" source={str(train)!r} to hold out a share of it"
        )
    return _split(FolderImages(path), val_fraction)


def _all(images: LabelledImages) -> ImagePart:
    return ImagePart(images, np.arange(len(images)))


def _split(images: LabelledImages, val_fraction: float) -> ImageParts:
    """Holds out a share; always the same images, also with another seed, so that runs can be compared."""
    if len(images) < 2:
        raise ValueError(f"the source has {len(images)} image; it needs one to train on and one to hold out")
    num_held_out = min(len(images) - 1, max(1, round(val_fraction * len(images))))
    order = torch.randperm(len(images), generator=generator(_SPLIT)).numpy()
    return ImageParts(
        ImagePart(images, np.sort(order[num_held_out:])),
        ImagePart(images, np.sort(order[:num_held_out])),
    )


def _class_names(dataset: Any, label_column: str) -> list[str]:
    import datasets

    feature, labels = dataset.features[label_column], dataset.unique(label_column)
    if isinstance(feature, datasets.ClassLabel):
        if None in labels or min(labels) < 0:
            raise ValueError(
                f"the column {label_column!r} has images without a class ({None if None in labels else min(labels)}),"
                " as test splits do whose labels are kept back; choose another split, or leave them out with"
                f" dataset.filter(lambda row: row[{label_column!r}] >= 0)"
            )
        return list(feature.names)
    if not all(isinstance(label, int) for label in labels) or min(labels) < 0:
        raise ValueError(
            f"the column {label_column!r} holds {labels[:3]} and not classes, which are a ClassLabel or integers from"
            f" 0; convert it with dataset.class_encode_column({label_column!r}), or set label_column to another one"
        )
    return [str(label) for label in range(max(labels) + 1)]


def _image_names(root: Path, class_name: str) -> list[str]:
    """Paths of the images of a class, also in folders inside of it, relative to the root."""
    from timm.data import is_img_extension  # timm takes a second to import, and text needs none of it

    files = visible_files(root / class_name)
    return [str(file.relative_to(root)) for file in files if is_img_extension(file.suffix.lower())]


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
