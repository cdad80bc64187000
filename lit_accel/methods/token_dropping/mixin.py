"""Token dropping as a mixin: the LightningModule brings the method along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback

from lit_accel.methods.token_dropping.callback import RandomLTD
from lit_accel.methods.token_dropping.dropper import Scope
from lit_accel.methods.token_dropping.schedule import Compat


class RandomLTDMixin:
    """Contributes a :class:`RandomLTD` callback to the Trainer. Stands left of ``LightningModule``.

    Args:
        *args: Passed on.
        ltd_start_tokens: ``start_tokens`` of the callback.
        ltd_growth: ``growth`` of the callback.
        ltd_quantum: ``quantum`` of the callback.
        ltd_pinned: ``pinned`` of the callback.
        ltd_scope: ``scope`` of the callback.
        ltd_keep_prefix: ``keep_prefix`` of the callback.
        ltd_max_lengths: ``max_lengths`` of the callback.
        ltd_num_tokens: ``num_tokens`` of the callback.
        ltd_compat: ``compat`` of the callback.
        ltd_seed: ``seed`` of the callback.
        **kwargs: Passed on.

    Example::

        class MyGPT(RandomLTDMixin, L.LightningModule):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.model = GPT2LMHeadModel(GPT2Config())
    """

    def __init__(
        self,
        *args: Any,
        ltd_start_tokens: int | float = 0.25,
        ltd_growth: int | float = 0.7,
        ltd_quantum: int = 8,
        ltd_pinned: Sequence[int] | None = None,
        ltd_scope: Scope = "layer",
        ltd_keep_prefix: int | None = None,
        ltd_max_lengths: int | None = None,
        ltd_num_tokens: int | None = None,
        ltd_compat: Compat | None = None,
        ltd_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._ltd = RandomLTD(
            start_tokens=ltd_start_tokens,
            growth=ltd_growth,
            quantum=ltd_quantum,
            pinned=ltd_pinned,
            scope=ltd_scope,
            keep_prefix=ltd_keep_prefix,
            max_lengths=ltd_max_lengths,
            num_tokens=ltd_num_tokens,
            compat=ltd_compat,
            seed=ltd_seed,
        )

    def configure_callbacks(self) -> list[Callback]:
        """Add the method's callback to those of the other bases."""
        callbacks = super().configure_callbacks()  # type: ignore[misc]
        return [*(callbacks if isinstance(callbacks, list) else [callbacks]), self._ltd]
