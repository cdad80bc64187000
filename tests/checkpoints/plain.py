"""What a user has who never heard of lit-accel: models of Hugging Face and timm, and one LightningModule over them.

The tests train it with methods attached. ``without_lit_accel.py`` reads what came of it, in a process that cannot
import the package; so nothing here may need it.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

STEPS = 18
BATCH = 4
VOCAB = 64
IMAGE = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 6, "num_heads": 4, "num_classes": 5}
BERT = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "num_hidden_layers": 6,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 16, "n_head": 4, "n_layer": 6, "n_positions": 32}
MODELS = ("gpt2", "bert", "deit")


def build(name: str) -> nn.Module:
    """Make a small model, of six blocks as sensitivity-based layer dropping needs five; its weights are random."""
    if name == "deit":
        return timm.create_model("deit_tiny_patch16_224", **IMAGE)
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**ids, **BERT))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**ids, **GPT2))


def batches(name: str) -> list[tuple[Tensor, Tensor]]:
    """Draw inputs and targets, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    if name == "deit":
        targets = torch.randint(IMAGE["num_classes"], (64, BATCH), generator=generator)
        return [(torch.randn(BATCH, 3, 12, 12, generator=generator), each) for each in targets]
    ids = torch.randint(3, VOCAB, (64, BATCH, 12), generator=generator)
    return [(each, each) for each in ids]


def outputs(name: str, model: nn.Module) -> Tensor:
    """Return the logits of the first batch, in evaluation mode."""
    with torch.no_grad():
        given = model.eval()(batches(name)[0][0])
    return given if isinstance(given, Tensor) else given.logits


class PlainModule(L.LightningModule):
    """Trains any of the models.

    Args:
        name: Which one.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.name = name
        self.model = build(name)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        inputs, targets = batch
        if self.name == "deit":
            return nn.functional.cross_entropy(self.model(inputs), targets)
        return self.model(input_ids=inputs, labels=targets).loss

    def train_dataloader(self) -> DataLoader:
        """Return the batches."""
        return DataLoader(batches(self.name), batch_size=None)

    def configure_optimizers(self) -> Any:
        """Return an optimizer with momentum and a schedule: both have states that must go on."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
