"""What the report says in words, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lit_accel.compute.units import with_prefix
from lit_accel.report.arms import Arm
from lit_accel.report.frontier import Frontier, amount
from lit_accel.report.noise import Cell, scatter
from lit_accel.report.results import Result
from lit_accel.report.runs import Run
from lit_accel.report.saving import Saving

# More draws outside of the measured range than this are mentioned.
MANY_OUTSIDE = 0.05
# So many times the dense runs' scatter is, with a few seeds, no accident any more.
MUCH_SCATTER = 2.0
DASH = "\N{EN DASH}"

HOW_TO_READ = (
    (
        "Saved at equal loss",
        "1 - cost of the method / cost at which dense training ends at the same held-out loss. The dense cost is read "
        "off a curve, loss = floor + excess x (cost / reference)^-exponent, fitted by least squares to the ends of "
        "the dense runs, a budget being weighted by its runs. Curves of dense runs are never read in mid-way: there "
        "their learning rate has not decayed, which flatters any method. Outside of the measured losses no number is "
        "given. A negative saving is a loss: the method cost more.",
    ),
    (
        "Interval",
        "95 % of 2,000 draws of a bootstrap over seeds. Budgets are kept; each run of the dense budgets and of the "
        "method gets the deviation of a random seed from its budget's mean, the curve is fitted anew, and the saving "
        "is read again. Deviations of all budgets of the dense runs and of the arm are drawn from together and widened "
        "for their small number; from 20 degrees of freedom on, their size depends on the loss. From eight budgets on, "
        "what the curve misses them by, beyond the seeds, is drawn too. Without repeated seeds the residuals of the "
        "curve stand in. Where draws leave the measured range, an end of the interval is open.",
    ),
    (
        "FLOPs and seconds",
        "FLOPs are counted in closed form: 2 a multiply-add, forward and backward. Seconds are the wall time of "
        "training without validation. They have a frontier each and columns of their own, and mean something only if "
        "all runs had one and the same otherwise idle machine.",
    ),
    (
        "Realised share",
        "log(time ratio) / log(FLOPs ratio), both at equal tokens: the FLOPs ratio is what the full-size model would "
        "have paid over what was paid, the time ratio is what dense training takes for as many tokens (by the median "
        "seconds a token of dense runs of the same model) over what it took. 100 % means that all that was counted "
        "arrived as time. It is left out where the FLOPs ratio is 1.05 or less.",
    ),
    (
        "Loss at equal tokens",
        "The arm's loss minus the mean loss of dense runs of the same model on as many tokens, within 2 %.",
    ),
    (
        "What the ledgers do not know",
        "Whether a run had finished its learning-rate decay, which learning rates were tried at each budget, and "
        "whether all runs saw the same data and the same held-out texts. A frontier of few or untuned dense runs "
        "flatters every method.",
    ),
)


def percent(share: float) -> str:
    """Write a share, such as ``18.2%``."""
    # No -0.0%.
    return f"{round(share, 3) + 0.0:.1%}"


def interval(saving: Saving) -> str:
    """Write an interval, or why there is none."""
    if saving.low is None or saving.high is None:
        return saving.interval
    low, high = (percent(end) if np.isfinite(end) else "open" for end in (saving.low, saving.high))
    return f"{low} to {high}"


def run_name(run: Run) -> str:
    """Name a run by its arm and its folder, relative to the current one where it lies there."""
    folder = run.folder.resolve()
    here = Path.cwd()
    return f"{run.label} ({folder.relative_to(here) if folder.is_relative_to(here) else run.folder})"


def formula(frontier: Frontier, metric: str) -> str:
    """Write the fitted curve."""
    if frontier.curve is None:
        return frontier.reason or ""
    curve = frontier.curve
    reference = amount(float(np.exp(curve.log_reference[0])), frontier.cost)
    name = "C" if frontier.cost == "flops" else "T"
    low, high = (amount(float(np.exp(end)), frontier.cost) for end in frontier.log_costs)
    floor = f"{curve.floor[0]:.4g} + " if curve.floor[0] > 5e-5 else ""
    return (
        f"{metric} = {floor}{curve.excess[0]:.4g} x ({name} / {reference})^-{curve.exponent[0]:.3g}, "
        f"measured from {low} to {high}"
    )


def what_it_rests_on(arms: Sequence[Arm], frontier: Frontier) -> list[str]:
    """Say what was taken as dense and how much there is of it."""
    dense = [arm for arm in arms if arm.is_dense]
    if not dense:
        return [
            "No run was taken as dense: none cost what its full-size model costs. Name the dense arms with --dense."
        ]
    counted = [(amount(float(np.exp(cell.mean[0])), "flops"), len(cell.losses)) for cell in frontier.cells]
    budgets = ", ".join(f"{flops} ({number} run{'s' if number > 1 else ''})" for flops, number in counted)
    budgets = budgets or "none was measured at its end"
    num_runs = sum(len(arm.runs) for arm in dense)
    return [
        f"Taken as dense: {', '.join(arm.label for arm in dense)} ({num_runs} run{'s' if num_runs > 1 else ''}). "
        "Change this with --dense LABEL.",
        f"Dense budgets: {budgets}. Runs of one budget are read as seeds of each other.",
        "Whether the learning rate was tuned at each budget is not known to the report; where it was not, savings "
        "are flattered.",
    ]


def warnings_about_runs(arms: Sequence[Arm]) -> list[str]:
    """Say what is wrong with single runs or with their mixture."""
    warnings = []
    for arm in arms:
        for run in arm.runs:
            if not run.is_measured_at_its_end:
                consequence = "It is not part of the frontier." if arm.is_dense else "Its saving is read there."
                warnings.append(
                    f"{run_name(run)} last measured its loss at step {run.steps} of {run.ledger.step[-1]}, in mid-way. "
                    f"{consequence} Validate at the end of each run, by "
                    "Trainer(val_check_interval=N, check_val_every_n_epoch=None) with an N that divides max_steps; a "
                    "loss of NaN counts as not measured."
                )
    sizes: dict[str, int] = {}
    for run in (run for arm in arms if arm.is_dense for run in arm.runs):
        size = with_prefix(int(run.ledger.num_parameters[-1]))
        sizes[size] = sizes.get(size, 0) + 1
    if len(sizes) > 1:
        listed = ", ".join(f"{size} ({count} runs)" for size, count in sizes.items())
        warnings.append(
            f"Dense runs of models of several sizes make up one frontier, by parameters: {listed}. Take out what does "
            "not belong there with --dense LABEL."
        )
    return warnings


def warnings_about_scatter(arms: Sequence[Arm], frontier: Frontier) -> list[str]:
    """Say if an arm's seeds scatter much more than the dense ones, with which its interval is shared."""
    dense = scatter(frontier.cells)
    warnings = []
    for arm in arms:
        own = scatter([Cell.of(runs, frontier.cost) for runs in arm.budgets])
        if not arm.is_dense and own and dense and own > MUCH_SCATTER * dense:
            warnings.append(
                f"Seeds of {arm.label} scatter {own / dense:.1f} times as much as those of the dense runs. Its "
                "intervals, which share the scatter of both, are too narrow."
            )
    return warnings


def warnings_about_draws(result: Result) -> list[str]:
    """Say if many draws of an arm's savings left the measured range."""
    shares = [
        f"{percent(saving.share_outside)} of the draws in {name}"
        for saving, name in ((result.in_flops, "FLOPs"), (result.in_seconds, "seconds"))
        if saving.share_outside > MANY_OUTSIDE
    ]
    if not shares:
        return []
    return [
        f"{result.label} at {result.steps:,} steps: {' and '.join(shares)} left the measured range, so its intervals "
        "are open there, or reach further than they say. Dense runs at lower or higher budgets would close them."
    ]
