"""The picture of a plan: what each step of the run costs, in parts of a dense one."""

from __future__ import annotations

from pathlib import Path

from lit_accel.compute.plan import RunPlan
from lit_accel.compute.units import with_prefix
from lit_accel.planning.forecast import Forecast

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MOST_POINTS = 400
_KINDS = (".png", ".pdf", ".svg", ".jpg")


def check_picture(path: str | Path) -> None:
    """Check that a picture can be written, before anything is computed for it.

    Args:
        path: The file.

    Raises:
        ValueError: If its kind is not known, it is a folder, or its folder cannot be made.
    """
    if Path(path).suffix.lower() not in _KINDS:
        raise ValueError(f"picture is {str(path)!r}; it is a file called {', '.join(_KINDS)}, or null for no picture.")
    if Path(path).is_dir():
        raise ValueError(f"picture is {str(path)!r}, which is a folder. Give a file in it, such as plan.png.")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"picture is {str(path)!r}, whose folder cannot be made: {reason}. Give another one."
        ) from error


def draw_forecast(forecast: Forecast, path: str | Path) -> None:
    """Draw the cost of the steps of a run, of all methods together and of each alone.

    Args:
        forecast: What a run will be like.
        path: The file to write, a PNG, PDF, SVG or JPEG; its folder is made.
    """
    # Here, because a training process has no use for it.
    from matplotlib.figure import Figure

    plan = forecast.plan
    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    lines = {} if len(forecast.alone) < 2 else forecast.alone
    for colour, (name, alone) in zip(_COLOURS, lines.items(), strict=False):
        axes.plot(*_curve(alone), color=colour, lw=1.2, label=f"{name} alone")
    steps, shares = _curve(plan)
    label = "together" if lines else next(iter(forecast.alone), "dense")
    axes.plot(steps, shares, color="black", lw=2, label=label)
    axes.fill_between(steps, shares, color="black", alpha=0.08, lw=0)
    axes.axhline(1, color="grey", lw=0.8, ls="--")
    top = max(1.0, *shares, *(max(_curve(alone)[1]) for alone in lines.values()))
    ends = [*(phase.start for phase in plan.phases[1:]), plan.num_steps]
    for phase, end in zip(plan.phases, ends, strict=True):
        if phase.start:
            axes.axvline(phase.start, color="grey", lw=0.6, ls=":")
        # Where there is room for it.
        if end - phase.start > 0.07 * plan.num_steps:
            axes.text((phase.start + end) / 2, 1.03 * top, with_prefix(phase.num_parameters), ha="center", fontsize=8)
    axes.set(xlim=(0, plan.num_steps), ylim=(0, 1.12 * top))
    axes.set(xlabel="optimizer step", ylabel="FLOPs of a step, of dense")
    axes.set_title(f"{plan.share:.1%} of the FLOPs of a dense run", loc="left", fontsize=11)
    axes.set_title("above: parameters that take part", loc="right", fontsize=8, color="grey")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _curve(plan: RunPlan) -> tuple[list[float], list[float]]:
    """Return steps and mean costs: of so many steps at a time that a line can be seen."""
    costs = plan.step_flops
    size = -(-len(costs) // _MOST_POINTS)
    chunks = [costs[start : start + size] for start in range(0, len(costs), size)]
    middles = [plan.stride * (size * index + len(chunk) / 2) for index, chunk in enumerate(chunks)]
    return middles, [sum(chunk) / len(chunk) / plan.dense_step_flops for chunk in chunks]
