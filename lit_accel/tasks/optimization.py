"""Which parameters decay."""

from typing import Any

from torch import nn


def weight_decay_groups(module: nn.Module, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Split the trainable parameters into a group that decays and one that does not.

    Matrices decay, embeddings included; biases and the gains of norms, which have one dimension, do not. A
    tied parameter appears once and a frozen one not at all. There are always two groups, even if one is
    empty, so that the options of a group can be carried over by position when the model changes.

    Args:
        module: Where the parameters live.
        weight_decay: Decay of the first group; ``None`` leaves it to the optimizer's own argument.

    Returns:
        Two parameter groups for any :class:`torch.optim.Optimizer`; the second has ``weight_decay`` 0.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decaying: dict[str, Any] = {"params": [parameter for parameter in trainable if parameter.ndim >= 2]}
    if weight_decay is not None:
        decaying["weight_decay"] = weight_decay
    return [
        decaying,
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
