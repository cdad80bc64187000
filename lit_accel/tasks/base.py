"""What causal and masked language modeling have in common.

Shapes: b batch, t tokens, v vocab.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_accel.tasks.cross_entropy import cross_entropy_sum
from lit_accel.tasks.data_fit import check_text, check_text_batch
from lit_accel.tasks.hugging_face import build_transformer, take_special_tokens, takes_weights
from lit_accel.tasks.metrics import SampleMean, TokenPerplexity
from lit_accel.tasks.transformer_task import TransformerTask

# The label of a position without a target, by the convention of Hugging Face and of torch's cross entropy.
IGNORED_LABEL = -100


def token_cross_entropy(logits_btv: Tensor, targets_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the positions that have a target.

    Args:
        logits_btv: Scores of each token of the vocabulary, shape (b, t, v).
        targets_bt: Token to predict at each position, -100 where there is none, shape (b, t).

    Returns:
        The mean in nats, a scalar, 0 if no position has a target; and the number of positions that have one.
    """
    num_targets = (targets_bt != IGNORED_LABEL).sum()
    total = cross_entropy_sum(logits_btv.flatten(0, 1), targets_bt.flatten(), IGNORED_LABEL)
    return total / num_targets.clamp(min=1), num_targets


class LanguageModeling(TransformerTask):
    """A Hugging Face language model with its loss, held-out metrics and optimizer; base of the tasks.

    The transformer is the attribute ``model``; its parameters are all this module has. A batch is a mapping
    with ``input_ids`` and ``labels``, both of shape (batch, tokens), and optionally ``attention_mask``.

    Logged: ``train/loss`` each step; over the whole held-out set, each token weighing the same, ``val/loss``
        (nats),
    ``val/perplexity`` (its exponential) and ``val/accuracy`` (share of targets that score highest), and the
    same under ``test/``.

    Args:
        model: A model type known to transformers (``"gpt2"``, ``"llama"``, ``"qwen3"``, ``"bert"``, ...),
            built with random weights; or a folder written by ``save_pretrained``; or a name on the hub.
        pretrained: Whether to take the weights of a folder or hub model, or only its configuration.
        overrides: Fields of the model's configuration to set, such as ``{n_layer: 4, n_embd: 256}``.
        vocab_size: Tokens of the vocabulary. The command line links it from the data; ``None`` keeps the
            model's.
        optimizer: Makes the optimizer from parameter groups. Default: AdamW with torch's own settings.
        lr_scheduler: Makes a scheduler from the optimizer, stepped every optimizer step (Lightning's
            ``ReduceLROnPlateau``: at the end of each epoch). ``None``, the default, keeps the rate constant.
        weight_decay: Decay of parameters with two or more dimensions; the others have none. ``None``, the
            default, leaves it to the optimizer's own argument.
        compile_blocks: Whether to ``torch.compile`` each block of the transformer. Needs a registered
            anatomy.

    Raises:
        ValueError: If ``model`` cannot be found, ``overrides`` names an unknown field, or ``vocab_size`` is
            not that of the pretrained weights.
    """

    #: The ``transformers`` auto class that puts the right head on a model.
    auto_class: ClassVar[Any]
    #: What the data is to ask for, ``"causal"`` or ``"masked"``.
    objective: ClassVar[str]

    def __init__(
        self,
        model: str,
        pretrained: bool = True,
        overrides: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weight_decay: float | None = None,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, weight_decay, compile_blocks)
        # Callables are no primitives: with them a checkpoint could not be read with weights_only=True.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.model = build_transformer(
            self.auto_class, model, pretrained=pretrained, overrides=overrides, vocab_size=vocab_size
        )
        # Not from the hyperparameters: on the command line they are those of a subclass.
        self._takes_weights = takes_weights(model, pretrained)
        self._overrides = overrides or {}
        self._held_out = nn.ModuleDict({"val": _held_out_metrics(), "test": _held_out_metrics()})

    def setup(self, stage: str) -> None:
        """Refuse data that this model cannot learn from; a model of random weights learns which token ends a text.

        Raises:
            ValueError: If it cannot.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        check_text(type(self).__name__, self.model, data, self.objective)
        tokenizer = getattr(data, "tokenizer", None)
        if isinstance(tokenizer, PreTrainedTokenizerBase) and not self._takes_weights:
            take_special_tokens(cast(PreTrainedModel, self.model), tokenizer, self._overrides)

    def check_batch(self, batch: Any) -> None:
        """Refuse a batch that is none of text.

        Raises:
            TypeError: If it is not.
        """
        check_text_batch(type(self).__name__, batch)

    @abstractmethod
    def targets(self, labels_bt: Tensor) -> Tensor:
        """Return the token each position is to predict, -100 where there is none, shape (b, t)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Score every token of the vocabulary at every position.

        Args:
            input_ids: Tokens, shape (b, t).
            attention_mask: 1 at tokens and 0 at padding, shape (b, t). Default: no padding.

        Returns:
            Logits, shape (b, t, v).
        """
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the batch's targets, and log it as ``train/loss``."""
        logits_btv = self(batch["input_ids"], batch.get("attention_mask"))
        loss, _ = token_cross_entropy(logits_btv, self.targets(batch["labels"]))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add the batch to ``val/loss``, ``val/perplexity`` and ``val/accuracy``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add the batch to ``test/loss``, ``test/perplexity`` and ``test/accuracy``."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> None:
        logits_btv = self(batch["input_ids"], batch.get("attention_mask"))
        targets_bt = self.targets(batch["labels"])
        loss, num_targets = token_cross_entropy(logits_btv, targets_bt)
        # Ignored targets are negative, so no prediction equals one.
        accuracy = (logits_btv.argmax(-1) == targets_bt).sum() / num_targets.clamp(min=1)
        values = {"loss": loss, "perplexity": loss, "accuracy": accuracy}
        for name, metric in self._held_out[stage].items():  # type: ignore[operator]
            metric.update(values[name], num_targets)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "loss")


def _held_out_metrics() -> nn.ModuleDict:
    return nn.ModuleDict({"loss": SampleMean(), "perplexity": TokenPerplexity(), "accuracy": SampleMean()})
