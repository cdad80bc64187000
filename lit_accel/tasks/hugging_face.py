"""Build a Hugging Face model from a name, and refuse what transformers would silently accept."""

import difflib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_accel.arguments import require_whole

# Published models pad their embeddings for speed (GPT-J 0.3 %, Phi-2 1.8 %), so a slightly smaller vocabulary
# is the model's own. One that is smaller by more belongs to another tokenizer.
_LARGEST_PADDING = 0.05
# Sizes that a model must have, by the names that most configurations know beside their own.
_COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
# What transformers and torch raise where a configuration is none that a model can be built from.
_UNBUILDABLE = (
    ValueError,
    TypeError,
    KeyError,
    ZeroDivisionError,
    RuntimeError,
    OSError,
    SafetensorError,
    StrictDataclassError,
)


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
        ValueError: If ``model`` cannot be found or built, ``overrides`` names an unknown field, or ``vocab_size``
            contradicts ``overrides`` or the vocabulary of the pretrained weights.
    """
    if not isinstance(model, str) or not model:
        raise ValueError(f"model is {model!r}; it is a model type such as 'gpt2', a folder, or a name on the hub.")
    if model.startswith("~"):
        model = str(Path(model).expanduser())
    if vocab_size is not None:
        require_whole("vocab_size", vocab_size, 1)
    fields = dict(overrides or {})
    if vocab_size is not None and fields.get("vocab_size", vocab_size) != vocab_size:
        raise ValueError(
            f"overrides says vocab_size={fields['vocab_size']}, but the data's vocabulary has {vocab_size} "
            "tokens. Leave it out of overrides."
        )
    is_type = _is_type(model)
    published = AutoConfig.for_model(model) if is_type else _published_config(model)
    _check_head(auto_class, model, published)
    _check_fields(published, fields)

    has_weights = takes_weights(model, pretrained)
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
    with _explained(model, overrides or {}):
        if is_type:
            transformer = auto_class.from_config(AutoConfig.for_model(model, **fields), **dtype)
        else:
            config = AutoConfig.from_pretrained(model, **fields)
            # A plan needs none, and transformers loads none to the meta device.
            if has_weights and torch.empty(0).device.type != "meta":
                transformer = auto_class.from_pretrained(model, config=config, **dtype)
            else:
                transformer = auto_class.from_config(config, **dtype)
    _check_direction(auto_class, model, transformer.config)
    # from_pretrained returns the model in evaluation mode, and Lightning leaves modes as it finds them.
    return transformer.train()


def takes_weights(model: str, pretrained: bool) -> bool:
    """Whether :func:`build_transformer` takes trained weights.

    Args:
        model: See there.
        pretrained: See there.
    """
    return pretrained and not _is_type(model)


def take_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: Collection[str] = ()
) -> None:
    """Tell a model that was built with random weights which of its tokens begin, end and pad a text.

    Its configuration names those of the vocabulary that its type was published with, and the row of its embedding that
    is not trained, where there is one, is that of another token.

    Args:
        model: The model.
        tokenizer: The tokenizer of the data.
        given: Fields of the configuration that somebody has chosen; they stay.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    for name, token in ids.items():
        if name in given:
            continue
        # Encoders have none.
        if (generation := getattr(model, "generation_config", None)) is not None:
            setattr(generation, name, token)
        embedding = model.get_input_embeddings()
        if name != "pad_token_id":
            setattr(model.config, name, token)
        elif embedding.padding_idx is not None and not _counts_from_padding(model):
            embedding.padding_idx = model.config.pad_token_id = token


def _counts_from_padding(model: PreTrainedModel) -> bool:
    """Whether positions begin after the id of the padding, as RoBERTa's do: it is part of how the model is built."""
    return any("padding_idx" in vars(module) for module in model.modules() if not isinstance(module, nn.Embedding))


def _is_type(model: str) -> bool:
    return not Path(model).is_dir() and model in CONFIG_MAPPING


@contextmanager
def _explained(model: str, fields: Mapping[str, Any]) -> Iterator[None]:
    """Say of which model it is that an error speaks, and what to change."""
    try:
        yield
    except _UNBUILDABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"there is no {reason}" if isinstance(error, KeyError) else reason
        given = f" with overrides {dict(fields)}" if fields else ""
        what = "Change overrides" if fields else "Choose another"
        if fields and "ignore_mismatched_sizes" in reason:
            # What transformers advises would leave layers of it random, without another word.
            reason = "with these overrides its weights have other shapes"
            what = "Overrides of a trained model must not change its sizes: set overrides: null, or pretrained: false"
        if "no file named" in reason.lower():
            what = "To train from random weights set pretrained: false"
        elif isinstance(error, SafetensorError):
            what = "Its weights are damaged; fetch or save them again"
        raise ValueError(f"model={model!r} cannot be built{given}: {reason.rstrip('.')}. {what}.") from error


def _published_config(model: str) -> PreTrainedConfig:
    path = Path(model).expanduser()
    is_path = model.startswith((".", "/", "~")) or path.is_dir()
    if is_path and not path.is_dir():
        raise ValueError(
            f"There is no folder {model}, given as model. Give a folder that save_pretrained wrote, a model type of "
            "transformers such as gpt2, or a name on the hub."
        )
    try:
        return AutoConfig.from_pretrained(str(path) if is_path else model)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        if is_path:
            raise ValueError(
                f"The folder {model}, given as model, has no configuration that transformers can read: {reason}. Give "
                "a folder that save_pretrained wrote."
            ) from error
        close = difflib.get_close_matches(model, CONFIG_MAPPING.keys())
        hint = f" Did you mean the model type {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"model={model!r} is no model type of transformers, no folder written by save_pretrained, and no "
            f"model that could be fetched from the hub.{hint} The hub said: {reason}."
        ) from error


def _check_head(auto_class: Any, model: str, config: PreTrainedConfig) -> None:
    if type(config) not in auto_class._model_mapping and not getattr(config, "auto_map", None):
        raise ValueError(
            f"model={model!r} has no head for this task: transformers has no {auto_class.__name__} of a "
            f"{type(config).__name__}. Choose a model of the kind that the task trains, such as gpt2 for the next "
            "token and bert for masked ones."
        )


def _check_direction(auto_class: Any, model: str, config: PreTrainedConfig) -> None:
    """Refuse an encoder for the next token: each of its positions sees the token that it is to predict."""
    # Of a built model: decoders of encoder-decoder models say so only then, and some that are nothing else never do.
    is_encoder = type(config) in AutoModelForMaskedLM._model_mapping and getattr(config, "is_decoder", None) is False
    if auto_class is AutoModelForCausalLM and is_encoder:
        raise ValueError(
            f"model={model!r} is an encoder, in which every position sees those after it, and so the token that it is "
            "to predict. Train it with MaskedLM, make a decoder of it with overrides: {is_decoder: true}, or choose a "
            "decoder such as gpt2."
        )


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
            f"overrides: {type(config).__name__} has no field {', '.join(hints)}. Its fields: "
            f"{', '.join(sorted(known))}."
        )
    counts = {*_COUNTS, *(config.attribute_map.get(count, count) for count in _COUNTS)}
    for name in counts & set(overrides):
        require_whole(f"{name} of overrides", overrides[name], 1)


def _check_vocabulary(model: str, config: PreTrainedConfig, vocab_size: int | None) -> None:
    rows = config.vocab_size
    if vocab_size is not None and not rows * (1 - _LARGEST_PADDING) <= vocab_size <= rows:
        raise ValueError(
            f"The weights of {model!r} were trained with a vocabulary of {rows} tokens, but the data's has "
            f"{vocab_size}. Read the data with the model's own tokenizer (data.init_args.tokenizer: the same "
            "folder), or start from random weights of the same shape with pretrained: false."
        )
