"""Build a Hugging Face model from a name, and refuse what transformers would silently accept."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

# Published models pad their embeddings for speed (GPT-J 0.3 %, Phi-2 1.8 %), so a slightly smaller vocabulary
# is the model's own. One that is smaller by more belongs to another tokenizer.
_LARGEST_PADDING = 0.05


def build_transformer(
    auto_class: Any,
    model: str,
    *,
    pretrained: bool = True,
    overrides: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> PreTrainedModel:
    """Build a model in training mode, in torch's default dtype.

    Args:
        auto_class: The ``transformers`` auto class that chooses the head, such as ``AutoModelForCausalLM``.
        model: A folder written by ``save_pretrained``; or a model type known to transformers (``"gpt2"``,
            ``"bert"``, ...), always built with random weights; or a name on the hub. A name that is both is a
            model type: write ``openai-community/gpt2`` for the published GPT-2.
        pretrained: Whether to take the weights of a folder or hub model, or only its configuration.
        overrides: Configuration fields to set.
        vocab_size: Tokens of the data's vocabulary. Sets the size of a randomly initialised model and is
            checked against that of a pretrained one. ``None`` keeps the configuration's.

    Returns:
        The model.

    Raises:
        ValueError: If ``model`` cannot be found, ``overrides`` names an unknown field, or ``vocab_size``
            contradicts ``overrides`` or the vocabulary of the pretrained weights.
    """
    fields = dict(overrides or {})
    if vocab_size is not None and fields.get("vocab_size", vocab_size) != vocab_size:
        raise ValueError(
            f"overrides says vocab_size={fields['vocab_size']}, but the data's vocabulary has {vocab_size} "
            "tokens. Leave it out of overrides."
        )
    is_type = not Path(model).is_dir() and model in CONFIG_MAPPING
    published = AutoConfig.for_model(model) if is_type else _published_config(model)
    _check_fields(published, fields)

    has_weights = pretrained and not is_type
    if has_weights:
        _check_vocabulary(model, published, vocab_size)
    elif vocab_size is not None:
        fields["vocab_size"] = vocab_size
    if "vocab_size" in fields:
        # Published special tokens that lie beyond a smaller vocabulary would be looked up in vain.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(published, name, None)
            if isinstance(token, int) and token >= fields["vocab_size"]:
                fields.setdefault(name, None)

    dtype = {} if "dtype" in fields else {"dtype": torch.get_default_dtype()}
    if is_type:
        transformer = auto_class.from_config(AutoConfig.for_model(model, **fields), **dtype)
    else:
        config = AutoConfig.from_pretrained(model, **fields)
        if has_weights:
            transformer = auto_class.from_pretrained(model, config=config, **dtype)
        else:
            transformer = auto_class.from_config(config, **dtype)
    # from_pretrained returns the model in evaluation mode, and Lightning leaves modes as it finds them.
    return transformer.train()


def _published_config(model: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        close = difflib.get_close_matches(model, CONFIG_MAPPING.keys())
        hint = f" Did you mean the model type {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"model={model!r} is no model type of transformers, no folder written by save_pretrained, and no "
            f"model that could be fetched from the hub.{hint} The hub said: {error}"
        ) from error


def _check_fields(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> None:
    known = {name for name in vars(config) if not name.startswith("_")}
    known |= set(config.attribute_map) | {"attn_implementation"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        hints = []
        for name in unknown:
            close = difflib.get_close_matches(name, known, cutoff=0.5)
            hints.append(f"{name!r} (did you mean {' or '.join(map(repr, close))}?)" if close else repr(name))
        raise ValueError(
            f"{type(config).__name__} has no field {', '.join(hints)}. Its fields: {', '.join(sorted(known))}."
        )


def _check_vocabulary(model: str, config: PreTrainedConfig, vocab_size: int | None) -> None:
    rows = config.vocab_size
    if vocab_size is not None and not rows * (1 - _LARGEST_PADDING) <= vocab_size <= rows:
        raise ValueError(
            f"The weights of {model!r} were trained with a vocabulary of {rows} tokens, but the data's has "
            f"{vocab_size}. Read the data with the model's own tokenizer (data.init_args.tokenizer: the same "
            "folder), or start from random weights of the same shape with pretrained: false."
        )
