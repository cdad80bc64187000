"""Which parameters decay."""

from collections.abc import Collection
from typing import Any

from torch import nn


def weight_decay_groups(module: nn.Module, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Split the trainable parameters into a group that decays and one that does not.

    Matrices decay, embeddings included; biases and the gains of norms, which have one dimension, do not, and neither
    does what a model exempts itself: timm's have a method ``no_weight_decay`` that names parameters such as the
    position embedding. A tied parameter appears once and a frozen one not at all. There are always two groups, even
    if one is empty, so that the options of a group can be carried over by position when the model changes.

    Args:
        module: Where the parameters live.
        weight_decay: Decay of the first group; ``None`` leaves it to the optimizer's own argument.

    Returns:
        Two parameter groups for any :class:`torch.optim.Optimizer`; the second has ``weight_decay`` 0.
    """
    exempt = _exempt(module)
    decaying: dict[str, Any] = {"params": []}
    if weight_decay is not None:
        decaying["weight_decay"] = weight_decay
    rest: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not _is_in(name, exempt)
            (decaying if decays else rest)["params"].append(parameter)
    return [decaying, rest]


def _exempt(module: nn.Module) -> set[str]:
    """Names of the parameters, and of the modules whose parameters all are exempt."""
    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if callable(names := getattr(part, "no_weight_decay", None))
        for name in names()
    }


def _is_in(name: str, exempt: Collection[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in exempt)
