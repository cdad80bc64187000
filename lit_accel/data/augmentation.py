"""timm's transforms of images, and the rule that a random one is a pure function of `(seed, epoch, image)`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from lit_accel.arguments import is_number, is_whole
from lit_accel.data.image_sources import ImagePart
from lit_accel.data.resuming import require
from lit_accel.data.sampling import KeyedDataset
from lit_accel.global_draws import seeded_globals

ImageTransform = Callable[[Image.Image], Tensor]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GREY = ((0.5,), (0.5,))
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class ImageSettings:
    """What `timm.data.create_transform` is told; see `lit_accel.data.ImageDataModule` for each of them.

    Raises:
        ValueError: If one is out of its range.
    """

    image_size: int
    in_chans: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    hflip: float
    color_jitter: float
    auto_augment: str | None
    re_prob: float
    interpolation: str
    crop_pct: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def __post_init__(self) -> None:
        require("image_size", self.image_size, is_whole(self.image_size, 1), "a whole number, at least 1 pixel")
        require("in_chans", self.in_chans, self.in_chans in (1, 3), "1 (grey) or 3 (red, green and blue)")
        scale, ratio = self.crop_scale, self.crop_ratio
        two_shares, two_ratios = "two shares of the image, in (0, 1], ascending", "two positive ratios, ascending"
        require("crop_scale", scale, _are_ascending(scale) and scale[1] <= 1, two_shares)
        require("crop_ratio", ratio, _are_ascending(ratio), two_ratios)
        require("hflip", self.hflip, _is_share(self.hflip), "a probability")
        is_jitter = is_number(self.color_jitter) and self.color_jitter >= 0
        require("color_jitter", self.color_jitter, is_jitter, "at least 0, which leaves colours alone")
        require("re_prob", self.re_prob, _is_share(self.re_prob), "a probability")
        is_part = _is_share(self.crop_pct) and self.crop_pct > 0
        require("crop_pct", self.crop_pct, is_part, "a share of the image's side, in (0, 1]")
        require("interpolation", self.interpolation, self.interpolation in _INTERPOLATIONS, f"one of {_INTERPOLATIONS}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            wanted = f"None or {self.in_chans} numbers (in_chans)"
            is_one_each = isinstance(values, Sequence) and len(values) == self.in_chans and all(map(is_number, values))
            require(name, values, values is None or is_one_each, wanted)
        require("std", self.std, self.std is None or min(self.std) > 0, "positive")

    def for_timm(self) -> dict[str, Any]:
        """What an image must go through to be evaluated, in the words of timm's `pretrained_cfg`."""
        return {**self._shared(), "crop_pct": self.crop_pct}

    def training(self) -> ImageTransform:
        """The random transform, to (in_chans, image_size, image_size).

        Raises:
            ValueError: If `auto_augment` is no policy of timm.
        """
        from timm.data import create_transform  # a second to import, and text needs none of it

        try:
            return create_transform(
                **self._shared(),
                is_training=True,
                scale=self.crop_scale,
                ratio=self.crop_ratio,
                hflip=self.hflip,
                color_jitter=self.color_jitter,
                auto_augment=self.auto_augment,
                re_prob=self.re_prob,
                re_mode="pixel",
            )
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            reason = f" ({error})" if str(error) else ""
            raise ValueError(
                f"auto_augment={self.auto_augment!r} is no policy of timm{reason}; write for example"
                ' "rand-m9-mstd0.5-inc1" (RandAugment), "augmix-m5-w4-d2", "3a" or "original" (AutoAugment), or null'
            ) from error

    def evaluation(self) -> ImageTransform:
        """The fixed transform, to the same shape."""
        from timm.data import create_transform

        return create_transform(**self._shared(), is_training=False, crop_pct=self.crop_pct)

    def _shared(self) -> dict[str, Any]:
        mean, std = _IMAGENET if self.in_chans == 3 else _GREY
        return {
            "input_size": (self.in_chans, self.image_size, self.image_size),
            "interpolation": self.interpolation,
            "mean": self.mean or mean,
            "std": self.std or std,
        }


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _are_ascending(values: Any) -> bool:
    """Whether these are two positive numbers, the smaller one first."""
    is_pair = isinstance(values, Sequence) and len(values) == 2 and all(map(is_number, values))
    return is_pair and 0 < values[0] <= values[1]


class ImageSamples(KeyedDataset):
    """Images as tensors, read by keys.

    Args:
        part: The images.
        in_chans: 1 (grey) or 3.
        transform: Makes a tensor of an image.
        draws: Keys of the random draws, to which epoch and index are added; None for a transform without any.
    """

    def __init__(
        self, part: ImagePart, in_chans: int, transform: ImageTransform, draws: tuple[int, ...] | None
    ) -> None:
        self.part = part
        self.in_chans = in_chans
        self.transform = transform
        self.draws = draws

    def __len__(self) -> int:
        return len(self.part)

    def sample(self, epoch: int, index: int) -> tuple[Tensor, int]:
        """Returns one image, float32 of shape (in_chans, image_size, image_size), and the number of its class."""
        image, label = self.part[index]
        image = eight_bits(image).convert("L" if self.in_chans == 1 else "RGB")
        if self.draws is None:
            return self.transform(image), label
        # timm draws from the global generators of random, numpy and torch.
        with seeded_globals(*self.draws, epoch, index):
            return self.transform(image), label


def eight_bits(image: Image.Image) -> Image.Image:
    """Returns a grey image of more than 8 bits with 8; Pillow cuts off what is above 255, which leaves it white.

    Args:
        image: An image of any mode.

    Raises:
        ValueError: If the image does not say how bright its brightest value is.
    """
    if image.mode.startswith("I;16"):
        # 65,535 is 257 times 255.
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        darkest, brightest = cast(tuple[float, float], image.getextrema())
        # Of numbers with a fraction, 1 is white for some and nearly black for others.
        if darkest < 0 or brightest > 255 or (image.mode == "F" and 0 < brightest <= 1):
            raise ValueError(
                f"an image of Pillow's mode {image.mode!r} has values from {darkest:g} to {brightest:g}, and nothing"
                " says which of them is white; save it with 8 bits, or with 16 as a PNG"
            )
    return image
