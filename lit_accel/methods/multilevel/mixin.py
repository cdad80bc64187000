"""Multi-level training as a mixin: the LightningModule brings the method along."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback

from lit_accel.methods.multilevel.callback import MultiLevelTraining
from lit_accel.methods.multilevel.maps import DepthGrouping, DepthMode, WidthGrouping
from lit_accel.methods.multilevel.moments import OptimizerStatePolicy
from lit_accel.methods.multilevel.phases import LearningRatePolicy, Level, Phase
from lit_accel.methods.multilevel.presets import PresetName
from lit_accel.resizing import ResizableMixin


class MultiLevelMixin(ResizableMixin):
    """Contributes a :class:`MultiLevelTraining` callback to the Trainer. Stands left of ``LightningModule``.

    Args:
        *args: Passed on.
        multilevel_levels: ``levels`` of the callback.
        multilevel_phases: ``phases`` of the callback.
        multilevel_preset: ``preset`` of the callback.
        multilevel_alpha: ``alpha`` of the callback.
        multilevel_coarse: ``coarse`` of the callback.
        multilevel_fine: ``fine`` of the callback.
        multilevel_depth_mode: ``depth_mode`` of the callback.
        multilevel_width_grouping: ``width_grouping`` of the callback.
        multilevel_depth_grouping: ``depth_grouping`` of the callback.
        multilevel_optimizer_state: ``optimizer_state`` of the callback.
        multilevel_learning_rate: ``learning_rate`` of the callback.
        multilevel_num_rewarm_steps: ``num_rewarm_steps`` of the callback.
        multilevel_start_level: ``start_level`` of the callback.
        multilevel_fresh_std: ``fresh_std`` of the callback.
        **kwargs: Passed on.

    Example::

        class MyGPT(MultiLevelMixin, L.LightningModule):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.model = GPT2LMHeadModel(GPT2Config())
    """

    def __init__(
        self,
        *args: Any,
        multilevel_levels: list[Level] | None = None,
        multilevel_phases: list[Phase] | None = None,
        multilevel_preset: PresetName = "correction",
        multilevel_alpha: float | None = None,
        multilevel_coarse: float | None = None,
        multilevel_fine: float | None = None,
        multilevel_depth_mode: DepthMode | None = None,
        multilevel_width_grouping: WidthGrouping = "block",
        multilevel_depth_grouping: DepthGrouping = "adjacent",
        multilevel_optimizer_state: OptimizerStatePolicy | None = None,
        multilevel_learning_rate: LearningRatePolicy | None = None,
        multilevel_num_rewarm_steps: int | None = None,
        multilevel_start_level: int = 0,
        multilevel_fresh_std: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._multilevel = MultiLevelTraining(
            levels=multilevel_levels,
            phases=multilevel_phases,
            preset=multilevel_preset,
            alpha=multilevel_alpha,
            coarse=multilevel_coarse,
            fine=multilevel_fine,
            depth_mode=multilevel_depth_mode,
            width_grouping=multilevel_width_grouping,
            depth_grouping=multilevel_depth_grouping,
            optimizer_state=multilevel_optimizer_state,
            learning_rate=multilevel_learning_rate,
            num_rewarm_steps=multilevel_num_rewarm_steps,
            start_level=multilevel_start_level,
            fresh_std=multilevel_fresh_std,
        )

    def configure_callbacks(self) -> list[Callback]:
        """Add the method's callback to those of the other bases."""
        callbacks = super().configure_callbacks()  # type: ignore[misc]
        return [*(callbacks if isinstance(callbacks, list) else [callbacks]), self._multilevel]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write levels and phases among the hyper-parameters as mappings, which are read where lit-accel is not."""
        super().on_save_checkpoint(checkpoint)
        parameters = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})  # type: ignore[attr-defined]
        for name, value in parameters.items():
            if isinstance(value, (list, tuple)) and any(isinstance(each, (Level, Phase)) for each in value):
                parameters[name] = [asdict(each) if isinstance(each, (Level, Phase)) else each for each in value]
