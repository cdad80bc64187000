"""Layer dropping as mixins: the LightningModule brings the method along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback

from lit_accel.methods.layer_dropping.budget import Allocation
from lit_accel.methods.layer_dropping.dropper import Scale
from lit_accel.methods.layer_dropping.pld import ProgressiveLayerDropping
from lit_accel.methods.layer_dropping.progressive import Convention, Direction
from lit_accel.methods.layer_dropping.sampling import Sampler
from lit_accel.methods.layer_dropping.sbld import SensitivityLayerDropping
from lit_accel.methods.layer_dropping.sensitivity import Estimator


class ProgressiveLayerDroppingMixin:
    """Contributes a :class:`ProgressiveLayerDropping` callback to the Trainer. Stands left of ``LightningModule``.

    Args:
        *args: Passed on.
        pld_theta: ``theta`` of the callback.
        pld_gamma: ``gamma`` of the callback.
        pld_gamma_factor: ``gamma_factor`` of the callback.
        pld_convention: ``convention`` of the callback.
        pld_direction: ``direction`` of the callback.
        pld_release: ``release`` of the callback.
        pld_pinned: ``pinned`` of the callback.
        pld_sampler: ``sampler`` of the callback.
        pld_scale: ``scale`` of the callback.
        pld_seed: ``seed`` of the callback.
        pld_check_ranks_every: ``check_ranks_every`` of the callback.
        **kwargs: Passed on.

    Example::

        class MyGPT(ProgressiveLayerDroppingMixin, L.LightningModule):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.model = GPT2LMHeadModel(GPT2Config())
    """

    def __init__(
        self,
        *args: Any,
        pld_theta: float = 0.5,
        pld_gamma: float | None = None,
        pld_gamma_factor: float | None = None,
        pld_convention: Convention = "paper",
        pld_direction: Direction = "increasing",
        pld_release: int | float | None = None,
        pld_pinned: Sequence[int] = (),
        pld_sampler: Sampler = "systematic",
        pld_scale: Scale = "none",
        pld_seed: int = 0,
        pld_check_ranks_every: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._pld = ProgressiveLayerDropping(
            theta=pld_theta,
            gamma=pld_gamma,
            gamma_factor=pld_gamma_factor,
            convention=pld_convention,
            direction=pld_direction,
            release=pld_release,
            pinned=pld_pinned,
            sampler=pld_sampler,
            scale=pld_scale,
            seed=pld_seed,
            check_ranks_every=pld_check_ranks_every,
        )

    def configure_callbacks(self) -> list[Callback]:
        """Add the method's callback to those of the other bases."""
        callbacks = super().configure_callbacks()  # type: ignore[misc]
        return [*(callbacks if isinstance(callbacks, list) else [callbacks]), self._pld]


class SensitivityLayerDroppingMixin:
    """Contributes a :class:`SensitivityLayerDropping` callback to the Trainer. Stands left of ``LightningModule``.

    Args:
        *args: Passed on.
        sbld_kept: ``kept`` of the callback.
        sbld_estimator: ``estimator`` of the callback.
        sbld_allocation: ``allocation`` of the callback.
        sbld_warmup: ``warmup`` of the callback.
        sbld_ramp: ``ramp`` of the callback.
        sbld_release: ``release`` of the callback.
        sbld_min_keep: ``min_keep`` of the callback.
        sbld_protected: ``protected`` of the callback.
        sbld_measure_every: ``measure_every`` of the callback.
        sbld_num_batches: ``num_batches`` of the callback.
        sbld_max_overhead: ``max_overhead`` of the callback.
        sbld_ema: ``ema`` of the callback.
        sbld_pinned: ``pinned`` of the callback.
        sbld_sampler: ``sampler`` of the callback.
        sbld_scale: ``scale`` of the callback.
        sbld_seed: ``seed`` of the callback.
        sbld_check_ranks_every: ``check_ranks_every`` of the callback.
        sbld_folder: ``folder`` of the callback.
        **kwargs: Passed on.

    Example::

        class MyGPT(SensitivityLayerDroppingMixin, L.LightningModule):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.model = GPT2LMHeadModel(GPT2Config())
    """

    def __init__(
        self,
        *args: Any,
        sbld_kept: float = 0.78,
        sbld_estimator: Estimator = "ablate",
        sbld_allocation: Allocation = "sensitivity",
        sbld_warmup: int | float = 0.1,
        sbld_ramp: int | float = 0.1,
        sbld_release: int | float = 0.1,
        sbld_min_keep: float = 0.4,
        sbld_protected: float = 0.15,
        sbld_measure_every: int | float = 0.05,
        sbld_num_batches: int = 4,
        sbld_max_overhead: float = 0.01,
        sbld_ema: float = 0.7,
        sbld_pinned: Sequence[int] = (),
        sbld_sampler: Sampler = "systematic",
        sbld_scale: Scale = "none",
        sbld_seed: int = 0,
        sbld_check_ranks_every: int = 100,
        sbld_folder: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._sbld = SensitivityLayerDropping(
            kept=sbld_kept,
            estimator=sbld_estimator,
            allocation=sbld_allocation,
            warmup=sbld_warmup,
            ramp=sbld_ramp,
            release=sbld_release,
            min_keep=sbld_min_keep,
            protected=sbld_protected,
            measure_every=sbld_measure_every,
            num_batches=sbld_num_batches,
            max_overhead=sbld_max_overhead,
            ema=sbld_ema,
            pinned=sbld_pinned,
            sampler=sbld_sampler,
            scale=sbld_scale,
            seed=sbld_seed,
            check_ranks_every=sbld_check_ranks_every,
            folder=sbld_folder,
        )

    def configure_callbacks(self) -> list[Callback]:
        """Add the method's callback to those of the other bases."""
        callbacks = super().configure_callbacks()  # type: ignore[misc]
        return [*(callbacks if isinstance(callbacks, list) else [callbacks]), self._sbld]
