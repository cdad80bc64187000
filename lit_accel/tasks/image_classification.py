"""Image classification.

Shapes: b batch, c channels, h height, w width, n classes.
"""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lit_accel.arguments import is_number, require_whole
from lit_accel.data_parallel import data_rank
from lit_accel.global_draws import seeded_globals
from lit_accel.tasks.data_fit import check_image_batch, check_images
from lit_accel.tasks.metrics import SampleMean
from lit_accel.tasks.timm_models import build_classifier, classifier_arguments, size_arguments
from lit_accel.tasks.transformer_task import TransformerTask

_MIXUP = 5  # sets the draws of mixup apart from other draws with the same seed


class ImageClassification(TransformerTask):
    """Train a timm model to tell classes of images apart.

    The transformer is the attribute ``model``; its parameters are all this module has. A batch is a pair of images,
    of shape (batch, channels, height, width), and their classes, int64 of shape (batch,).

    Logged: ``train/loss`` each step, of the mixed and smoothed targets if there are such; over the whole held-out
    set, ``val/loss`` (nats, of the true classes), ``val/top1`` (share of images whose class scores highest) and, with
    more than five classes, ``val/top5`` (among the five highest); and the same under ``test/``.

    A distilled DeiT (``deit_tiny_distilled_patch16_224``) is trained without a teacher on the mean of its two heads,
    as timm does by default.

    Example::

        >>> task = ImageClassification(
        ...     "deit_tiny_patch16_224", model_kwargs={"patch_size": 4, "depth": 6}, num_classes=10, image_size=32
        ... )
        >>> trainer.fit(task, ImageDataModule(image_size=32))  # doctest: +SKIP

    Args:
        model: A model of timm by its name, or ``hf-hub:NAME`` or ``local-dir:FOLDER``.
        pretrained: Whether to take the published weights. Default: random ones.
        model_kwargs: Arguments of the model's class to set, such as ``{depth: 6, embed_dim: 96, drop_path_rate: 0.1}``.
        num_classes: Number of classes. The command line links it from the data; ``None`` keeps the model's.
        in_chans: Channels of the images. Linked from the data; ``None`` keeps the model's.
        image_size: Height and width of the images in pixels. Linked from the data; ``None`` keeps the model's, and a
            model that takes images of any size ignores it.
        label_smoothing: Share of each target that is spread evenly over all classes. Default: none.
        mixup: Alpha of the Beta distribution that weighs two images laid over each other; 0, the default, is none.
        cutmix: Alpha of the Beta distribution of the area of a rectangle pasted from another image; 0, the default,
            is none.
        mixup_prob: Probability that a batch is mixed at all.
        mixup_switch_prob: Probability of cutmix instead of mixup where both are on.
        seed: Seed of mixup and cutmix. What a batch gets depends on ``(seed, step, batch, rank)`` only.
        optimizer: Makes the optimizer from parameter groups. Default: AdamW with torch's own settings.
        lr_scheduler: Makes a scheduler from the optimizer, stepped every optimizer step (Lightning's
            ``ReduceLROnPlateau``: at the end of each epoch). ``None``, the default, keeps the rate constant.
        weight_decay: Decay of parameters with two or more dimensions, except those that the model's
            ``no_weight_decay()`` names; the others have none. ``None``, the default, leaves it to the optimizer's own
            argument.
        compile_blocks: Whether to ``torch.compile`` each block of the transformer. Needs a registered anatomy.

    Raises:
        ValueError: If an argument is out of its range, timm has no such model or cannot build it, or ``model_kwargs``
            contradicts ``num_classes``, ``in_chans`` or ``image_size``.
    """

    def __init__(
        self,
        model: str,
        pretrained: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        num_classes: int | None = None,
        in_chans: int | None = None,
        image_size: int | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weight_decay: float | None = None,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, weight_decay, compile_blocks)
        # Callables are no primitives: with them a checkpoint could not be read with weights_only=True.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        _check(label_smoothing, mixup, cutmix, mixup_prob, mixup_switch_prob)
        require_whole("seed", seed)
        self._model_args = classifier_arguments(
            model, model_kwargs, num_classes=num_classes, in_chans=in_chans, image_size=image_size
        )
        self.model = build_classifier(model, self._model_args, pretrained=pretrained)
        self.num_classes = int(self.model.num_classes)  # type: ignore[arg-type]
        self._label_smoothing = label_smoothing
        self._mixup: Any = None
        if mixup > 0 or cutmix > 0:
            from timm.data import Mixup

            self._mixup = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mixup_prob,
                switch_prob=mixup_switch_prob,
                label_smoothing=label_smoothing,
                num_classes=self.num_classes,
            )
        self._seed = seed
        self._held_out = nn.ModuleDict({stage: _held_out_metrics(self.num_classes) for stage in ("val", "test")})

    def setup(self, stage: str) -> None:
        """Refuse data that this model cannot learn from.

        Raises:
            ValueError: If it cannot.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        has_pairs = self._mixup is not None
        check_images(type(self).__name__, self.model, data, num_classes=self.num_classes, has_pairs=has_pairs)

    def check_batch(self, batch: Any) -> None:
        """Refuse a batch that is none of images.

        Raises:
            TypeError: If it is not.
        """
        check_image_batch(type(self).__name__, batch)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Score every class.

        Args:
            images_bchw: Images, shape (b, c, h, w).

        Returns:
            Logits, shape (b, n).
        """
        return self.model(images_bchw)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the batch, and log it as ``train/loss``."""
        images_bchw, targets_b = batch
        if self._mixup is None:
            loss = cross_entropy(self(images_bchw).float(), targets_b, label_smoothing=self._label_smoothing)
        else:
            images_bchw, targets_bn = self.mix(images_bchw, targets_b, batch_idx)
            loss = cross_entropy(self(images_bchw).float(), targets_bn)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def mix(self, images_bchw: Tensor, targets_b: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Blend each image of a batch, and its target, with another one by mixup or cutmix.

        Args:
            images_bchw: Images, shape (b, c, h, w). Not changed.
            targets_b: Classes, shape (b,).
            batch_idx: Number of the batch in its epoch.

        Returns:
            Images of the same shape, and the probability of each class, smoothed, of shape (b, n).

        Raises:
            ValueError: If the number of images is odd: one would have no other.
        """
        if len(images_bchw) % 2:
            raise ValueError(
                f"mixup and cutmix blend pairs of images, and the batch has {len(images_bchw)}; set an even batch_size,"
                " and drop a smaller last batch"
            )
        # timm draws from numpy's global generator, and mixes in place.
        with seeded_globals(self._seed, _MIXUP, self.global_step, batch_idx, self._data_rank()):
            return self._mixup(images_bchw.clone(), targets_b)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add the batch to ``val/loss``, ``val/top1`` and ``val/top5``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add the batch to ``test/loss``, ``test/top1`` and ``test/top5``."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Score every class of each image: logits of shape (b, n)."""
        return self(batch[0])

    def save_pretrained(self, folder: str, model: nn.Module | None = None) -> None:
        """Write the model as timm does: ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it.

        What the images of an :class:`~lit_accel.data.ImageDataModule` went through, and what its classes are called,
        is written too, so that ``timm.data.resolve_model_data_config`` gives the transforms that the model knows.

        Args:
            folder: Where to write; created if missing.
            model: What to write instead of ``self.model``, such as what a strategy has gathered of it.
        """
        from timm.models import save_for_hf

        saved: Any = self.model if model is None else model
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        saved.pretrained_cfg = {**saved.pretrained_cfg, **getattr(data, "preprocessing", {})}
        names = getattr(data, "class_names", ())
        labels = {"label_names": list(names)} if len(names) == self.num_classes else {}
        # A run may have begun with a smaller model than it ends with, or end with a smaller one.
        arguments = {**self._model_args, **size_arguments(saved)}
        save_for_hf(saved, folder, model_config=labels, model_args=arguments, safe_serialization=True)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images_bchw, targets_b = batch
        logits_bn = self(images_bchw).float()
        for name, metric in self._held_out[stage].items():  # type: ignore[operator]
            if name == "loss":
                metric.update(cross_entropy(logits_bn, targets_b), torch.tensor(len(targets_b)))
            else:
                metric.update(logits_bn, targets_b)
            self.log(f"{stage}/{name}", metric, prog_bar=name != "top5")

    def _data_rank(self) -> int:
        """The rank among those with batches of their own; fewer than all where several share one."""
        return 0 if self._trainer is None else data_rank(self.trainer)


def _held_out_metrics(num_classes: int) -> nn.ModuleDict:
    metrics = nn.ModuleDict({"loss": SampleMean()})
    for top_k in (1, 5):
        if num_classes > top_k:
            metrics[f"top{top_k}"] = MulticlassAccuracy(num_classes, top_k, average="micro", validate_args=False)
    return metrics


def _check(label_smoothing: float, mixup: float, cutmix: float, mixup_prob: float, mixup_switch_prob: float) -> None:
    if not is_number(label_smoothing) or not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be a share, in [0, 1), and is {label_smoothing!r}")
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if not is_number(alpha) or alpha < 0:
            raise ValueError(f"{name} must be at least 0, which turns it off, and is {alpha!r}")
    for name, probability in (("mixup_prob", mixup_prob), ("mixup_switch_prob", mixup_switch_prob)):
        if not is_number(probability) or not 0 <= probability <= 1:
            raise ValueError(f"{name} must be a probability, in [0, 1], and is {probability!r}")
