"""Whether a data module and a task go together: checked before the first batch, by what the data module says of itself.

A data module says it with attributes: ``block_size``, ``vocab_size`` and ``objective`` of text, ``num_classes``,
``in_chans``, ``image_size`` and ``batch_size`` of images. What one does not say is not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lit_accel.anatomy import AnatomyError, anatomy_of


def check_text(task: str, model: nn.Module, data: Any, objective: str) -> None:
    """Check that a language model can learn from a data module.

    Args:
        task: Name of the task, for messages.
        model: The model, of Hugging Face.
        data: The data module; ``None`` if there is none.
        objective: What the task trains, ``"causal"`` or ``"masked"``.

    Raises:
        ValueError: If it cannot.
    """
    name = type(data).__name__
    if hasattr(data, "num_classes") and not hasattr(data, "vocab_size"):
        raise ValueError(f"{task} learns from text, and {name} has images of classes. Give it a TextDataModule.")
    given = getattr(data, "objective", objective)
    if given != objective:
        raise ValueError(
            f'{task} needs data with objective="{objective}", and that of {name} is "{given}". Set objective: '
            f"{objective} of the data, or train with {'MaskedLM' if given == 'masked' else 'CausalLM'}."
        )
    config: Any = model.config
    length, longest = getattr(data, "block_size", None), _longest(model)
    if isinstance(length, int) and longest is not None and length > longest:
        raise ValueError(
            f"The texts of {name} have {length} tokens (block_size), and the model has positions for {longest}. Lower "
            f"block_size, or raise the positions (overrides: max_position_embeddings, n_positions of GPT-2)."
        )
    size, rows = getattr(data, "vocab_size", None), getattr(config, "vocab_size", None)
    if isinstance(size, int) and isinstance(rows, int) and size > rows:
        raise ValueError(
            f"The vocabulary of {name} has {size} tokens, and the model's embedding {rows} rows. Build the model with "
            f"vocab_size={size}, or read the data with the model's own tokenizer."
        )


def _longest(model: nn.Module) -> int | None:
    """Return for how many tokens there are learnt positions; ``None`` where they are computed, or nobody knows."""
    try:
        return anatomy_of(model).max_tokens
    except AnatomyError:
        return None


def check_text_batch(task: str, batch: Any) -> None:
    """Check that a batch is one of text.

    Args:
        task: Name of the task, for messages.
        batch: The batch.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch or "labels" not in batch:
        raise TypeError(
            f"{task} wants batches that are mappings with input_ids and labels, and got {_of(batch)}. Have the data "
            'module yield {"input_ids": ids, "labels": labels}, both of shape (batch, tokens).'
        )
    ids = batch["input_ids"]
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise TypeError(f"input_ids of a batch are whole numbers of shape (batch, tokens), and {task} got {_of(ids)}.")


def check_images(task: str, model: nn.Module, data: Any, *, num_classes: int, has_pairs: bool) -> None:
    """Check that a classifier can learn from a data module.

    Args:
        task: Name of the task, for messages.
        model: The model, of timm.
        data: The data module; ``None`` if there is none.
        num_classes: The model's outputs.
        has_pairs: Whether images are blended by twos.

    Raises:
        ValueError: If it cannot.
    """
    name = type(data).__name__
    if hasattr(data, "vocab_size") and not hasattr(data, "num_classes"):
        raise ValueError(f"{task} learns from images of classes, and {name} has text. Give it an ImageDataModule.")
    classes = getattr(data, "num_classes", None)
    if isinstance(classes, int) and classes > num_classes:
        raise ValueError(
            f"The images of {name} are of {classes} classes, and the model has {num_classes} outputs. Build it with "
            f"num_classes={classes}."
        )
    patches: Any = getattr(model, "patch_embed", None)
    channels = getattr(getattr(patches, "proj", None), "in_channels", None)
    given = getattr(data, "in_chans", None)
    if isinstance(given, int) and isinstance(channels, int) and given != channels:
        raise ValueError(
            f"The images of {name} have {given} channels (in_chans), and the model takes {channels}. Build it with "
            f"in_chans={given}."
        )
    side, size = getattr(data, "image_size", None), getattr(patches, "img_size", None)
    is_fixed = getattr(patches, "strict_img_size", False)
    if isinstance(side, int) and is_fixed and isinstance(size, tuple) and size != (side, side):
        raise ValueError(
            f"The images of {name} are {side} pixels a side (image_size), and the model takes {size[0]}. Build it with "
            f"image_size={side}."
        )
    batch_size = getattr(data, "batch_size", None)
    if has_pairs and isinstance(batch_size, int) and batch_size % 2:
        raise ValueError(
            f"mixup and cutmix blend images by twos, and the batch_size of {name} is {batch_size}. Make it even."
        )


def check_image_batch(task: str, batch: Any) -> None:
    """Check that a batch is one of images and their classes.

    Args:
        task: Name of the task, for messages.
        batch: The batch.

    Raises:
        TypeError: If it is not.
    """
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not is_pair or batch[0].ndim != 4 or batch[1].ndim != 1:
        raise TypeError(
            f"{task} wants batches of two tensors, images of shape (batch, channels, height, width) and their classes "
            f"of shape (batch,), and got {_of(batch)}."
        )


def _of(value: Any) -> str:
    """Describe a value by its types and shapes."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(map(_of, value[:3])) or 'nothing'}"
    return f"a {type(value).__name__}"
