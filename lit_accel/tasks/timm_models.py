"""Build a timm model from a name, and refuse what contradicts the data."""

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lit_accel.anatomy import AnatomyError, anatomy_of
from lit_accel.arguments import require_whole

# Arguments of timm's transformers that are counts; timm builds a model of none of them, which fails when it is called.
_SIZES = {"depth", "depths", "embed_dim", "num_heads", "patch_size", "window_size"}


def size_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments with which timm builds a model of the size that this one has.

    Args:
        model: A model of timm; none of a family whose size can be changed has none.
    """
    try:
        size = anatomy_of(model).size
    except AnatomyError:
        return {}
    if len(size.depths) == 1:
        return {"embed_dim": size.axes["embed"], "depth": size.depths[0], "num_heads": size.axes["heads"]}
    heads = [size.axes[f"heads_{stage}"] for stage in range(len(size.depths))]
    return {"embed_dim": size.axes["embed_0"], "depths": list(size.depths), "num_heads": heads}


def classifier_arguments(
    model: str,
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    image_size: int | None = None,
) -> dict[str, Any]:
    """Join a model's own arguments with what the data says.

    Args:
        model: A model of timm.
        model_kwargs: Arguments of its class.
        num_classes: Classes of the data; ``None`` keeps the model's.
        in_chans: Channels of the images; ``None`` keeps the model's.
        image_size: Side of the images; only passed to a model that timm registers with a fixed input size.

    Returns:
        Keywords for ``timm.create_model``.

    Raises:
        ValueError: If timm has no such model, or ``model_kwargs`` contradicts the data.
    """
    import timm  # takes a second, and language models need none of it

    # hf-hub:NAME and local-dir:FOLDER are no names of timm's own.
    if ":" not in model and not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"timm has no model {model!r}; timm.list_models() names them all.{hint}")
    arguments = dict(model_kwargs or {})
    for name in _SIZES & arguments.keys():
        # Models of several stages have one number for each.
        sizes = arguments[name] if isinstance(arguments[name], (list, tuple)) else [arguments[name]]
        for size in sizes:
            require_whole(f"{name} of model_kwargs", size, 1)
    config = None if ":" in model else timm.get_pretrained_cfg(model)
    if config is None or not config.fixed_input_size:
        image_size = None
    for name, source, value in (
        ("num_classes", "num_classes", num_classes),
        ("in_chans", "in_chans", in_chans),
        ("img_size", "image_size", image_size),
    ):
        if value is None:
            continue
        given = arguments.setdefault(name, value)
        if given not in (value, [value, value], (value, value)):
            raise ValueError(
                f"model_kwargs says {name}={given}, but the data has {source}={value}. Leave it out of model_kwargs."
            )
    return arguments


def build_classifier(model: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Build a classifier in training mode.

    Args:
        model: A model of timm.
        arguments: Keywords of ``timm.create_model``.
        pretrained: Whether to take the published weights.

    Returns:
        The model.

    Raises:
        ValueError: If timm cannot build it from these arguments, or it has fewer than two outputs.
    """
    import timm

    # A plan needs no weights, and the meta device has no room for them.
    takes_weights = pretrained and torch.empty(0).device.type != "meta"
    try:
        classifier = timm.create_model(model, pretrained=takes_weights, **arguments)
    except (TypeError, AssertionError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(
            f"timm cannot build {model!r} from model_kwargs and the shape of the data, {dict(arguments)}: "
            f"{_reason(error)}. Change model_kwargs."
        ) from error
    if int(classifier.num_classes) < 2:  # type: ignore[arg-type]
        raise ValueError(
            f"{model!r} has num_classes={classifier.num_classes}; classification needs at least two. Give data of two "
            "classes or more, or set num_classes."
        )
    _check_patches(classifier)
    return classifier


def _check_patches(classifier: nn.Module) -> None:
    """See that patches cover images; timm leaves out what is over, unless it was told to pad."""
    embed = getattr(classifier, "patch_embed", None)
    sides, patches = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    if not (isinstance(sides, tuple) and isinstance(patches, tuple)) or getattr(embed, "dynamic_img_pad", False):
        return
    for side, patch in zip(sides, patches, strict=True):
        if side % patch:
            raise ValueError(
                f"Patches of {patch} pixels (patch_size of model_kwargs) do not divide images of {side}: the last "
                f"{side % patch} rows and columns would never be seen. Choose a divisor, or another image_size."
            )


def _reason(error: Exception) -> str:
    """Say what timm has said, and which argument may have been meant."""
    import timm

    reason = " ".join(str(error).split()).rstrip(".")
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", reason)
    if unknown is None:
        return reason or type(error).__name__
    kind = getattr(timm.models, unknown[1], None)
    known = [] if kind is None else list(inspect.signature(kind).parameters)
    close = difflib.get_close_matches(unknown[2], known, n=1)
    return f"{unknown[1]} has no argument {unknown[2]!r}" + (f" (did you mean {close[0]!r}?)" if close else "")
