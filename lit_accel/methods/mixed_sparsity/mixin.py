"""Mixed sparsity training as a mixin: the LightningModule brings the method along."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback

from lit_accel.methods.mixed_sparsity.attention import PatternName
from lit_accel.methods.mixed_sparsity.callback import MixedSparsityTraining
from lit_accel.methods.mixed_sparsity.distribution import Distribution
from lit_accel.methods.mixed_sparsity.presets import PresetName
from lit_accel.methods.mixed_sparsity.sparse_model import Execution


class MixedSparsityMixin:
    """Contributes a :class:`MixedSparsityTraining` callback to the Trainer. Stands left of ``LightningModule``.

    Args:
        *args: Passed on.
        mst_stages: ``stages`` of the callback.
        mst_ffn_units: ``ffn_units`` of the callback.
        mst_attention_units: ``attention_units`` of the callback.
        mst_head_units: ``head_units`` of the callback.
        mst_update_every: ``update_every`` of the callback.
        mst_drop_fraction: ``drop_fraction`` of the callback.
        mst_gradient_share: ``gradient_share`` of the callback.
        mst_distribution: ``distribution`` of the callback.
        mst_quantum: ``quantum`` of the callback.
        mst_block_size: ``block_size`` of the callback.
        mst_attention_pattern: ``attention_pattern`` of the callback.
        mst_attention_window: ``attention_window`` of the callback.
        mst_attention_phase: ``attention_phase`` of the callback.
        mst_evaluate_pattern: ``evaluate_pattern`` of the callback.
        mst_execution: ``execution`` of the callback.
        mst_preset: ``preset`` of the callback.
        mst_seed: ``seed`` of the callback.
        **kwargs: Passed on.

    Example::

        class MyGPT(MixedSparsityMixin, L.LightningModule):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.model = GPT2LMHeadModel(GPT2Config())
    """

    def __init__(
        self,
        *args: Any,
        mst_stages: list[tuple[int | float, float]] | None = None,
        mst_ffn_units: str | None = None,
        mst_attention_units: str | None = None,
        mst_head_units: str | None = None,
        mst_update_every: int = 100,
        mst_drop_fraction: float = 0.3,
        mst_gradient_share: float = 0.75,
        mst_distribution: Distribution | None = None,
        mst_quantum: int = 16,
        mst_block_size: int = 64,
        mst_attention_pattern: PatternName | Literal["dense"] | None = None,
        mst_attention_window: int = 128,
        mst_attention_phase: tuple[int | float, int | float] = (0.06, 0.80),
        mst_evaluate_pattern: bool = True,
        mst_execution: Execution = "compact",
        mst_preset: PresetName | None = None,
        mst_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._mst = MixedSparsityTraining(
            stages=mst_stages,
            ffn_units=mst_ffn_units,
            attention_units=mst_attention_units,
            head_units=mst_head_units,
            update_every=mst_update_every,
            drop_fraction=mst_drop_fraction,
            gradient_share=mst_gradient_share,
            distribution=mst_distribution,
            quantum=mst_quantum,
            block_size=mst_block_size,
            attention_pattern=mst_attention_pattern,
            attention_window=mst_attention_window,
            attention_phase=mst_attention_phase,
            evaluate_pattern=mst_evaluate_pattern,
            execution=mst_execution,
            preset=mst_preset,
            seed=mst_seed,
        )

    def configure_callbacks(self) -> list[Callback]:
        """Add the method's callback to those of the other bases."""
        callbacks = super().configure_callbacks()  # type: ignore[misc]
        return [*(callbacks if isinstance(callbacks, list) else [callbacks]), self._mst]
