"""Draw the V-cycle: what a step costs over a run of two and of three levels, into ``docs/pictures/v_cycle.png``.

The heights are counted on BERT-Large, the model that the paper takes through both.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from transformers import BertConfig, BertForMaskedLM

from lit_accel import Level, MultiLevelTraining
from lit_accel.anatomy import Anatomy, anatomy_of
from lit_accel.compute import training_flops
from lit_accel.methods.multilevel.phases import resolve_phases

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "v_cycle.png"
NUM_TOKENS = 128
COLOURS = ("#33508c", "#3f8f8a", "#d08c2e")


def bert_large() -> Anatomy:
    """Return the anatomy of BERT-Large; nothing is allocated."""
    config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    with torch.device("meta"):
        return anatomy_of(BertForMaskedLM(config))


def draw(axes: Axes, num_levels: int) -> None:
    """Draw one cycle.

    Args:
        axes: Where to.
        num_levels: Levels, the full model included.
    """
    anatomy = bert_large()
    method = MultiLevelTraining([Level()] * (num_levels - 1))
    sizes = [anatomy, *(step.small for step in method.plan_levels(anatomy))]
    costs = [training_flops(size, 1, NUM_TOKENS).total for size in sizes]
    phases = resolve_phases(method.phases, num_levels, 10_000)
    spent = sum((phase.end - phase.start) * costs[phase.level] for phase in phases) / (10_000 * costs[0])
    for index, phase in enumerate(phases):
        height = costs[phase.level] / costs[0]
        left, width = phase.start / 100, (phase.end - phase.start) / 100
        axes.bar(left, height, width, align="edge", color=COLOURS[phase.level], edgecolor="white")
        size = sizes[phase.level]
        label = f"level {phase.level}\n{size.size.depths[0]} blocks, width {size.size.axes['embed']}"
        if width > 15:
            inside = height > 0.5
            axes.text(
                left + width / 2,
                height / 2 if inside else height + 0.03,
                f"{label}\n{height:.1%} of a full step" if phase.level else label,
                ha="center",
                va="center" if inside else "bottom",
                color="white" if inside else COLOURS[phase.level],
                fontsize=9,
            )
        if index and phase.level < phases[index - 1].level:
            axes.annotate(
                "de-coalesce,\nmerge with what\nwas stored",
                (left, height),
                (left - 3, 0.72 if phase.level == 0 else 0.5),
                ha="right",
                fontsize=8.5,
                arrowprops={"arrowstyle": "->", "color": "0.35"},
                color="0.25",
            )
    axes.annotate(
        "coalesce",
        (phases[1].start / 100, costs[1] / costs[0] + 0.02),
        (9, 0.9),
        fontsize=8.5,
        arrowprops={"arrowstyle": "->", "color": "0.35"},
        color="0.25",
    )
    axes.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    names = {2: "Two", 3: "Three"}
    axes.set_title(f"{names[num_levels]} levels: {spent:.0%} of the FLOPs of as many full steps", fontsize=10)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.5, 1], ["0", "½", "1"])
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw both cycles."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    draw(left, 2)
    draw(right, 3)
    left.set_ylabel("cost of an optimizer step")
    for axes in (left, right):
        axes.set_xlabel("share of the run's steps, %")
    figure.suptitle("V-cycle of BERT-Large, 128 tokens, with the default phases", fontsize=11)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
