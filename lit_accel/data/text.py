"""`TextDataModule`: text from a file, the standard library or a Hugging Face dataset, ready for a language model."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lit_accel.arguments import is_number, is_whole
from lit_accel.data.corpus import Corpus, CorpusSettings, build_corpus, corpus_folder, load_corpus
from lit_accel.data.masking import mask_tokens
from lit_accel.data.resuming import Part, ResumableDataModule, require
from lit_accel.data.sources import TextSource, open_source
from lit_accel.data.tokenizers import (
    BYTES_VOCAB_SIZE,
    byte_tokenizer,
    load_tokenizer,
    num_ids,
    vocabulary_fingerprint,
)
from lit_accel.data.windows import EvaluationSampler, TokenWindows, TrainingSampler, WindowTransform
from lit_accel.draws import generator

_MASKS = 2  # sets the draws of the masks apart from other draws with the same seed
_PARTS = ("train", "val")


class TextDataModule(ResumableDataModule):
    """Text as windows of tokens, for causal or masked language modelling.

    A batch is a dict of `input_ids` and `labels`, both int64 of shape (batch_size, block_size). There is no
    padding and so no attention mask: windows are cut from all documents joined with an end-of-text token.

    - Causal: `labels` equals `input_ids`. Hugging Face models shift the labels by one position inside; a model
      that does not must do it itself.
    - Masked: `labels` holds the original token at the selected positions and -100 at all others. See
      `lit_accel.data.masking`. A mask depends on `(seed, epoch, window)` only, whatever the batch size, number
      of processes or workers. What is held out has the same masks in every epoch and with every seed, so that losses of
      runs that differ in their seed can be compared.

    The tail of the text is held out, before anything is shuffled, and serves validation, test and prediction.
    In training each epoch visits each window once, shuffled by `(seed, epoch)`, in full batches of the same number
    on every process; what is left over differs from epoch to epoch. Processes get disjoint windows, also with
    `Trainer(use_distributed_sampler=False)`.

    A checkpoint holds the position in the data, so that training resumes with exactly the next batch, in the middle
    of an epoch too. The position counts windows; with another batch size or number of processes no window is
    repeated, but Lightning, which counts batches, ends that epoch early. A resume with a tokenizer whose ids mean
    something else is refused; one on another text, or with another block_size or seed, starts its epoch at the
    beginning, with a warning.

    Tokens are made once and cached; see `lit_accel.data.corpus`. Without a Trainer, in a plain loop:

        >>> data = TextDataModule(max_bytes=100_000, block_size=64)
        >>> data.prepare_data(); data.setup("fit")  # doctest: +SKIP
        >>> batch = next(iter(data.train_dataloader()))  # doctest: +SKIP

    and call `set_position` before `train_dataloader` to choose the epoch.

    Args:
        source: Where the text comes from. "stdlib" is the Python sources of the running interpreter's standard
            library, without tests: about 12 MB that every machine has. "hf:NAME" is a Hugging Face dataset, on the
            hub or in a folder written by `save_to_disk`; it needs `pip install "lit-accel[hub]"`. Anything else is
            the path of a text file, or of a folder of text files, each of them one document.
        tokenizer: "bytes" is the 256 byte values and 6 special tokens. "bpe" trains a byte-level BPE on the part of
            the text that is not held out. Anything else is a saved tokenizer: a tokenizer.json file, or a folder or
            hub name for `transformers.AutoTokenizer`.
        vocab_size: Tokens of the "bpe" tokenizer, the special ones included; at least 262. Not used by others.
        block_size: Tokens in a window.
        batch_size: Windows in a batch of one process.
        objective: "causal" or "masked".
        mask_probability: Share of the tokens that are to be restored, for the masked objective.
        val_fraction: Share of the text, at its end, that is held out.
        val_batches: Evaluate on the windows of so many batches only, in all processes together, evenly spread over
            the held-out text; None is all of them.
        seed: Seed of the order and of the masks of training.
        num_workers: Processes that load data, for each training process; 0 loads in the training process.
        cache_dir: Folder of token files and trained tokenizers.
        max_bytes: Use only the first so many bytes of the text, for quick tests; None is all.
        file_pattern: Which files of a folder to read, also in folders inside of it.
        text_column: Column of a dataset that holds the text.
        dataset_config: Configuration of a dataset on the hub, where it has several.
        split: Split of a dataset.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        source: str = "stdlib",
        tokenizer: str = "bpe",
        vocab_size: int = 4096,
        block_size: int = 256,
        batch_size: int = 16,
        objective: Literal["causal", "masked"] = "causal",
        mask_probability: float = 0.15,
        val_fraction: float = 0.05,
        val_batches: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | Path = ".cache/lit_accel",
        max_bytes: int | None = None,
        file_pattern: str = "*.txt",
        text_column: str = "text",
        dataset_config: str | None = None,
        split: str = "train",
    ) -> None:
        super().__init__(batch_size, val_batches, seed, num_workers)
        require("objective", objective, objective in ("causal", "masked"), '"causal" or "masked"')
        for name, share in (("mask_probability", mask_probability), ("val_fraction", val_fraction)):
            require(name, share, is_number(share) and 0 < share < 1, "a number between 0 and 1")
        at_least_2 = "a whole number, at least 2, a token and the one that follows"
        require("block_size", block_size, is_whole(block_size, 2), at_least_2)
        require("max_bytes", max_bytes, max_bytes is None or is_whole(max_bytes, 2), "None or at least 2")
        if tokenizer == "bpe":
            needed = f"a whole number, at least {BYTES_VOCAB_SIZE}, the bytes and the special tokens"
            require("vocab_size", vocab_size, is_whole(vocab_size, BYTES_VOCAB_SIZE), needed)
        self.block_size = block_size
        self.objective = objective
        self.mask_probability = mask_probability
        self.cache_dir = Path(cache_dir).expanduser()
        self._settings = CorpusSettings(tokenizer, vocab_size, val_fraction, max_bytes)
        self._source_arguments: dict[str, Any] = {
            "source": source,
            "file_pattern": file_pattern,
            "text_column": text_column,
            "dataset_config": dataset_config,
            "split": split,
        }

    @cached_property
    def vocab_size(self) -> int:
        """Number of rows that the model's embedding needs; known before anything is prepared."""
        if self._settings.tokenizer == "bpe":
            return self._settings.vocab_size
        return num_ids(self.tokenizer)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; "bpe" has one once `prepare_data` has run."""
        if self._settings.tokenizer == "bytes":
            return byte_tokenizer()
        if self._settings.tokenizer == "bpe":
            _ = self._corpus  # says what to do if there is none yet
            return load_tokenizer(str(self._folder / "tokenizer"))
        return load_tokenizer(self._settings.tokenizer)

    def save_tokenizer(self, folder: str | Path) -> None:
        """Saves the tokenizer for `transformers.AutoTokenizer.from_pretrained(folder)`."""
        self.tokenizer.save_pretrained(folder)

    def prepare_data(self) -> None:
        """Trains the tokenizer and encodes the text, unless the cache has them. Lightning calls it on one process."""
        build_corpus(self._folder, self._open_source(), self._settings)

    def setup(self, stage: str) -> None:
        """Finds the token files, and starts at the beginning of the data.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            RuntimeError: If `prepare_data` has not made the token files.
            ValueError: If the objective is masked and the tokenizer has no mask token.
        """
        _ = self._corpus  # says what to do if there is none
        if self.objective == "masked" and self.tokenizer.mask_token_id is None:
            raise ValueError(
                'objective="masked" needs a tokenizer with a mask token, and'
                f' tokenizer="{self._settings.tokenizer}" has none; use "bpe" or "bytes", or add one and save it'
            )
        super().setup(stage)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and what it is a position in."""
        tokens = self._corpus.tokens_fingerprint
        facts = {"tokens": tokens, "vocabulary": self._vocabulary, "block_size": self.block_size}
        return {**super().state_dict(), **facts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a position. Call it after `setup("fit")`, as Lightning does.

        Raises:
            ValueError: If the checkpoint was trained with other token ids.
        """
        if state_dict["vocabulary"] != self._vocabulary:
            raise ValueError(
                "the checkpoint was trained with another tokenizer, so its embedding belongs to other tokens; set"
                " tokenizer= to the folder where save_tokenizer() put the one it was trained with (it also lies in"
                " the cache_dir of that run), or load only the weights if this is meant"
            )
        changed = None
        if state_dict["tokens"] != self._corpus.tokens_fingerprint:
            changed = "the checkpoint was trained on another text, or with another max_bytes or val_fraction"
        elif (block_size := state_dict.get("block_size", self.block_size)) != self.block_size:
            changed = f"the checkpoint was trained on windows of {block_size} tokens (block_size)"
        self._take_up(state_dict, changed)

    def _open_source(self) -> TextSource:
        return open_source(**self._source_arguments)

    @cached_property
    def _folder(self) -> Path:
        return corpus_folder(self.cache_dir, self._open_source(), self._settings)

    @cached_property
    def _corpus(self) -> Corpus:
        corpus = load_corpus(self._folder)
        if corpus is None:
            raise RuntimeError(
                f"there are no token files in {self._folder}; call prepare_data() first, and give all processes of"
                " a machine the same source and cache_dir"
            )
        return corpus

    @cached_property
    def _vocabulary(self) -> str:
        return vocabulary_fingerprint(self.tokenizer)

    def dataset(self, part: Part) -> TokenWindows:
        """The windows of the training text or of the held-out text."""
        corpus = self._corpus
        num_tokens = corpus.num_train_tokens if part == "train" else corpus.num_val_tokens
        path = self._folder / f"{part}.bin"
        return TokenWindows(path, corpus.dtype, num_tokens, self.block_size, self._transform(part))

    def _training_sampler(self, dataset: TokenWindows, **position: Any) -> TrainingSampler:
        return TrainingSampler(dataset, self.batch_size, **position)

    def _evaluation_sampler(self, dataset: TokenWindows, max_samples: int | None) -> EvaluationSampler:
        return EvaluationSampler(dataset, **self._replicas(), max_windows=max_samples)

    def _transform(self, part: str) -> WindowTransform:
        if self.objective == "causal":
            return _causal
        mask_id = self.tokenizer.mask_token_id
        assert isinstance(mask_id, int)  # setup has checked
        return partial(
            _masked,
            keys=(self.seed if part == "train" else 0, _MASKS, _PARTS.index(part)),
            mask_id=mask_id,
            num_tokens=num_ids(self.tokenizer),
            special_ids=torch.tensor(self.tokenizer.all_special_ids),
            probability=self.mask_probability,
        )


def _causal(ids_t: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
    return ids_t, ids_t.clone()


def _masked(ids_t: Tensor, epoch: int, index: int, *, keys: tuple[int, ...], **settings: Any) -> tuple[Tensor, Tensor]:
    return mask_tokens(ids_t, generator(*keys, epoch, index), **settings)
