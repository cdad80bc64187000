"""Draw how mixed sparsity training decides, into ``docs/pictures/mixed_sparsity.png``.

Costs and patterns come from the functions that training uses; the units that are on from a run of a small GPT on the
standard library's sources, which takes about a minute.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import matplotlib.pyplot as plt
import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lit_accel import MixedSparsityTraining
from lit_accel.anatomy import Anatomy
from lit_accel.compute import training_flops
from lit_accel.methods.mixed_sparsity import DEFAULT_STAGES, AttentionPattern, SparsitySchedule, Targets, spaces_of
from lit_accel.methods.mixed_sparsity.attention import PATTERNS
from scripts.drawing import BLUE, GREEN, ORANGE, PALE, PICTURES, models, plain
from scripts.small_gpt import Setup

NUM_STEPS = 1000
SETUP = Setup(num_blocks=4, embed=64, heads=8, vocab_size=1024, block_size=128, batch_size=16, num_steps=NUM_STEPS)


class Recorder(L.Callback):
    """Notes which neurons of a block are on after each step.

    Args:
        method: Whose.
        space: The name of their space.
    """

    def __init__(self, method: MixedSparsityTraining, space: str) -> None:
        self._method, self._space = method, space
        self.masks: list[torch.Tensor] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Note them."""
        self.masks.append(self._method.masks[self._space][0].clone())


def targets_of(anatomy: Anatomy, units: tuple[str, str, str], num_steps: int = NUM_STEPS) -> Targets:
    """Return what the default stages make of a model."""
    return Targets(anatomy, spaces_of(anatomy, *units), SparsitySchedule.of(DEFAULT_STAGES, num_steps))


def draw_cost(axes: Axes) -> None:
    """Draw what a step costs over the run."""
    anatomy, num_tokens = models()["GPT-2 small, 1024 tokens"]
    targets = targets_of(anatomy, ("neuron", "head", "dense"))
    dense = training_flops(anatomy, 1, num_tokens)
    shares = [100 * step / NUM_STEPS for step in range(NUM_STEPS)]
    stages = [targets.active(step, targets.counts(step)) for step in range(NUM_STEPS)]
    spent = {stage.stage: training_flops(anatomy, 1, num_tokens, active=stage) for stage in stages}
    axes.step(shares, [100 * (1 - targets.schedule.sparsity(s)) for s in range(NUM_STEPS)], color=PALE, lw=6)
    axes.step(shares, [100 * spent[stage.stage].total / dense.total for stage in stages], color=BLUE, lw=2)
    without = [spent[stage.stage].total - spent[stage.stage].head for stage in stages]
    axes.step(shares, [100 * flops / (dense.total - dense.head) for flops in without], color=ORANGE, lw=1.5, ls="--")
    for label, colour, style in (
        ("units that are on", PALE, "-"),
        ("FLOPs of a step", BLUE, "-"),
        ("FLOPs without the head", ORANGE, "--"),
    ):
        axes.plot([], [], color=colour, ls=style, lw=6 if colour == PALE else 2, label=label)
    plain(axes, "The default stages, on GPT-2 small", "share of the run, %", "of the dense model, %")
    axes.set(xlim=(-1, 101), ylim=(0, 105))
    axes.legend(frameon=False, loc="upper center", fontsize=9)


def draw_units(axes: Axes) -> None:
    """Draw which neurons of a block are on, in a run."""
    method = MixedSparsityTraining(update_every=50)
    recorder = Recorder(method, "transformer.h.1: neurons")
    with tempfile.TemporaryDirectory() as folder:
        SETUP.run(Path(folder), NUM_STEPS, quiet=True, callbacks=[method, recorder])
    masks = torch.stack(recorder.masks)
    # By how long they are on while the model is at its sparsest: the steadiest first.
    sparsest = masks[round(0.06 * NUM_STEPS) : round(0.80 * NUM_STEPS)]
    order = sparsest.float().mean(0).argsort(descending=True, stable=True)
    axes.imshow(
        masks[:, order].T.float(),
        aspect="auto",
        interpolation="none",
        cmap=ListedColormap(["white", BLUE]),
        extent=(0, 100, masks.shape[1], 0),
    )
    ever = int(sparsest.any(0).sum())
    num_on = int(sparsest[0].sum())
    plain(
        axes,
        f"Neurons of a block: {num_on} of {masks.shape[1]} at a time, {ever} in turn",
        "share of the run, %",
        "neuron, the steadiest first",
    )


def draw_patterns(axes: Axes, num_tokens: int = 32, window: int = 8) -> None:
    """Draw the patterns of attention, each with its pairs."""
    across, down = 14, 9
    canvas = torch.zeros(2 * num_tokens + down, 2 * num_tokens + across)
    for place, kind in enumerate(PATTERNS):
        pattern = AttentionPattern(kind, window)
        left, top = place % 2 * (num_tokens + across), place // 2 * (num_tokens + down)
        causal = torch.ones(num_tokens, num_tokens).tril()
        canvas[top : top + num_tokens, left : left + num_tokens] = causal + pattern.mask(num_tokens, num_tokens)
        share = pattern.pairs(num_tokens) / (num_tokens * (num_tokens + 1) // 2)
        axes.text(left + 14, top + 1, f"{kind}\n{share:.0%} of the pairs", ha="left", va="top", fontsize=9)
    axes.imshow(canvas, cmap=ListedColormap(["white", PALE, GREEN]), interpolation="none")
    axes.set_title(f"Patterns of attention: window {window} of {num_tokens} tokens", fontsize=11, loc="left")
    axes.axis("off")


def draw_shares(axes: Axes) -> None:
    """Draw what a run costs, by three ways to count the model's head."""
    found = {name: entry for name, entry in models().items() if "Swin" not in name}
    colours = {"dense": BLUE, "masked": GREEN, "excluded": ORANGE}
    for row, (anatomy, num_tokens) in enumerate(found.values()):
        shares = targets_of(anatomy, ("neuron", "head", "dense"), 20_000).shares(num_tokens)
        for place, (kind, colour) in enumerate(colours.items()):
            share = 100 * getattr(shares, kind)
            axes.barh(row + (place - 1) * 0.26, share, color=colour, height=0.24)
            axes.text(share + 0.7, row + (place - 1) * 0.26, f"{share:.0f}", va="center", fontsize=8.5, color="0.25")
    for kind, label in (("dense", "head dense"), ("masked", "as sparse as blocks"), ("excluded", "not counted")):
        axes.barh(0, 0, color=colours[kind], label=label)
    axes.set_yticks(range(len(found)), found)
    axes.invert_yaxis()
    plain(axes, "What a run costs depends on how the head is counted", "FLOPs of a dense run, %", "")
    axes.set(xlim=(0, 62), ylim=(len(found) - 0.5, -1.1))
    axes.legend(frameon=False, loc="upper left", ncols=3, fontsize=9, handlelength=1, columnspacing=1, borderpad=0.1)


def draw() -> Figure:
    """Draw all of it."""
    figure, ((cost, units), (patterns, shares)) = plt.subplots(2, 2, figsize=(11.5, 7.6), layout="constrained")
    figure.get_layout_engine().set(hspace=0.07, wspace=0.06)
    draw_cost(cost)
    draw_units(units)
    draw_patterns(patterns)
    draw_shares(shares)
    return figure


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    PICTURES.mkdir(parents=True, exist_ok=True)
    # On white: GitHub shows it on a dark page too.
    draw().savefig(PICTURES / "mixed_sparsity.png", dpi=130, facecolor="white")
