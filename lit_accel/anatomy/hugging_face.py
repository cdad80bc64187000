"""What all Hugging Face families share: reading a table of layouts against a model, and rebuilding from a config."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from lit_accel.anatomy.base import Anatomy, AnatomyError, Attention, Block, Residual, Size
from lit_accel.anatomy.build import build_without_init
from lit_accel.anatomy.hugging_face_attention import attend_with, own_implementation
from lit_accel.anatomy.layouts import Entry, read_layouts, tied_groups

# What attention kernels are given of packed sequences, by all models.
_PACKING = {
    **{name: name for name in ("cu_seq_lens_q", "cu_seq_lens_k")},
    **{f"max_length_{side}": f"cu_seq_lens_{side}" for side in ("q", "k")},
}


@dataclass(frozen=True)
class HuggingFaceFamily:
    """A Hugging Face family, as data.

    Args:
        name: The family's name.
        container: The path of the list of blocks within the base model.
        block: Layouts of a block's parameters, by their names within it.
        body: Layouts of the base model's other parameters.
        heads: Layouts of the parameters outside the base model.
        fold: Parameters of the last norm before a tied head, by full name; they carry the head's width factor.
        per_sequence: Parameters that are applied once a sequence rather than once a token.
        embedding: The table, within the base model, that a head may be tied to.
        residual: The form of the residual blocks.
        branch_outputs: See :class:`~lit_accel.anatomy.base.Block`.
        token_dims: See :class:`~lit_accel.anatomy.base.Block`.
        width_axes: See :class:`~lit_accel.anatomy.base.Anatomy`.
        axes: The axis sizes that a config stands for.
        attention: The attention of the block of an index, from the config.
        resize: Writes a size into a (copied) config.
        numbering: See :class:`~lit_accel.anatomy.base.Block`.
        attributes: See there.
    """

    name: str
    container: str
    block: Mapping[str, str]
    body: Mapping[str, str]
    heads: Mapping[str, str]
    fold: tuple[str, ...]
    per_sequence: frozenset[str]
    embedding: str
    residual: Residual
    branch_outputs: frozenset[str]
    token_dims: Mapping[str, tuple[int, ...]]
    width_axes: tuple[tuple[str, ...], ...]
    axes: Callable[[Any], dict[str, int]]
    attention: Callable[[Any, int], Attention]
    resize: Callable[[Any, Size], None]
    # Blocks get rotary tables ready-made; what else numbers tokens is for kernels that look for packed sequences.
    numbering: frozenset[str] = frozenset({"position_ids", "cache_position"})
    attributes: Mapping[str, str] = field(default_factory=dict)

    def describe(self, model: nn.Module) -> Anatomy:
        """Return the anatomy of a model of this family.

        Raises:
            AnatomyError: If the model has a parameter without a layout, or of another shape than its layout says.
        """
        config: Any = model.config
        axes = self.axes(config)
        num_blocks = config.num_hidden_layers
        base: Any = getattr(model, "base_model_prefix", "")
        prefix = f"{base}." if isinstance(getattr(model, base, None), nn.Module) else ""
        container = f"{prefix}{self.container}"
        num_found = len(cast(nn.ModuleList, model.get_submodule(container)))
        if num_found != num_blocks:
            raise AnatomyError(
                f"{type(model).__name__} has {num_found} blocks in {container}, and its config says {num_blocks}. If "
                f"blocks were taken out, say so there: model.config.num_hidden_layers = {num_found}."
            )
        blocks = tuple(
            Block(
                path=f"{container}.{index}",
                stage=0,
                residual=self.residual,
                attention=self.attention(config, index),
                token_dims=self.token_dims,
                branch_outputs=self.branch_outputs,
                # Kernels for padded sequences get them so; masks of pairs have four dimensions in every model.
                flat_masks_are_of_tokens=True,
                numbering=self.numbering & self.token_dims.keys(),
                packing=_PACKING,
                attributes=self.attributes,
            )
            for index in range(num_blocks)
        )
        tied = tied_groups(model)
        embedding = f"{prefix}{self.embedding}"
        is_tied = any(embedding in group for group in tied)

        def entry_of(name: str) -> Entry | None:
            text, block = self._layout_text(name, prefix, container)
            if text is None:
                return None
            return Entry(
                layout=text,
                block=block,
                fold="embed" if is_tied and name in self.fold else None,
                place="sequence" if name in self.per_sequence else "token",
            )

        parameters = read_layouts(model, self.name, axes, entry_of)
        if is_tied and not any(layout.fold for layout in parameters.values()):
            raise AnatomyError(
                f"{type(model).__name__} ties its head to {embedding!r}, but none of {self.fold} is there to carry the "
                "factor of a width change."
            )
        return Anatomy(
            family=self.name,
            size=Size(axes, (num_blocks,)),
            blocks=blocks,
            parameters=parameters,
            tied=tied,
            tied_heads=(embedding,) if is_tied else (),
            width_axes=self.width_axes,
            build=self._build,
            input_shape=_input_shape,
            attend=attend_with if all(block.attention.causal for block in blocks) else None,
        )

    def _layout_text(self, name: str, prefix: str, container: str) -> tuple[str | None, int | None]:
        if name.startswith(f"{container}."):
            index, _, local = name.removeprefix(f"{container}.").partition(".")
            return self.block.get(local), int(index)
        if name.startswith(prefix) and (text := self.body.get(name.removeprefix(prefix))) is not None:
            return text, None
        return self.heads.get(name), None

    def _build(self, model: nn.Module, size: Size) -> nn.Module:
        config: Any = copy.deepcopy(model.config)
        # Another kernel is for the model that it was given to.
        config._attn_implementation = own_implementation(model, config._attn_implementation)
        self.resize(config, size)
        resized = build_without_init(lambda: type(model)(config))
        for path, module in model.named_modules():
            # A choice of whoever built the model, of which its config knows nothing.
            if getattr(module, "pooler", module) is None:
                setattr(resized.get_submodule(path), "pooler", None)  # noqa: B010 - torch knows no such attribute
        generation_config = getattr(model, "generation_config", None)
        if generation_config is not None:
            resized.generation_config = copy.deepcopy(generation_config)
        # What is set with `model.loss_function = ...`.
        if "_loss_function" in vars(model):
            resized._loss_function = vars(model)["_loss_function"]
        return resized


def resized_layer_types(config: Any, num_blocks: int) -> None:
    """Shorten or lengthen ``config.layer_types``, which names the attention of each block.

    Raises:
        AnatomyError: If blocks of different types would be merged.
    """
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return
    if len(set(layer_types)) > 1:
        raise AnatomyError(
            f"The blocks of this model attend in different ways ({', '.join(sorted(set(layer_types)))}), so its depth "
            "cannot be changed by merging them. Use depth factor 1."
        )
    config.layer_types = [layer_types[0]] * num_blocks


def tokens_at_a_time(model: nn.Module) -> int:
    """Return into chunks of how many tokens blocks cut a sequence, which these must divide; 0 where they do not."""
    return getattr(getattr(model, "config", None), "chunk_size_feed_forward", 0)


def is_causal(config: Any) -> bool:
    """Whether a decoder attends to earlier tokens alone; ``is_causal=False`` makes an encoder of it."""
    return getattr(config, "is_causal", True) is not False


def _input_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    inputs = kwargs.get("input_ids")
    if inputs is None and args:
        inputs = args[0]
    if inputs is not None:
        shape = inputs.shape
    elif (embeds := kwargs.get("inputs_embeds")) is not None:
        shape = embeds.shape[:-1]
    else:
        raise AnatomyError("The forward call had neither input_ids nor inputs_embeds: its tokens cannot be counted.")
    # GPT-2 takes several sequences a sample, of the choices of a question say, and runs them as one batch.
    return math.prod(shape[:-1]), shape[-1]
