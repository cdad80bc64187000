"""What the tests of token dropping beside other things share."""

from __future__ import annotations

import lightning.pytorch as L
import torch

from lit_accel.anatomy import anatomy_of
from lit_accel.methods.token_dropping import TokenDropper, TokenSchedule
from lit_accel.routing import routing_of
from tests.methods.dropping import in_training
from tests.models import tokens

GROWTH = 20
NUM_TOKENS = 24
# Windows of a SwinV2 come in shares.
SHARES = TokenSchedule(0.25, GROWTH)


def dropping(model: torch.nn.Module, schedule: TokenSchedule | None = None) -> TokenDropper:
    """Drop tokens in all blocks but the first and the last that have more than one window."""
    num_blocks = len(anatomy_of(model).blocks)
    blocks = range(num_blocks) if type(model).__name__ == "SwinTransformerV2" else range(1, num_blocks - 1)
    dropper = TokenDropper(routing_of(model), blocks, schedule or TokenSchedule(0.25, GROWTH, quantum=1))
    dropper.is_active = True
    return dropper


def forward(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=inputs)[0] if hasattr(model, "config") else model(inputs)
    return output.logsumexp(-1).mean()


def backward(model: torch.nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss, and the gradients of a model's parameters."""
    model.zero_grad()
    loss = forward(model, inputs)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Images(L.LightningModule):
    def __init__(self, name: str = "vit", blocks: int = 4) -> None:
        super().__init__()
        self.net = in_training(name, blocks)

    def training_step(self, batch, batch_idx):
        return forward(self.net, tokens(self.net, batch=8, seed=batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)
