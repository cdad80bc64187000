"""The image data module as a user meets it: sources, augmentation, resuming and errors."""

from __future__ import annotations

import gzip
import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from lit_accel.data import ImageDataModule
from lit_accel.data.augmentation import eight_bits
from lit_accel.data.idx import read_idx
from lit_accel.global_draws import seeded_globals
from tests.data.saving import SaveAlways
from tests.training import make_trainer

AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "hflip": 0.5, "image_size": 8, "crop_pct": 0.9}
STRONG = {**AUGMENTED, "batch_size": 8}


def prepared(**arguments):
    data = ImageDataModule(**arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def draw(*_):
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def write_images(folder, num_images=3, size=(7, 5)):
    """Writes images that all differ, and returns the folder."""
    folder.mkdir(parents=True)
    for i in range(num_images):
        Image.new("RGB", size, (i * 20, 100, 200)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_digits_are_there_on_every_machine(in_chans):
    data = prepared(in_chans=in_chans)
    images, targets = batch = next(iter(data.train_dataloader()))
    assert type(batch) is tuple
    assert images.shape == (64, in_chans, 32, 32) and images.dtype == torch.float32
    assert targets.dtype == torch.int64 and set(targets.tolist()) <= set(range(10))
    assert data.num_classes == 10
    assert sum(len(targets) for _, targets in data.val_dataloader()) == 359


def test_pixels_become_what_mean_and_std_say():
    data = prepared(image_size=8, in_chans=1, mean=(0.25,), std=(2.0,), val_fraction=0.01)
    images, _ = next(iter(data.val_dataloader()))
    part = data._parts.val
    pixels = torch.stack([torch.from_numpy(np.array(part[i][0])) for i in range(len(part))])
    assert torch.allclose(images[:, 0], (pixels / 255 - 0.25) / 2)


def test_training_and_held_out_images_are_disjoint_and_the_same_for_every_seed():
    first, second = prepared(seed=0)._parts, prepared(seed=1)._parts
    assert not set(first.train.indices) & set(first.val.indices)
    assert len(first.train) + len(first.val) == 1797
    assert np.array_equal(first.val.indices, second.val.indices)


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    def read(epoch=0, **arguments):
        data = prepared(**{**STRONG, "source": "digits", "val_fraction": 0.9, **arguments})
        data.set_position(epoch)
        train = {image.numpy().tobytes() for images, _ in data.train_dataloader() for image in images}
        return train, torch.cat([images for images, _ in data.val_dataloader()][:3])

    train, val = read()
    assert read()[0] == train
    for arguments in ({"batch_size": 4}, {"num_workers": 2}):
        other_train, other_val = read(**arguments)
        # Full batches of four fit at least as many images as those of eight.
        assert train <= other_train
        assert torch.equal(val, other_val[: len(val)]) or arguments == {"batch_size": 4}
    next_train, next_val = read(epoch=1)
    assert len(train & next_train) < 0.1 * len(train)
    assert torch.equal(val, next_val)
    assert len(train & read(seed=1)[0]) < 0.1 * len(train)


def test_the_global_generators_are_left_alone():
    data = prepared(**STRONG)
    before = global_states()
    images = [image for image, _ in map(data.dataset("train").__getitem__, range(20))]
    assert global_states() == before
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    again = [image for image, _ in map(data.dataset("train").__getitem__, range(20))]
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))


def test_global_draws_are_put_back_after_an_error_too():
    before = global_states()
    with pytest.raises(ZeroDivisionError), seeded_globals(1, 2):
        draw(1 / 0)
    assert global_states() == before


def test_the_same_keys_draw_the_same():
    draws = []
    for keys in ((1, 2), (1, 2), (2, 1)):
        with seeded_globals(*keys):
            draws.append(draw())
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])


class Recorder(L.LightningModule):
    """Remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[bytes] = []

    def training_step(self, batch, batch_idx):
        images, targets = batch
        self.seen.append(images.numpy().tobytes() + targets.numpy().tobytes())
        return self.layer(images.view(-1, 1)).mean() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder, *, checkpoint=None, callbacks=(), data=None, **kwargs):
    module = Recorder()
    # Seven batches of eight images an epoch: accumulation over three does not divide it.
    data = data or ImageDataModule(**STRONG, val_fraction=1 - 60 / 1797)
    trainer = make_trainer(folder, callbacks=callbacks, strategy="auto", limit_val_batches=0, **kwargs)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module.seen


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_steps": 4, "max_epochs": -1}], ids=["epochs", "steps"])
def test_training_goes_on_with_exactly_the_next_batch(tmp_path, accumulate, length):
    length = {**length, "max_steps": 11} if accumulate == 1 and "max_steps" in length else length
    settings = {"accumulate_grad_batches": accumulate, **length}
    saver = SaveAlways(tmp_path)
    seen = run(tmp_path, callbacks=[saver], **settings)
    assert len(set(seen)) == len(seen)
    telling = {path: before for path, before in saver.batches_before.items() if before in (3, 7, 8)}
    assert len(telling) == 4  # three batches and one epoch
    for path, batches_before in telling.items():
        assert run(tmp_path, checkpoint=path, **settings) == seen[batches_before:], path


def test_processes_get_disjoint_images(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    ranks = []
    for rank in range(3):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        data = prepared(**STRONG)
        ranks.append([list(loader.sampler) for loader in (data.train_dataloader(), data.val_dataloader())])
    for part, in_all in ((0, 1438 // 24 * 24), (1, 359 // 3 * 3)):
        seen = [key for keys in ranks for key in keys[part]]
        assert len(seen) == len(set(seen)) == in_all
        assert len({len(keys[part]) for keys in ranks}) == 1


def test_other_classes_are_refused_and_other_images_start_the_epoch_again(tmp_path):
    data = prepared(**STRONG)
    data.set_position(3, samples=16)
    state = data.state_dict()
    same = prepared(**STRONG)
    same.load_state_dict(state)
    assert same.state_dict() == state
    other = prepared(**STRONG, val_fraction=0.3)
    with pytest.warns(UserWarning, match="other images"):
        other.load_state_dict(state)
    assert (other.state_dict()["epoch"], other.state_dict()["samples"]) == (3, 0)
    write_images(tmp_path / "cat")
    with pytest.raises(ValueError, match="10 classes"):
        prepared(source=str(tmp_path), batch_size=1).load_state_dict(state)


def test_another_seed_is_another_order(tmp_path):
    data = prepared(**STRONG)
    data.set_position(3, samples=16)
    other = prepared(**{**STRONG, "seed": 5})
    with pytest.warns(UserWarning, match="another order"):
        other.load_state_dict(data.state_dict())
    assert (other.state_dict()["epoch"], other.state_dict()["samples"]) == (3, 0)


def test_grey_images_of_sixteen_bits_keep_their_shades():
    ramp = np.linspace(0, 65_535, 64, dtype=np.uint16).reshape(8, 8)
    got = np.asarray(eight_bits(Image.fromarray(ramp)))
    assert got.dtype == np.uint8
    assert np.abs(got - ramp / 257).max() <= 0.5
    small = Image.fromarray((ramp // 257).astype(np.int32))
    assert np.array_equal(np.asarray(eight_bits(small).convert("L")), ramp // 257)
    with pytest.raises(ValueError, match="which of them is white"):
        eight_bits(Image.fromarray(ramp.astype(np.int32)))


def test_what_is_white_in_numbers_with_a_fraction_must_be_known():
    shades = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    with pytest.raises(ValueError, match="which of them is white"):
        eight_bits(Image.fromarray(shades))
    for known in (shades * 255, shades * 0):
        assert eight_bits(Image.fromarray(known)).mode == "F"


def test_images_of_sixteen_bits_in_a_folder(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.fromarray(np.full((8, 8), 32_896, np.uint16)).save(tmp_path / name / f"{index}.png")
    data = prepared(source=str(tmp_path), image_size=8, in_chans=1, batch_size=2, mean=(0.0,), std=(1.0,))
    images, _ = next(iter(data.train_dataloader()))
    assert torch.allclose(images, torch.full_like(images, 128 / 255))


def test_what_programs_leave_in_folders_is_no_class(tmp_path):
    for name in ("ant/0.png", "bee/0.png", "bee/._0.png", ".ipynb_checkpoints/0.png", "ant/.thumbs/0.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "._0.png":
            path.write_bytes(b"no image")
        else:
            Image.new("L", (4, 4)).save(path, format="PNG")
    data = prepared(source=str(tmp_path), batch_size=1, val_fraction=0.5)
    assert data.class_names == ["ant", "bee"]
    assert len(data.dataset("train")) + len(data.dataset("val")) == 2


def test_labels_that_are_kept_back(tmp_path):
    labels = ClassLabel(names=["ant", "bee"])
    features = Features({"picture": ImageFeature(), "kind": labels})
    images = [Image.new("RGB", (6, 6)) for _ in range(4)]
    Dataset.from_dict({"picture": images, "kind": [-1] * 4}, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="without a class"):
        prepared(source=f"hf:{tmp_path / 'set'}", **COLUMNS)


def test_checkpoints_are_read_with_weights_only(tmp_path):
    torch.save(prepared(**STRONG).state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["version"] == 1


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_read_byte_by_byte(tmp_path, compressed):
    data = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3, 253, 254, 255])
    path = tmp_path / ("file.gz" if compressed else "file")
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert read_idx(path).tolist() == [[[1, 2, 3]], [[253, 254, 255]]]


# The names of the cases are written out: the bytes hold the second in which gzip packed them, and processes of one run
# must collect the same names.
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        pytest.param("file", bytes([0, 0, 8, 1, 0, 0, 0, 4, 1, 2, 3]), r"\(4,\) and holds 3", id="too few values"),
        pytest.param("file", bytes([0, 0, 8, 3, 0, 0]), "holds 0", id="half a header"),
        pytest.param("file", bytes([0, 0, 13, 1, 0, 0, 0, 0]), "no IDX file", id="floats"),
        pytest.param("file", gzip.compress(bytes([0, 0, 8, 0])), r"must be called \.gz", id="no suffix"),
        pytest.param("file.gz", b"not compressed", "could not be read", id="not packed"),
        pytest.param("file.gz", gzip.compress(bytes(1000))[:15], "could not be read", id="cut off"),
    ],
)
def test_broken_idx_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / name)


def write_fashion(folder, num_train=6, num_test=4, labels=(0, 9)):
    folder.mkdir()
    for part, num in (("train", num_train), ("t10k", num_test)):
        pixels = np.random.default_rng(num).integers(0, 256, (num, 28, 28), dtype=np.uint8)
        header = bytes([0, 0, 8, 3, 0, 0, 0, num, 0, 0, 0, 28, 0, 0, 0, 28])
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
        classes = bytes(labels[i % 2] for i in range(num))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, num]) + classes)
    return folder


def test_fashion_mnist(tmp_path):
    data = prepared(
        source="fashion_mnist", data_dir=str(write_fashion(tmp_path / "files")), image_size=28, batch_size=2
    )
    assert data.num_classes == 10
    assert len(data.dataset("train")) == 6
    assert [targets.tolist() for _, targets in data.val_dataloader()] == [[0, 9], [0, 9]]


def test_fashion_mnist_says_which_files_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"data_dir.*t10k-labels-idx1-ubyte.*apt install"):
        prepared(source="fashion_mnist", data_dir=tmp_path / "nowhere")
    (write_fashion(tmp_path / "files") / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"has no t10k-labels-idx1-ubyte, nor .*\.gz"):
        prepared(source="fashion_mnist", data_dir=tmp_path / "files")
    with pytest.raises(ValueError, match="labels must lie in 0 to 9"):
        prepared(source="fashion_mnist", data_dir=write_fashion(tmp_path / "more", labels=(3, 10)))


def test_a_folder_with_parts(tmp_path):
    for part, classes in (("train", ("ant", "bee", "cat")), ("val", ("ant", "cat"))):
        for class_name in classes:
            write_images(tmp_path / part / class_name / "inside")
    data = prepared(source=str(tmp_path), batch_size=2, image_size=8)
    assert data.class_names == ["ant", "bee", "cat"]
    assert len(data.dataset("train")) == 9
    assert torch.cat([targets for _, targets in data.val_dataloader()]).tolist() == [0, 0, 0, 2, 2, 2]


def test_a_folder_without_parts_is_split_the_same_way_each_time(tmp_path):
    write_images(tmp_path / "ant", 10)
    write_images(tmp_path / "bee", 10)
    (tmp_path / "bee" / "notes.txt").write_text("no image")
    first, second = (prepared(source=str(tmp_path), val_fraction=0.25)._parts for _ in range(2))
    assert (len(first.train), len(first.val)) == (15, 5)
    assert first.train.fingerprint() == second.train.fingerprint()
    assert np.array_equal(first.val.indices, second.val.indices)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "one folder for each class"),
        (["ant/notes.txt"], "no image"),
        (["ant/0.png", "ant/1.png", "notes/all.txt"], r"without an image.*\['notes'\]"),
        (["train/ant/0.png"], "no folder val"),
        (["train/ant/0.png", "val/bee/0.png"], r"does not have: \['bee'\]"),
        (["ant/0.png"], "one to train on and one to hold out"),
    ],
)
def test_folders_of_the_wrong_shape(tmp_path, files, message):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path, format="PNG")
    with pytest.raises(ValueError, match=message):
        prepared(source=str(tmp_path))


def make_dataset(num_images=8, label=None):
    images = [Image.new("RGB", (6, 6), (i, i, i)) for i in range(num_images)]
    labels = [i % 3 for i in range(num_images)]
    features = Features({"picture": ImageFeature(), "kind": label or ClassLabel(names=["ant", "bee", "cat"])})
    return Dataset.from_dict({"picture": images, "kind": labels}, features=features)


COLUMNS = {"image_column": "picture", "label_column": "kind", "image_size": 6, "batch_size": 2}


@pytest.mark.parametrize("label", [None, Value("int64")], ids=["names", "integers"])
def test_a_dataset_on_disk(tmp_path, label):
    DatasetDict({"train": make_dataset(label=label), "test": make_dataset(4, label)}).save_to_disk(tmp_path / "set")
    data = prepared(source=f"hf:{tmp_path / 'set'}", val_split="test", **COLUMNS)
    assert data.class_names == (["0", "1", "2"] if label else ["ant", "bee", "cat"])
    assert torch.cat([targets for _, targets in data.val_dataloader()]).tolist() == [0, 1, 2, 0]
    halved = prepared(source=f"hf:{tmp_path / 'set'}", val_fraction=0.5, **COLUMNS)
    assert (len(halved.dataset("train")), len(halved.dataset("val"))) == (4, 4)


def test_a_dataset_without_splits_is_not_its_own_held_out_part(tmp_path):
    make_dataset().save_to_disk(tmp_path / "set")
    for arguments in ({"val_split": "validation"}, {"split": "train[:50%]"}):
        with pytest.raises(ValueError, match="holds one dataset and no splits"):
            prepared(source=f"hf:{tmp_path / 'set'}", **COLUMNS, **arguments)
    assert len(prepared(source=f"hf:{tmp_path / 'set'}", val_fraction=0.25, **COLUMNS).dataset("val")) == 2


def test_a_row_without_an_image_is_named(tmp_path):
    rows = {"picture": [Image.new("L", (6, 6)), None] * 4, "kind": [0, 1] * 4}
    features = Features({"picture": ImageFeature(), "kind": ClassLabel(names=["ant", "bee"])})
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    data = prepared(source=f"hf:{tmp_path / 'set'}", val_fraction=0.5, **COLUMNS)
    with pytest.raises(ValueError, match=r"row \d has no image in the column 'picture'"):
        list(data.train_dataloader())


def test_a_folder_that_leads_back_to_itself_is_read_once(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "0.png")
        (tmp_path / name / "back").symlink_to(tmp_path / name)
    data = prepared(source=str(tmp_path), batch_size=1, val_fraction=0.5)
    assert len(data.dataset("train")) + len(data.dataset("val")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_column": "image"}, r"image_column to one of \['picture', 'kind'\]"),
        ({"label_column": "label"}, r"label_column to one of \['picture', 'kind'\]"),
        ({"image_column": "kind"}, "not an image"),
        ({"label_column": "picture"}, "class_encode_column"),
        ({"val_split": "test"}, "has no split"),
        ({"val_split": "train"}, "both 'train'"),
    ],
)
def test_columns_of_the_wrong_kind(tmp_path, arguments, message):
    dataset = make_dataset()
    if arguments.get("label_column") == "picture":
        dataset = dataset.add_column("name", ["x"] * len(dataset))
        arguments = {"label_column": "name"}
    DatasetDict({"train": dataset}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        prepared(source=f"hf:{tmp_path / 'set'}", **{**COLUMNS, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "nowhere"}, 'no folder; it must be "digits"'),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 2000}, "1438 samples, fewer than the 2000 x 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"val_fraction": 1.0}, "between 0 and 1"),
        ({"image_size": 0}, "at least 1 pixel"),
        ({"in_chans": 4}, "1 .grey. or 3"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale must be two shares"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio must be two positive"),
        ({"hflip": 1.5}, "hflip must be a probability"),
        ({"re_prob": -0.1}, "re_prob must be a probability"),
        ({"color_jitter": -1.0}, "color_jitter must be at least 0"),
        ({"auto_augment": "rand-q9"}, "no policy of timm"),
        ({"interpolation": "cubic"}, "interpolation must be one of"),
        ({"crop_pct": 0.0}, "crop_pct must be a share"),
        ({"mean": (0.5,)}, "None or 3 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
    ],
)
def test_errors_teach(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepared(**arguments).train_dataloader()
