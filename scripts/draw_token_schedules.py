"""Draw how token dropping decides, into ``docs/pictures/token_dropping.png``.

Every curve and every mark comes from the functions that training uses.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lit_accel import LayerTokenLR, RandomLTD
from lit_accel.anatomy import anatomy_of
from lit_accel.draws import generator
from lit_accel.methods.token_dropping import TokenPlan, TokenSchedule, sample_tokens
from lit_accel.tasks import WarmupDecay
from scripts.drawing import BLUE, GREEN, ORANGE, PALE, PICTURES, models, plain

NUM_STEPS, NUM_TOKENS = 1000, 1024
DEFAULT = RandomLTD()
GROWTH = round(DEFAULT.growth * NUM_STEPS)


def draw_kept(axes: Axes) -> None:
    """Draw how many tokens are kept over a run."""
    curves = (
        ("the default", BLUE, "-", TokenSchedule(DEFAULT.start_tokens, GROWTH)),
        ("max_lengths 6", GREEN, "-", TokenSchedule(DEFAULT.start_tokens, GROWTH, max_lengths=6)),
        ("start_tokens 128, quantum 16", ORANGE, "--", TokenSchedule(128, GROWTH, 16)),
    )
    for label, colour, style, schedule in curves:
        values = [schedule.kept_tokens(step, NUM_TOKENS) for step in range(NUM_STEPS)]
        axes.plot([100 * step / NUM_STEPS for step in range(NUM_STEPS)], values, style, color=colour, label=label, lw=2)
    plain(axes, "How many tokens a block sees, over the run", "share of the run, %", f"kept of {NUM_TOKENS} tokens")
    axes.set(xlim=(-1, 101), ylim=(0, 1130), yticks=range(0, NUM_TOKENS + 1, 256))
    axes.legend(frameon=False, loc="lower right", fontsize=9)


def draw_tokens(axes: Axes, num_blocks: int = 12, num_tokens: int = 48, num_kept: int = 16) -> None:
    """Draw which tokens of a sequence each block sees."""
    rows = [torch.ones(num_tokens) for _ in range(num_blocks)]
    for block in range(1, num_blocks - 1):
        kept = sample_tokens(1, num_tokens, num_kept, generator=generator(0, block))
        rows[block] = torch.zeros(num_tokens).index_fill(0, kept[0], 1.0)
    axes.pcolormesh(
        range(num_tokens + 1),
        [block - 0.5 for block in range(num_blocks + 1)],
        torch.stack(rows).tolist(),
        cmap=ListedColormap([PALE, BLUE]),
        edgecolors="white",
        linewidth=0.8,
    )
    axes.invert_yaxis()
    plain(axes, "Which ones: a draw for each block", "token", "block")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_yticks((0, 3, 7, 11))


def draw_rates(axes: Axes) -> None:
    """Draw the learning rate by layer tokens and by steps."""
    anatomy, num_tokens = models()["GPT-2 medium, 1024 tokens"]
    blocks = tuple(range(1, len(anatomy.blocks) - 1))
    schedule = TokenSchedule(DEFAULT.start_tokens, GROWTH)
    progress = TokenPlan(anatomy, blocks, schedule, NUM_STEPS, num_tokens).progress()
    for label, colour, kind in (("by layer tokens", BLUE, LayerTokenLR), ("by steps", ORANGE, WarmupDecay)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = kind(optimizer, num_warmup_steps=0.05, decay="cosine", num_total_steps=NUM_STEPS)
        if isinstance(scheduler, LayerTokenLR):
            scheduler.follow(progress)
        rates = []
        for _ in range(NUM_STEPS):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        axes.plot([100 * step / NUM_STEPS for step in range(NUM_STEPS)], rates, color=colour, label=label, lw=2)
    plain(
        axes,
        "LayerTokenLR: the rate follows what blocks have seen",
        "share of the run, %",
        "learning rate, of its peak",
    )
    axes.set(xlim=(-1, 101), ylim=(0, 1.05))
    axes.legend(frameon=False, loc="upper right")


def draw_saving(axes: Axes) -> None:
    """Draw what the default saves of whole models, over the whole run."""
    with torch.device("meta"):
        swin = anatomy_of(timm.create_model("swinv2_base_window8_256"))
    found = {**models(), "SwinV2-B, 256 pixels": (swin, swin.num_tokens or 0)}
    for row, (anatomy, num_tokens) in enumerate(found.values()):
        blocks = tuple(range(1, len(anatomy.blocks) - 1))
        for place, (growth, colour) in enumerate(((1.0, PALE), (DEFAULT.growth, BLUE))):
            schedule = TokenSchedule(DEFAULT.start_tokens, round(growth * NUM_STEPS))
            saved = TokenPlan(anatomy, blocks, schedule, NUM_STEPS, num_tokens).saved_flops()
            axes.barh(row, 100 * saved, color=colour, height=0.62)
            style = {"color": "white" if place else "0.25", "fontsize": 9.5, "va": "center"}
            if saved > 0.1:
                axes.text(100 * saved - 0.7, row, f"{100 * saved:.0f} %", ha="right", **style)
            elif not place:
                axes.text(
                    100 * saved + 0.5, row, f"at most {100 * saved:.0f} %: few blocks have windows to drop", **style
                )
    axes.barh(0, 0, color=BLUE, label=f"growth {DEFAULT.growth:g}, the default")
    axes.barh(0, 0, color=PALE, label="growth over the whole run")
    axes.set_yticks(range(len(found)), found)
    axes.invert_yaxis()
    plain(axes, "What starting with a quarter saves of a run", "share of the FLOPs, heads included, %", "")
    axes.set(ylim=(len(found) - 0.5, -1.15))
    axes.legend(frameon=False, loc="upper left", ncols=2, borderpad=0.1, handlelength=1, columnspacing=1, fontsize=9)


def draw() -> Figure:
    """Draw all of it."""
    figure, ((kept, tokens), (rates, saving)) = plt.subplots(2, 2, figsize=(11, 7.2), layout="constrained")
    figure.get_layout_engine().set(hspace=0.07, wspace=0.06)
    draw_kept(kept)
    draw_tokens(tokens)
    draw_rates(rates)
    draw_saving(saving)
    return figure


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    # On white: GitHub shows it on a dark page too.
    draw().savefig(PICTURES / "token_dropping.png", dpi=130, facecolor="white")
