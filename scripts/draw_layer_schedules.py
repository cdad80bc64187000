"""Draw the schedules of layer dropping, into ``docs/pictures``: ``layer_dropping.png`` for how progressive layer
dropping decides, ``layer_dropping_budget.png`` for what can be saved and how a budget is met.

Every curve comes from the functions that training uses; the sensitivities are an invented example.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure

from lit_accel import ProgressiveLayerDropping, SensitivityLayerDropping
from lit_accel.compute import training_flops
from lit_accel.methods.layer_dropping import (
    BlockList,
    allocate,
    keep_probabilities,
    kept_share,
    noise,
    robust,
    sample_blocks,
    theta_at,
)
from lit_accel.methods.layer_dropping.refusals import droppable_blocks
from lit_accel.methods.layer_dropping.sampling import Sampler
from lit_accel.schedules import num_steps_of
from scripts.drawing import BLUE, GREEN, ORANGE, PALE, PICTURES, models, plain

NUM_BLOCKS = 12
THETA = 0.5
NUM_STEPS = 1000
# What a measurement may look like: the first block far above the others, some hardly distinguishable from noise.
SENSITIVITIES = [1.7, 0.11, 0.03, 0.004, 0.02, 0.06, 0.005, 0.01, 0.05, 0.002, 0.012, 0.06]


def draw_theta(axes: Axes) -> None:
    """Draw the keep probability of the deepest block over a run."""
    gamma = 100 / NUM_STEPS
    curves = (
        ("increasing, as published", BLUE, "-", {"direction": "increasing"}),
        ("increasing, release 0.1", GREEN, "--", {"direction": "increasing", "release": NUM_STEPS // 10}),
        ("decreasing, release 0.2", ORANGE, "-", {"direction": "decreasing", "release": NUM_STEPS // 5}),
    )
    for label, colour, style, options in curves:
        values = [theta_at(t, theta=THETA, gamma=gamma, num_steps=NUM_STEPS, **options) for t in range(NUM_STEPS)]
        axes.plot([100 * t / NUM_STEPS for t in range(NUM_STEPS)], values, style, color=colour, label=label, lw=2)
    plain(axes, "How much is dropped, over the run", "share of the run, %", "keep probability\nof the deepest block")
    axes.set(xlim=(-1, 101), ylim=(0.45, 1.03))
    axes.legend(frameon=False, loc="center", bbox_to_anchor=(0.64, 0.32))


def draw_depth(axes: Axes) -> None:
    """Draw how keep probabilities fall with depth in the three conventions."""
    for convention, colour, marker in (("paper", BLUE, "o"), ("timm", GREEN, "D"), ("deepspeed", ORANGE, "s")):
        values = keep_probabilities(THETA, NUM_BLOCKS, convention)
        label = f"{convention}: {sum(values):g} of {NUM_BLOCKS} blocks run on average"
        axes.plot(range(NUM_BLOCKS), values, marker=marker, ms=5, color=colour, label=label, lw=1.5)
    plain(axes, f"Which blocks, at theta {THETA:g}", "block", "keep probability")
    axes.set(ylim=(0.45, 1.03), xticks=range(NUM_BLOCKS))
    axes.legend(frameon=False, loc="lower left")


def draw_raster(figure: SubFigure, sampler: Sampler, title: str, num_steps: int = 64) -> None:
    """Draw which blocks run in some steps, and how many."""
    keep_at = keep_probabilities(THETA, NUM_BLOCKS)
    rows = [
        sample_blocks(keep_at, seed=0, step=step, sampler=sampler, num_expected=step * sum(keep_at))
        for step in range(num_steps)
    ]
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.6))
    counts = [sum(row) for row in rows]
    above.bar([step + 0.5 for step in range(num_steps)], counts, width=1, color=GREEN)
    above.axhline(sum(keep_at), color=ORANGE, lw=1.5)
    above.set(ylim=(0, NUM_BLOCKS + 0.5), yticks=(0, 6, 12))
    plain(above, title, "", "blocks\nthat run")
    axes.pcolormesh(
        range(num_steps + 1),
        [index - 0.5 for index in range(NUM_BLOCKS + 1)],
        list(zip(*rows, strict=True)),
        cmap=ListedColormap([PALE, BLUE]),
        edgecolors="white",
        linewidth=0.6,
    )
    axes.invert_yaxis()
    plain(axes, "", "optimizer step", "block")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_yticks((0, 3, 7, 11))


def draw_progressive() -> Figure:
    """Draw how progressive layer dropping decides."""
    figure = plt.figure(figsize=(11, 7.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.05), hspace=0.04)
    left, right = top.subplots(1, 2)
    draw_theta(left)
    draw_depth(right)
    left, right = bottom.subfigures(1, 2, wspace=0.03)
    draw_raster(left, "systematic", "systematic (the default): 8 or 9 blocks in every step")
    draw_raster(right, "bernoulli", "bernoulli (the paper's): each block by itself")
    return figure


def draw_ceiling(axes: Axes) -> None:
    """Draw what the floor of PLD saves of whole models: an upper limit of what can be saved with it."""
    found = models()
    for row, (anatomy, num_tokens) in enumerate(found.values()):
        flops = training_flops(anatomy, 1, num_tokens)
        units = droppable_blocks(anatomy, (), ProgressiveLayerDropping.__name__)
        dropped = {index: 1 - p for index, p in zip(units, keep_probabilities(THETA, len(units)), strict=True)}
        saved = sum(flops.blocks[index] * share for index, share in dropped.items()) / flops.total
        outside = flops.outside_blocks / flops.total
        left = 0.0
        for width, colour in ((1 - outside - saved, BLUE), (outside, GREEN), (saved, PALE)):
            axes.barh(row, 100 * width, left=100 * left, color=colour, height=0.62)
            left += width
        text = f"{saved:.0%}".replace("%", " %")
        axes.text(100 * (1 - saved / 2), row, text, ha="center", va="center", fontsize=9.5)
        if outside > 0.1:
            text = f"{outside:.0%}".replace("%", " %")
            axes.text(100 * (1 - saved - outside / 2), row, text, ha="center", va="center", color="white", fontsize=9.5)
    for colour, label in ((BLUE, "blocks that run"), (GREEN, "heads, embeddings"), (PALE, "saved")):
        axes.barh(0, 0, color=colour, label=label)
    axes.set_yticks(range(len(found)), found)
    axes.invert_yaxis()
    plain(axes, f"The most that theta {THETA:g} saves of a step", "share of the FLOPs, %", "")
    axes.set(xlim=(0, 100), ylim=(len(found) - 0.5, -1.15))
    axes.legend(frameon=False, loc="upper left", ncols=3, borderpad=0.1, handlelength=1, columnspacing=1, fontsize=9)


def draw_kept(axes: Axes) -> None:
    """Draw the budget of sensitivity-based layer dropping over a run, with the default durations."""
    method = SensitivityLayerDropping()
    warmup, ramp, release = (num_steps_of(d, NUM_STEPS) for d in (method.warmup, method.ramp, method.release))
    values = [
        kept_share(step, NUM_STEPS, kept=method.kept, warmup=warmup, ramp=ramp, release=release)
        for step in range(NUM_STEPS)
    ]
    axes.plot([100 * step / NUM_STEPS for step in range(NUM_STEPS)], values, color=BLUE, lw=2)
    mean = f"{sum(values) / NUM_STEPS:.0%}".replace("%", " %")
    plain(
        axes,
        f"SBLD: what is kept over the run, {mean} on average",
        "share of the run, %",
        "kept share of the\nblocks' FLOPs",
    )
    for text, end, place in (
        ("warm-up; at its end\nthe first measurement", (100 * warmup / NUM_STEPS, 1.0), (26, 0.975)),
        ("ramp", (13, 0.835), (26, 0.87)),
        ("hold", None, (50, 0.795)),
        ("release", (94.5, 0.88), (74, 0.9)),
    ):
        arrow = {"arrowstyle": "->", "color": "0.35"} if end else None
        axes.annotate(text, end or place, place, fontsize=9, color="0.25", va="center", arrowprops=arrow)
    axes.set(xlim=(-1, 101), ylim=(0.7, 1.03), yticks=(0.7, 0.8, 0.9, 1.0))


def draw_sensitivities(axes: Axes) -> frozenset[int]:
    """Draw an example of a measurement; returns the blocks that it protects."""
    method = SensitivityLayerDropping()
    protected = BlockList(NUM_BLOCKS, range(NUM_BLOCKS), method.protected).update(SENSITIVITIES)
    colours = [ORANGE if index in protected else BLUE for index in range(NUM_BLOCKS)]
    axes.bar(range(NUM_BLOCKS), SENSITIVITIES, color=colours, width=0.7)
    for colour, label in ((ORANGE, "never dropped: first, last, most sensitive"), (BLUE, "may be dropped")):
        axes.bar(1, 0, color=colour, label=label)
    axes.set_yscale("log")
    axes.set(xticks=range(NUM_BLOCKS), ylim=(1e-3, 12))
    plain(axes, "An invented measurement", "block", "sensitivity: loss without\nthe block minus with it")
    axes.legend(frameon=False, loc="upper right")
    return protected


def draw_allocations(axes: Axes, protected: frozenset[int]) -> None:
    """Draw how the three allocations meet the same budget with it."""
    method = SensitivityLayerDropping()
    values = robust(SENSITIVITIES)
    assert values is not None
    for place, (allocation, colour) in enumerate((("sensitivity", BLUE), ("depth", GREEN), ("uniform", ORANGE))):
        keep = allocate(
            method.kept,
            [1.0] * NUM_BLOCKS,
            sensitivities=values,
            min_keep=method.min_keep,
            always=protected,
            allocation=allocation,  # type: ignore[arg-type]
        )
        label = f"{allocation}, {noise(values, keep):.2f}"
        axes.bar(
            [index + 0.27 * (place - 1) for index in range(NUM_BLOCKS)], keep, width=0.27, color=colour, label=label
        )
    axes.hlines(method.min_keep, -0.5, NUM_BLOCKS - 0.5, color="0.15", lw=0.9, ls=":")
    axes.text(NUM_BLOCKS - 0.4, method.min_keep, "min_keep", fontsize=9, color="0.25", va="center")
    plain(
        axes,
        f"Three ways to keep {method.kept:.0%} with it, and their noise".replace("%", " %"),
        "block",
        "keep probability",
    )
    axes.set(xticks=range(NUM_BLOCKS), xlim=(-0.7, NUM_BLOCKS + 1.4), ylim=(0, 1.19), yticks=(0, 0.25, 0.5, 0.75, 1))
    axes.legend(frameon=False, loc="upper left", ncols=3, handlelength=1, columnspacing=1, fontsize=9, borderpad=0.1)


def draw_budget() -> Figure:
    """Draw what can be saved, and how a budget is met."""
    figure, ((ceiling, kept), (measured, allocated)) = plt.subplots(2, 2, figsize=(11, 7.2), layout="constrained")
    figure.get_layout_engine().set(hspace=0.07, wspace=0.06)
    draw_ceiling(ceiling)
    draw_kept(kept)
    draw_allocations(allocated, draw_sensitivities(measured))
    return figure


def main() -> None:
    """Draw both pictures, on white: GitHub shows them on a dark page too."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, draw in (("layer_dropping", draw_progressive), ("layer_dropping_budget", draw_budget)):
        draw().savefig(PICTURES / f"{name}.png", dpi=130, facecolor="white")


if __name__ == "__main__":
    main()
