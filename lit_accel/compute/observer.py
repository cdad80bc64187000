"""Watching the forward calls of the transformer inside a LightningModule, also after it was replaced by another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from lit_accel.anatomy import Anatomy, anatomy_of, find_transformer

OnForward = Callable[[Anatomy, nn.Module, int, int], None]
"""Called with the anatomy, the transformer, the number of sequences and the tokens of each."""


class TransformerObserver:
    """Reports every forward call of the one transformer inside a module, before it runs.

    Args:
        module: The LightningModule.
        on_forward: What to call.
    """

    def __init__(self, module: L.LightningModule, on_forward: OnForward) -> None:
        self.module = module
        self._on_forward = on_forward
        self._transformer: nn.Module | None = None
        self._hook: RemovableHandle | None = None
        # Another callback may replace the transformer after our batch has started and before it is called. The
        # assignment is the only event that nobody can get around, whatever the order of the callbacks.
        self._assignment_hook = register_module_module_registration_hook(self._on_assignment)
        self.refresh()

    def refresh(self) -> None:
        """Turn to the transformer that is in the module now; quick if it is the same as before."""
        path, transformer = find_transformer(self.module)
        parent, _, self._name = path.rpartition(".")
        self._parent = self.module.get_submodule(parent)
        self._follow(transformer)

    def close(self) -> None:
        """Remove every hook."""
        self._assignment_hook.remove()
        if self._hook is not None:
            self._hook.remove()

    def _on_assignment(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if parent is self._parent and name == self._name and child is not None:
            self._follow(child)

    def _follow(self, transformer: nn.Module) -> None:
        if transformer is self._transformer:
            return
        if self._hook is not None:
            self._hook.remove()
        self.anatomy = anatomy_of(transformer)
        self._transformer = transformer
        self._hook = transformer.register_forward_pre_hook(_Hook(self._report), with_kwargs=True)

    def _report(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        num_sequences, num_tokens = self.anatomy.input_shape(args, kwargs)
        self._on_forward(self.anatomy, transformer, int(num_sequences), int(num_tokens))


class _Hook:
    """A forward pre-hook that does nothing in a copy: a copy of the model is not the model that trains.

    Args:
        report: What to call; ``None`` in copies.
    """

    def __init__(self, report: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None] | None = None):
        # Traced into a compiled graph, the counters would be constants of it and recompile it at every step.
        self._report = None if report is None else torch.compiler.disable(report)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._report is not None:
            self._report(module, args, kwargs)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()
