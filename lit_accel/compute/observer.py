"""Watching the forward calls of the transformer inside a LightningModule, also after it was replaced by another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_accel.anatomy import Anatomy, TransformerFollower, anatomy_of
from lit_accel.routing import BlockRouting, OnPart, routing_of

OnForward = Callable[[Anatomy, nn.Module, int, int], None]
"""Called with the anatomy, the transformer, the number of sequences and the tokens of each."""


class TransformerObserver:
    """Reports every forward call of the one transformer inside a module, before it runs, and what its blocks leave out.

    Args:
        module: The LightningModule.
        on_forward: What to call.
        on_part: Called for each block that does not run on all its tokens, after the forward call that it is a part of
            has begun; see :data:`~lit_accel.routing.OnPart`. Default: nothing is called.
        on_end: Called when a forward call is over. What blocks report later belongs to the backward pass, in which
            activation checkpointing calls them again. Default: nothing is called.
    """

    def __init__(
        self,
        module: L.LightningModule,
        on_forward: OnForward,
        on_part: OnPart | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.module = module
        self._on_forward, self._on_part, self._on_end = on_forward, on_part, on_end
        self._routing: BlockRouting | None = None
        self._hooks: list[RemovableHandle] = []
        self._follower = TransformerFollower(module, self._follow)

    def refresh(self) -> None:
        """Turn to the transformer that is in the module now; quick if it is the same as before."""
        self._follower.refresh()

    @property
    def is_probing(self) -> bool:
        """Whether a method is measuring the model outside of a training step."""
        return self._routing is not None and self._routing.is_probing

    def close(self) -> None:
        """Remove every hook."""
        self._follower.close()
        self._leave()

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._routing is not None and self._on_part is not None:
            self._routing.unlisten(self._on_part)

    def _follow(self, transformer: nn.Module) -> None:
        self._leave()
        self.anatomy = anatomy_of(transformer)
        self._hooks = [transformer.register_forward_pre_hook(_Hook(self._report), with_kwargs=True)]
        if self._on_end is not None:
            self._hooks.append(transformer.register_forward_hook(_EndHook(self._on_end), always_call=True))
        self._routing = routing_of(transformer)
        if self._on_part is not None:
            self._routing.listen(self._on_part)

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


class _EndHook:
    """A forward hook that does nothing in a copy.

    Args:
        on_end: What to call; ``None`` in copies.
    """

    def __init__(self, on_end: Callable[[], None] | None = None):
        self._on_end = None if on_end is None else torch.compiler.disable(on_end)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._on_end is not None:
            self._on_end()

    def __reduce__(self) -> tuple[type[_EndHook], tuple[()]]:
        return _EndHook, ()
