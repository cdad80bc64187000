"""In what kind of call of the transformer a block is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def is_recomputing() -> bool:
    """Whether what runs now is called by the backward pass, as activation checkpointing calls blocks again."""
    # As torch.utils.checkpoint sees it.
    return torch._C._current_graph_task_id() != -1


class ModelCalls:
    """Follows the calls of a transformer.

    A block cannot tell by itself whether it is trained: reentrant activation checkpointing first runs it without
    gradients. The call that it is a part of can.

    Args:
        transformer: The transformer.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.has_gradients: bool | None = None
        """Whether gradients are taken of the present call; ``None`` outside of one."""
        self._hooks = [
            transformer.register_forward_pre_hook(_Hook(self._begin)),
            transformer.register_forward_hook(_Hook(self.end), always_call=True),
        ]

    def _begin(self) -> None:
        self.has_gradients = torch.is_grad_enabled()

    def end(self) -> None:
        """Close the present call; torch forgets to, where something else than an error has interrupted it."""
        self.has_gradients = None

    def close(self) -> None:
        """Leave the transformer as it was."""
        for hook in self._hooks:
            hook.remove()


class _Hook:
    """A hook that does nothing in a copy: a copy of the model is not the model that is followed.

    Args:
        call: What to call; ``None`` in copies.
    """

    def __init__(self, call: Callable[[], None] | None = None) -> None:
        # Traced into a compiled graph, what it sets would be a constant of it.
        self._call = None if call is None else torch.compiler.disable(call)

    def __call__(self, *_: Any) -> None:
        if self._call is not None:
            self._call()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()
