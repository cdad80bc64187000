"""Named choices that belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_accel.methods.multilevel.maps import DepthMode
from lit_accel.methods.multilevel.moments import OptimizerStatePolicy
from lit_accel.methods.multilevel.operators import Interpolation
from lit_accel.methods.multilevel.phases import LearningRatePolicy

PresetName = Literal["correction", "paper", "exact"]


@dataclass(frozen=True)
class Preset:
    """What a preset sets; every value can be overridden by the argument of the same name."""

    interpolation: Interpolation
    depth_mode: DepthMode
    optimizer_state: OptimizerStatePolicy
    learning_rate: LearningRatePolicy


PRESETS: dict[PresetName, Preset] = {
    # The coarse-grid correction of multigrid methods: what the small level learned is added to the stored model,
    # whose fine part stays whole. Moments are projected because at the best
    # learning rate that was best for all three seeds (scripts/results/presets.jsonl).
    "correction": Preset(Interpolation(coarse=1.0, fine=0.0), "avg", "project", "continue"),
    # arXiv 2404.07999: alpha 0.25 for GPT and DeiT (0.5 for BERT), a new optimizer and schedule in each phase.
    "paper": Preset(Interpolation.of_alpha(0.25), "avg", "reset", "paper"),
    # Growth changes nothing that the model computes. Copies stay copies unless dropout tells them apart.
    "exact": Preset(Interpolation.of_alpha(1.0), "zero", "project", "continue"),
}


def override_interpolation(
    default: Interpolation, alpha: float | None, coarse: float | None, fine: float | None
) -> Interpolation:
    """Return a preset's interpolation with what the user gave in its place.

    Raises:
        ValueError: If ``alpha`` is no share, or given together with one of the coefficients that it stands for.
    """
    if alpha is None:
        return Interpolation(default.coarse if coarse is None else coarse, default.fine if fine is None else fine)
    if coarse is not None or fine is not None:
        raise ValueError(
            f"alpha is {alpha}, coarse is {coarse} and fine is {fine}; alpha stands for both coefficients, so give "
            "either it alone or coarse and fine."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it is the weight of the small model, between 0 and 1.")
    return Interpolation.of_alpha(alpha)
