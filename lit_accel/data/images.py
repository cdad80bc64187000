"""`ImageDataModule`: labelled images from scikit-learn, IDX files, a folder or a Hugging Face dataset."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_accel.arguments import is_number
from lit_accel.data.augmentation import ImageSamples, ImageSettings
from lit_accel.data.image_sources import ImageParts, open_images
from lit_accel.data.resuming import Part, ResumableDataModule, require

_AUGMENTATION = 3  # sets the draws of the augmentation apart from other draws with the same seed


class ImageDataModule(ResumableDataModule):
    """Labelled images, transformed by timm, for classification.

    A batch is a tuple of the images, float32 of shape (batch_size, in_chans, image_size, image_size), normalised, and
    their classes, int64 of shape (batch_size,).

    Training draws a random crop, and what else the arguments ask for; an image's augmentation depends on
    `(seed, epoch, image)` only, whatever the batch size, number of processes or workers, and draws nothing from the
    global generators. The held-out part serves validation, test and prediction, without augmentation. Where the
    source does not say what that is, a share is held out, always the same.

    In training each epoch visits each image once, shuffled by `(seed, epoch)`, in full batches of the same number
    on every process; what is left over differs from epoch to epoch. Processes get disjoint images, also with
    `Trainer(use_distributed_sampler=False)`.

    A checkpoint holds the position in the data, so that training resumes with exactly the next batch, in the middle
    of an epoch too. A resume on other classes is refused; one on other images of the same classes, or with another
    seed, starts its epoch at the beginning, with a warning.

    The defaults are gentle, for small images in which left is not right. What DeiT does to ImageNet is in
    `configs/data/imagenet.yaml`.

        >>> data = ImageDataModule(batch_size=32)
        >>> data.prepare_data(); data.setup("fit")
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, data.num_classes
        (torch.Size([32, 3, 32, 32]), 10)

    Args:
        source: Where the images come from. "digits" is scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which
            are installed with it. "fashion_mnist" is 70,000 articles of clothing of 28 x 28 pixels, in IDX files.
            "hf:NAME" is a Hugging Face dataset, on the hub or in a folder written by `save_to_disk`; it needs
            `pip install "lit-accel[hub]"`. Anything else is the path of a folder: with folders train and val in it,
            each of which has one folder for each class; or with one folder for each class.
        image_size: Height and width of the images that the model gets, in pixels.
        in_chans: 1 for grey images, 3 for red, green and blue. Grey sources repeat theirs. Transparency is
            dropped: what was saved beneath it shows.
        batch_size: Images in a batch of one process.
        crop_scale: Smallest and largest share of the image's area that a training crop shows.
        crop_ratio: Smallest and largest ratio of the crop's sides, relative to a square.
        hflip: Probability of mirroring; not for digits, letters or hands.
        color_jitter: Largest change of brightness, contrast and saturation; timm leaves it out where `auto_augment`
            is set.
        auto_augment: A policy of timm such as "rand-m9-mstd0.5-inc1"; None is none.
        re_prob: Probability of erasing a random rectangle.
        interpolation: How images are resized: "nearest", "bilinear", "bicubic", "box", "hamming" or "lanczos".
        crop_pct: Share of the side that evaluation shows: images are resized to image_size / crop_pct, and their
            centre is cut out.
        mean: What is subtracted from each channel, as a share of full brightness; None is ImageNet's mean for three
            channels, and 0.5 for one.
        std: What each channel is then divided by; None is ImageNet's standard deviation, or 0.5.
        val_fraction: Share of the images that is held out, where the source does not say which are.
        val_batches: Evaluate on the images of so many batches only, in all processes together, evenly spread over
            the held-out part; None is all of them.
        seed: Seed of the order and of the augmentation.
        num_workers: Processes that load data, for each training process; 0 loads in the training process.
        data_dir: Folder of the IDX files of "fashion_mnist"; None looks in data/fashion-mnist, and where Debian's
            package dataset-fashion-mnist puts them.
        image_column: Column of a dataset that holds the images.
        label_column: Column of a dataset that holds the classes.
        dataset_config: Configuration of a dataset on the hub, where it has several.
        split: Split of a dataset to train on.
        val_split: Split of a dataset that is held out; None holds out a share of `split`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        source: str = "digits",
        image_size: int = 32,
        in_chans: int = 3,
        batch_size: int = 64,
        crop_scale: tuple[float, float] = (0.8, 1.0),
        crop_ratio: tuple[float, float] = (0.9, 1.1),
        hflip: float = 0.0,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        re_prob: float = 0.0,
        interpolation: str = "bicubic",
        crop_pct: float = 1.0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        val_fraction: float = 0.2,
        val_batches: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        data_dir: str | Path | None = None,
        image_column: str = "image",
        label_column: str = "label",
        dataset_config: str | None = None,
        split: str = "train",
        val_split: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_batches, seed, num_workers)
        require("val_fraction", val_fraction, is_number(val_fraction) and 0 < val_fraction < 1, "between 0 and 1")
        self.image_size = image_size
        self.in_chans = in_chans
        settings = ImageSettings(
            image_size=image_size,
            in_chans=in_chans,
            crop_scale=crop_scale,
            crop_ratio=crop_ratio,
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            re_prob=re_prob,
            interpolation=interpolation,
            crop_pct=crop_pct,
            mean=mean,
            std=std,
        )
        self.preprocessing = settings.for_timm()
        self._transforms = {"train": settings.training(), "val": settings.evaluation()}
        self._source_arguments: dict[str, Any] = {
            "source": source,
            "data_dir": data_dir,
            "image_column": image_column,
            "label_column": label_column,
            "dataset_config": dataset_config,
            "split": split,
            "val_split": val_split,
            "val_fraction": val_fraction,
        }

    @cached_property
    def class_names(self) -> list[str]:
        """What the classes are called, in the order of their numbers. Opens the source."""
        return list(self._parts.train.images.class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes, which is the number of outputs that the model needs. Opens the source."""
        return len(self.class_names)

    @staticmethod
    def collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Makes a batch: images of shape (batch, channels, height, width), and classes, int64 of shape (batch,)."""
        images, labels = zip(*samples, strict=True)
        return torch.stack(images), torch.tensor(labels)

    def prepare_data(self) -> None:
        """Opens the source, which fetches a dataset of the hub. Lightning calls it on one process."""
        _ = self._parts

    def setup(self, stage: str) -> None:
        """Opens the source, and starts at the beginning of the data.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            ValueError: If the source is none, or its images cannot be used.
        """
        _ = self._parts
        super().setup(stage)

    def dataset(self, part: Part) -> ImageSamples:
        """The images that are trained on, with augmentation, or those held out, without."""
        images = self._parts.train if part == "train" else self._parts.val
        draws = (self.seed, _AUGMENTATION) if part == "train" else None
        return ImageSamples(images, self.in_chans, self._transforms[part], draws)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and what it is a position in."""
        return {**super().state_dict(), "images": self._fingerprint, "classes": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a position. Call it after `setup("fit")`, as Lightning does.

        Raises:
            ValueError: If the checkpoint was trained on other classes.
        """
        if state_dict["classes"] != self.class_names:
            raise ValueError(
                f"the checkpoint was trained on {_few(state_dict['classes'])}, and the data has"
                f" {_few(self.class_names)}, so its outputs mean something else; give the source that it was trained"
                " on, or load only the weights if this is meant"
            )
        is_same = state_dict["images"] == self._fingerprint
        other = "the checkpoint was trained on other images, or with another val_fraction"
        self._take_up(state_dict, None if is_same else other)

    @cached_property
    def _parts(self) -> ImageParts:
        return open_images(**self._source_arguments)

    @cached_property
    def _fingerprint(self) -> str:
        return self._parts.train.fingerprint()


def _few(class_names: Sequence[str]) -> str:
    return f"{len(class_names)} classes ({', '.join(class_names[:3])}{', ...' if len(class_names) > 3 else ''})"
