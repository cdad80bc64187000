"""From text to token ids: bytes, a byte-level BPE trained on the spot, or a tokenizer that somebody saved.

All three are a `transformers.PreTrainedTokenizerFast`, so that what a model was trained with can be shipped with it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# One set for both objectives: five rows of an embedding cost nothing, and the token files can be shared.
SPECIAL_TOKENS = {
    "eos_token": "<|endoftext|>",
    "pad_token": "<|pad|>",
    "unk_token": "<|unk|>",
    "cls_token": "<|cls|>",
    "sep_token": "<|sep|>",
    "mask_token": "<|mask|>",
}
BYTES_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# A bare tokenizer.json does not say what its special tokens are for, so their usual names must.
_USUAL_NAMES = {
    "eos_token": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]"),
    "mask_token": ("<|mask|>", "[MASK]", "<mask>"),
    "pad_token": ("<|pad|>", "[PAD]", "<pad>"),
}

Encoder = Callable[[list[str]], list[np.ndarray]]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0 to 255 are the bytes of the UTF-8 text, followed by the special tokens."""
    # The `tokenizers` library spells each byte as a printable character; this is its (GPT-2's) spelling.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = _byte_level(models.BPE({spelling[byte]: byte for byte in range(256)}, []), use_regex=False)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE, as of GPT-2 (Radford et al. 2019).

    Args:
        texts: What to train on, read once.
        vocab_size: Number of tokens, the special ones included, at least 262. Very little text may not have enough
            pairs to merge; the tokenizer is then smaller.
    """
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a tokenizer.json file, a folder, or the Hugging Face hub.

    Raises:
        ValueError: If there is none, if it is not a fast one, or if it has no token for the end of a text.
    """
    tokenizer: Any
    path = Path(name).expanduser()
    if path.is_file() and (path.parent / "tokenizer_config.json").is_file():
        path = path.parent  # which also says what the special tokens are for
    if path.is_file():
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no other kind
            raise ValueError(
                f"tokenizer={name!r} is no tokenizer.json that the tokenizers library can read ({error}); save one with"
                " tokenizer.save_pretrained(folder), and give that folder"
            ) from error
        known = {
            role: next((token for token in names if backend.token_to_id(token) is not None), None)
            for role, names in _USUAL_NAMES.items()
        }
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, **{role: token for role, token in known.items() if token}
        )
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path) if path.exists() else name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f'tokenizer={name!r} could not be loaded; it must be "bytes", "bpe", a tokenizer.json file, or a'
                " folder or hub name that transformers.AutoTokenizer can read"
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer={name!r} is a {type(tokenizer).__name__}, which has no fast (Rust) implementation;"
            " save it with a tokenizer.json, or use another one"
        )
    end_of_text_id(tokenizer)
    if num_ids(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # Of a folder that save_pretrained of a model wrote, transformers makes one that knows no text.
        raise ValueError(
            f"tokenizer={name!r} has special tokens and no others, so that nothing of a text would be left; save a"
            " tokenizer there with tokenizer.save_pretrained(folder), or use another one"
        )
    return tokenizer


def end_of_text_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that stands between documents: end of text, or the separator where (as in BERT) there is no such.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if token_id is None:
        raise ValueError(
            "the tokenizer has neither an eos_token nor a sep_token to put between documents; load it with"
            ' transformers, set `tokenizer.eos_token = "..."`, save_pretrained() it, and give that folder'
        )
    return int(token_id)


def num_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id: more than there are tokens, where some were taken out of a vocabulary."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encoder(tokenizer: PreTrainedTokenizerFast, *, raw_bytes: bool) -> Encoder:
    """Makes the function that encodes a corpus: texts to one array of ids each, with no special token in them.

    Text that merely spells a special token (as documentation of tokenizers does) is encoded as ordinary text.

    Args:
        tokenizer: The tokenizer; it is copied, not changed.
        raw_bytes: It is the one of `byte_tokenizer`, so that the ids are known without running it.
    """
    if raw_bytes:
        # The general way gives the same ids, and allocates some hundred bytes for each byte of text.
        return lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [
        np.array(encoding.ids, dtype=np.uint32)
        for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
    ]


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of which token each id stands for; a model only makes sense with ids of the same meaning."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest()


def _byte_level(model: models.Model, *, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
