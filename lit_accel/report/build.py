"""From ledgers to a report: what ``lit-accel report`` computes and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_accel.report.arms import Arm, group
from lit_accel.report.frontier import Frontier, fit_frontier
from lit_accel.report.phases import RunPhases, phases_of
from lit_accel.report.results import Result, compare
from lit_accel.report.runs import ReportError, find_runs
from lit_accel.report.wording import warnings_about_draws, warnings_about_runs, warnings_about_scatter, what_it_rests_on


@dataclass(frozen=True)
class Report:
    """What ledgers say about arms, as it is printed, drawn and written to the page.

    Args:
        metric: The held-out loss.
        arms: The arms, dense ones first.
        in_flops: The dense frontier in FLOPs.
        in_seconds: The dense frontier in seconds.
        results: Each arm that is not dense, at each of its budgets.
        phases: Phases of the runs that had more than one.
        rests_on: What was taken as dense, in sentences.
        warnings: What to be careful about, in sentences.
        page: The HTML page that was written.
        picture: The PNG that was written.
    """

    metric: str
    arms: tuple[Arm, ...]
    in_flops: Frontier
    in_seconds: Frontier
    results: tuple[Result, ...]
    phases: tuple[RunPhases, ...]
    rests_on: tuple[str, ...]
    warnings: tuple[str, ...]
    page: Path
    picture: Path


def report(
    runs: Sequence[str | Path],
    metric: str = "val/loss",
    dense: Sequence[str] | None = None,
    output: str | Path = ".",
) -> Report:
    """Compare methods with the dense frontier, and write ``report.html`` and ``report.png``.

    Args:
        runs: Ledgers, folders of runs, or folders above runs; each may be written ``LABEL=PATH``.
        metric: A monitored loss: lower is better.
        dense: Labels of the arms that make up the dense frontier. By default those whose ledgers say that nothing
            was saved or added. A method at its neutral setting looks the same: name the dense arms to compare it.
        output: The folder to write to; made if there is none.

    Returns:
        All that was found.

    Raises:
        ReportError: If the runs cannot be reported on; the message says what to do.
    """
    # Here, because importing them takes longer than all the rest.
    from lit_accel.report.page import write_page
    from lit_accel.report.picture import draw_picture

    found, left_out = find_runs(runs, metric)
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"{folder} cannot be a folder: {error.strerror or error}. Give another --output.") from error
    arms, warnings = group(found, dense)
    dense_runs = [run for arm in arms if arm.is_dense for run in arm.runs]
    # A run that went on after its last measurement was measured in mid-way.
    ends = [run for run in dense_runs if run.is_measured_at_its_end]
    in_flops, in_seconds = fit_frontier(ends, "flops"), fit_frontier(ends, "seconds")
    results = [result for arm in arms if not arm.is_dense for result in compare(arm, ends, in_flops, in_seconds)]
    warnings = [
        *left_out,
        *warnings,
        *warnings_about_runs(arms),
        *in_flops.warnings,
        *in_seconds.warnings,
        *warnings_about_scatter(arms, in_flops),
        *(warning for result in results for warning in warnings_about_draws(result)),
    ]
    made = Report(
        metric=metric,
        arms=arms,
        in_flops=in_flops,
        in_seconds=in_seconds,
        results=tuple(results),
        phases=tuple(
            phases_of(run) for arm in arms for run in arm.runs if run.ledger.phase.min() < run.ledger.phase.max()
        ),
        rests_on=tuple(what_it_rests_on(arms, in_flops)),
        warnings=tuple(dict.fromkeys(warnings)),
        page=folder / "report.html",
        picture=folder / "report.png",
    )
    draw_picture(made, made.picture)
    write_page(made, made.page)
    return made
