"""timm's transforms of images, and the rule that a random one is a pure function of `(seed, epoch, image)`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

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
        require("image_size", self.image_size, self.image_size >= 1, "at least 1 pixel")
        require("in_chans", self.in_chans, self.in_chans in (1, 3), "1 (grey) or 3 (red, green and blue)")
        scale, ratio = self.crop_scale, self.crop_ratio
        require("crop_scale", scale, 0 < scale[0] <= scale[1] <= 1, "two shares of the image, in (0, 1], ascending")
        require("crop_ratio", ratio, 0 < ratio[0] <= ratio[1], "two positive ratios, ascending")
        require("hflip", self.hflip, 0 <= self.hflip <= 1, "a probability")
        require("color_jitter", self.color_jitter, self.color_jitter >= 0, "at least 0, which leaves colours alone")
        require("re_prob", self.re_prob, 0 <= self.re_prob <= 1, "a probability")
        require("crop_pct", self.crop_pct, 0 < self.crop_pct <= 1, "a share of the image's side, in (0, 1]")
        require("interpolation", self.interpolation, self.interpolation in _INTERPOLATIONS, f"one of {_INTERPOLATIONS}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            wanted = f"None or {self.in_chans} numbers (in_chans)"
            require(name, values, values is None or len(values) == self.in_chans, wanted)
        require("std", self.std, self.std is None or min(self.std) > 0, "positive")

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
            raise ValueError(
                f"auto_augment={self.auto_augment!r} is no policy of timm ({error}); write for example"
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
        image = image.convert("L" if self.in_chans == 1 else "RGB")
        if self.draws is None:
            return self.transform(image), label
        # timm draws from the global generators of random, numpy and torch.
        with seeded_globals(*self.draws, epoch, index):
            return self.transform(image), label
