"""Images that are not there, or are other than they should be."""

from __future__ import annotations

import gzip
import io
import struct

import numpy as np
import pytest
from PIL import Image

from tests.bad_input.harness import run_command
from tests.bad_input.rows import Command


def picture(mode="L", size=(8, 8), kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)).convert(mode).save(file, kind)
    return file.getvalue()


def idx(*shape, values=None):
    header = bytes((0, 0, 8, len(shape))) + b"".join(struct.pack(">I", each) for each in shape)
    number = int(np.prod(shape)) if values is None else values
    return header + bytes(index % 10 for index in range(number))


def mnist(**changed):
    files = {
        "idx/train-images-idx3-ubyte": idx(20, 8, 8),
        "idx/train-labels-idx1-ubyte": idx(20),
        "idx/t10k-images-idx3-ubyte": idx(10, 8, 8),
        "idx/t10k-labels-idx1-ubyte": idx(10),
    }
    return {**files, **{f"idx/{name.replace('_', '-')}-ubyte": content for name, content in changed.items()}}


def text(name, args, message, **kwargs):
    return Command(name, (args,) if isinstance(args, str) else tuple(args), message, **kwargs)


def image(name, args, message, **kwargs):
    return text(name, args, message, base="vit", **kwargs)


FASHION = ("--data.source=fashion_mnist", "--data.data_dir=idx")
ROWS = [
    image(
        "a folder of images that is not there",
        "--data.source=no_images",
        "source='no_images' is no folder; it must be \"digits\" (scikit-learn's 8 x 8",
    ),
    image(
        "a folder without classes",
        "--data.source=flat",
        "flat has no folders in it; images must lie in one folder for each class,",
        files={"flat/a.png": picture()},
    ),
    image(
        "classes without images",
        "--data.source=empty",
        "empty has no image in its folders; files called .jpg, .jpeg and .png are",
        files={"empty/cats/readme.txt": "", "empty/dogs/readme.txt": ""},
    ),
    image(
        "a single image",
        "--data.source=one",
        "the source has 1 image; it needs one to train on and one to hold out",
        files={"one/cats/a.png": picture()},
    ),
    image(
        "one class only",
        "--data.source=cats",
        "classification needs at least two. Give data of two classes or more",
        files={f"cats/cats/{i}.png": picture() for i in range(9)},
    ),
    image(
        "a train folder without a val folder",
        "--data.source=half",
        "half has a folder train of classes and no folder val; name the held-out",
        files={"half/train/cats/a.png": picture(), "half/train/dogs/b.png": picture()},
    ),
    image(
        "a class only in validation",
        "--data.source=odd",
        "folders of classes that the training part does not have: ['dogs']",
        files={"odd/train/cats/a.png": picture(), "odd/val/dogs/b.png": picture()},
    ),
    image(
        "an image that is none",
        "--data.source=bad",
        "bad/cats/5.png is no image that can be read (cannot identify image file",
        files={
            **{f"bad/cats/{i}.png": b"no image" for i in range(8)},
            **{f"bad/dogs/{i}.png": b"no image" for i in range(8)},
        },
    ),
    image(
        "an image that is none, read by another process",
        ("--data.source=bad", "--data.num_workers=1"),
        "bad/cats/5.png is no image that can be read (cannot identify image file",
        files={
            **{f"bad/cats/{i}.png": b"no image" for i in range(8)},
            **{f"bad/dogs/{i}.png": b"no image" for i in range(8)},
        },
    ),
    image(
        "an image that is cut off",
        "--data.source=cut",
        "cut/cats/5.png is no image that can be read (image file is truncated);",
        files={
            **{f"cut/cats/{i}.png": picture()[:45] for i in range(8)},
            **{f"cut/dogs/{i}.png": picture()[:45] for i in range(8)},
        },
    ),
    image(
        "no IDX folder",
        ("--data.source=fashion_mnist", "--data.data_dir=nowhere"),
        'source="fashion_mnist" needs a folder of IDX files, and there is no',
    ),
    image(
        "an IDX folder without files",
        FASHION,
        "idx has no train-images-idx3-ubyte, nor train-images-idx3-ubyte.gz; set",
        files={"idx/readme.txt": ""},
    ),
    image(
        "an IDX file that is missing",
        FASHION,
        "idx has no t10k-labels-idx1-ubyte, nor t10k-labels-idx1-ubyte.gz; set",
        files={k: v for k, v in mnist().items() if "t10k-labels" not in k},
    ),
    image(
        "an IDX file of another kind",
        FASHION,
        "idx/train-images-idx3-ubyte is no IDX file of unsigned bytes: it begins",
        files=mnist(train_images_idx3=b"not an IDX file at all"),
    ),
    image(
        "an IDX file that is cut off",
        FASHION,
        "idx/train-images-idx3-ubyte says that its shape is (20, 8, 8) and holds",
        files=mnist(train_images_idx3=idx(20, 8, 8, values=500)),
    ),
    image(
        "an IDX file with a short header",
        FASHION,
        "idx/train-images-idx3-ubyte ends within its header and holds 0 values",
        files=mnist(train_images_idx3=bytes((0, 0, 8, 3, 0, 0))),
    ),
    image(
        "an empty IDX file",
        FASHION,
        "idx/train-images-idx3-ubyte is empty; fetch the file again",
        files=mnist(train_images_idx3=b""),
    ),
    image(
        "labels that are not as many",
        FASHION,
        "images of shape (20, 8, 8) and labels of shape (19,) do not belong",
        files=mnist(train_labels_idx1=idx(19)),
    ),
    image(
        "a damaged .gz file",
        FASHION,
        "idx/train-images-idx3-ubyte.gz could not be read: Compressed file ended",
        files={
            **{k: v for k, v in mnist().items() if "train-images" not in k},
            "idx/train-images-idx3-ubyte.gz": gzip.compress(idx(20, 8, 8))[:-20],
        },
    ),
    image("images of no pixel", "--data.image_size=0", "image_size must be a whole number, at least 1 pixel, and is 0"),
    image("two channels", "--data.in_chans=2", "in_chans must be 1 (grey) or 3 (red, green and blue), and is 2"),
    image(
        "a crop larger than the image",
        "--data.crop_scale=[0.5, 1.5]",
        "crop_scale must be two shares of the image, in (0, 1], ascending, and is",
    ),
    image(
        "a crop the wrong way round",
        "--data.crop_scale=[0.9, 0.5]",
        "crop_scale must be two shares of the image, in (0, 1], ascending, and is",
    ),
    image("a probability above one", "--data.hflip=1.5", "hflip must be a probability, and is 1.5"),
    image(
        "a policy that is none",
        "--data.auto_augment=randm9",
        "auto_augment='randm9' is no policy of timm; write for example",
    ),
    image(
        "an interpolation that is none",
        "--data.interpolation=cubic",
        "interpolation must be one of ('nearest', 'bilinear', 'bicubic', 'box',",
    ),
    image(
        "a mean of another number of channels",
        "--data.mean=[0.5, 0.5, 0.5]",
        "mean must be None or 1 numbers (in_chans), and is (0.5, 0.5, 0.5)",
    ),
    image("a deviation of zero", "--data.std=[0.0]", "std must be positive, and is (0.0,)"),
    image(
        "a batch larger than all images",
        "--data.batch_size=5000",
        "the training part has 1438 samples, fewer than the 5000 x 1 (batch_size x",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_before_training(row, tmp_path, monkeypatch, capsys, cache):
    run_command(row, tmp_path, cache, monkeypatch, capsys)
