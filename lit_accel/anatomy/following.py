"""Keeping hold of the transformer inside a module, also after it was replaced by another."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lit_accel.anatomy.registry import find_transformer


class TransformerFollower:
    """Reports the one transformer inside a module: the present one at once, and each that takes its place.

    Args:
        module: The LightningModule.
        follow: Called with each transformer, the present one included.
    """

    def __init__(self, module: nn.Module, follow: Callable[[nn.Module], None]) -> None:
        self._module = module
        self._follow = follow
        self._transformer: nn.Module | None = None
        # A callback may replace the transformer after another's batch has started and before it is called. The
        # assignment is the only event that nobody can get around, whatever the order of the callbacks.
        self._assignment_hook = register_module_module_registration_hook(self._on_assignment)
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    def refresh(self) -> None:
        """Turn to the transformer that is in the module now; quick if it is the same as before."""
        path, transformer = find_transformer(self._module)
        parent, _, self._name = path.rpartition(".")
        self._parent = self._module.get_submodule(parent)
        self._turn_to(transformer)

    def close(self) -> None:
        """Stop following."""
        self._assignment_hook.remove()

    def _on_assignment(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if parent is self._parent and name == self._name and child is not None:
            self._turn_to(child)

    def _turn_to(self, transformer: nn.Module) -> None:
        if transformer is not self._transformer:
            self._transformer = transformer
            self._follow(transformer)
