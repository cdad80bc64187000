"""The tables of the results, in Markdown, from the evidence alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import get_args

import numpy as np
from scipy import stats

from lit_accel.report.frontier import amount
from lit_accel.report.noise import Cost
from lit_accel.report.saving import Saving
from scripts.bench.analysis import CONFIDENCE, End, Evidence, Gap, Reading, mean_and_deviation
from scripts.bench.jobs import jobs, row_key
from scripts.bench.log import Row
from scripts.bench.study import DENSE, TOGETHER, Arm
from scripts.bench.tuning import is_interior
from scripts.bench.verdicts import Verdict, saved, verdict


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def state(rows: Sequence[Row]) -> str:
    """Return how far the study is."""
    known = {job.key for job in jobs(rows)}
    done = known & {row_key(row) for row in rows}
    commits = len({row["commit"] for row in rows})
    hours = sum(row["wall_seconds"] for row in rows) / 3600
    rest = len(known - done)
    made = f"{len(rows)} runs are in the log, of {hours:.1f} hours of one core and {commits} commits"
    if rest:
        return f"{made}; **at least {rest} of the registry are still to be made**. `make bench` goes on."
    return f"{made}: all that the registry asks for."


FAR_FROM_CONVERGED = "All runs are far from converged: the regime in which small and cheap models look best."


def regime(evidence: Evidence) -> str:
    """Return what the verdicts of a rung are limited to, as far as it was run."""
    return f"{setting(evidence)} {FAR_FROM_CONVERGED}{_without_methods(evidence)}"


def setting(evidence: Evidence) -> str:
    """Return what was trained on a rung, and for how long."""
    rung = evidence.rung
    run = {reading.budget for reading in evidence.readings if reading.arm.role == "method"}
    tokens = [budget * rung.unit_steps * rung.tokens_per_step for budget in (*sorted(run), max(evidence.dense))]
    *methods, longest = [f"{number / rung.body:.1f}" for number in tokens]
    trained = f"methods were trained for {' and '.join(methods)} of them a parameter, " if methods else ""
    return (
        f"{rung.title}: {rung.body / 1e6:.2f}M parameters in blocks, steps of {rung.samples_per_step} x "
        f"{rung.tokens_per_sample} tokens; {trained}dense models for up to {longest}, less than one epoch each."
    )


def _without_methods(evidence: Evidence) -> str:
    """Say what a smaller model saves, beside which all savings of methods are to be seen."""
    best = map(evidence.best_smaller_model, evidence.rung.budgets)
    found = [f"{reading.arm.title}, at x{reading.budget:g} {saved(reading)}" for reading in best if reading is not None]
    return f" What fewer blocks do without any method: {'; '.join(found)}." if found else ""


def frontier_table(evidence: Evidence) -> str:
    """Return the dense runs, what the curve makes of them, and how finely savings can be told."""
    rung, curve, lines = evidence.rung, evidence.in_flops.curve, []
    outside = [(budget, DENSE, ends) for budget, ends in evidence.dense.items() if budget not in rung.fitted_budgets]
    for budget, arm, ends in sorted([*outside, *evidence.fitted], key=lambda each: each[0]):
        mean, deviation = mean_and_deviation([end.loss for end in ends])
        rate = evidence.study.learning_rate(DENSE, budget) or math.nan
        tokens = ends[0].num_steps * rung.tokens_per_step
        flops = fmean(end.flops for end in ends)
        name = f"x{budget:g}" + (" (B1)" if arm != DENSE else "" if budget in rung.fitted_budgets else " (not fitted)")
        above = "" if curve is None else f"{mean - float(curve.loss(np.log([flops]))[0]):+.4f}"
        cells = [name, f"{len(ends)}", f"{ends[0].num_steps:,}", f"{tokens / rung.body:.1f}", f"{rate:g}"]
        cells += [amount(flops, "flops"), f"{mean:.4f} ± {deviation:.4f}", above]
        lines.append([*cells, *accuracy_cells(evidence, ends)])
    header = ["budget", "seeds", "steps", "tokens a parameter", "learning rate", "cost", "held-out loss", "above curve"]
    return f"{table([*header, *accuracy_header(evidence)], lines)}\n\n{_noise(evidence)}"


def _noise(evidence: Evidence) -> str:
    curve, scatter = evidence.in_flops.curve, evidence.scatter
    if curve is None:
        return f"No frontier yet: {evidence.in_flops.reason}"
    _, misfit = evidence.in_flops.shared
    budgets = [budget for budget in evidence.rung.budgets if budget in evidence.dense]
    floors = []
    for budget in budgets:
        deviation = float(scatter.at(fmean(end.loss for end in evidence.dense[budget])))
        slope, seeds = evidence.slope(budget), len(DENSE.seeds)
        least = stats.t.ppf((1 + CONFIDENCE) / 2, scatter.num_free) * math.sqrt(2 * (deviation**2 / seeds + misfit**2))
        floors.append(
            f"at x{budget:g} by {deviation:.4f} nats, which is {deviation / slope:.1%} of compute, so that {seeds} "
            f"seeds against {seeds} tell {least / slope:.1%} from nothing"
        )
    beyond = (
        f" It misses budgets by {misfit:.4f} nats beyond what seeds explain; all intervals of savings contain that."
        if misfit
        else ""
    )
    return (
        f"The curve is L = {curve.floor[0]:.3f} + {curve.excess[0]:.3f} (C / C0)^-{curve.exponent[0]:.3f}.{beyond} "
        f"**Noise floor**: seeds scatter {'; '.join(floors)} ({scatter.num_free} degrees of freedom; runs that end "
        f"higher scatter by more). The unit of seconds is off by {evidence.unit_error:.1%} between groups of "
        "runs." + "".join(f"\n\n{warning}" for warning in evidence.in_flops.warnings)
    )


def checks_table(evidence: Evidence) -> str:
    """Return what must come out as it does if the bench can be trusted."""
    lines = []
    for name, expected in (("null", "contain 0"), ("half-lr", "lie below 0")):
        for reading in evidence.of(name):
            savings = (reading.in_flops, reading.in_seconds)
            answers = [_holds(name, saving) for saving in savings]
            lines.append([reading.arm.title, f"x{reading.budget:g}", *map(saving_cell, savings), expected, *answers])
    for shorter, longer, fake in evidence.fake_savings():
        what = f"no method: the run of x{shorter:g}, held against that of x{longer:g} in mid-way"
        lines.append([what, f"x{shorter:g}", f"{fake:+.1%}", "", "be 0", "", ""])
    header = ["check", "budget", "FLOPs saved", "seconds saved", "should", "do FLOPs?", "do seconds?"]
    return table(header, lines)


def _holds(name: str, saving: Saving) -> str:
    if saving.low is None or saving.high is None:
        return "not decidable"
    holds = saving.low <= 0 <= saving.high if name == "null" else saving.high < 0
    return "yes" if holds else "**no**"


def costs_table(evidence: Evidence, budget: float) -> str:
    """Return what a step of each arm costs, and where its runs end."""
    lines = []
    for reading in evidence.readings:
        if reading.budget == budget:
            mean, deviation = reading.loss
            shift = "" if reading.paired is None else f"{reading.paired[0]:+.4f} ± {reading.paired[1]:.4f}"
            costs = [f"{reading.flops_share:.3f}", seconds_cell(reading.seconds_share), _realised(reading)]
            ends = [f"{mean:.4f} ± {deviation:.4f}", shift, *accuracy_cells(evidence, reading.ends)]
            lines.append([reading.arm.title, f"{reading.lr:.2g}", *costs, *ends])
    header = ["arm", "learning rate", "FLOPs", "seconds", "realised share", "held-out loss", "above dense, same seed"]
    return table([*header, *accuracy_header(evidence)], lines)


def accuracy_header(evidence: Evidence) -> list[str]:
    """Return the name of the column of the accuracy, on rungs that have one."""
    return ["accuracy, %"] if evidence.rung.accuracy else []


def accuracy_cells(evidence: Evidence, ends: Sequence[End]) -> list[str]:
    """Return the accuracy of runs, on rungs that have one."""
    if not evidence.rung.accuracy:
        return []
    mean, deviation = mean_and_deviation([100 * end.accuracy for end in ends if end.accuracy is not None])
    return [f"{mean:.2f} ± {deviation:.2f}"]


def savings_table(evidence: Evidence, budget: float) -> str:
    """Return what each arm saved at equal loss, and how it stands against its controls."""
    lines = []
    for reading in evidence.readings:
        if reading.budget == budget:
            savings = [saving_cell(reading.in_flops), saving_cell(reading.in_seconds)]
            lines.append([reading.arm.title, *savings, gap_cell(reading.b1), gap_cell(reading.b2)])
    header = ["arm", "FLOPs saved", "seconds saved", "nats above B1", "nats above B2"]
    return table(header, lines) + "".join(f"\n\n{sentence}" for sentence in _together(evidence, budget))


def _together(evidence: Evidence, budget: float) -> list[str]:
    """Say whether methods in one run save what each of them alone would make one expect."""
    dense = {
        reading.arm.name: 1 / (1 - reading.in_flops.share)
        for reading in evidence.readings
        if reading.budget == budget and reading.in_flops.share is not None
    }
    titles = {arm.name: arm.title for arm in evidence.study.others}
    sentences = []
    for name, parts in TOGETHER.items():
        if {name, *parts} <= dense.keys():
            product = math.prod(dense[part] for part in parts)
            sentences.append(
                f"{titles[name]}: dense training would cost {dense[name]:.2f} times as much, and by the product of "
                f"both alone {product:.2f} times. The index of composition is {dense[name] / product:.2f}: 1 if they "
                "multiply, less if one does some of what the other does."
            )
    return sentences


def depths_table(evidence: Evidence, budget: float) -> str:
    """Return what dense models with fewer blocks cost, where they end in as many steps as the full one, and "save"."""
    dense = evidence.dense.get(budget, ())
    lines = []
    for reading in evidence.smaller_models:
        if reading.budget == budget:
            share = fmean(end.flops for end in reading.ends) / fmean(end.flops for end in dense)
            seconds, loss = seconds_cell(reading.seconds_share), "{:.4f} ± {:.4f}".format(*reading.loss)
            savings = [saving_cell(saving) for saving in (reading.in_flops, reading.in_seconds)]
            lines.append([reading.arm.title, f"{len(reading.ends)}", f"{share:.3f}", seconds, loss, *savings])
    mean, deviation = mean_and_deviation([end.loss for end in dense])
    lines.append([DENSE.title, f"{len(dense)}", "1.000", "1", f"{mean:.4f} ± {deviation:.4f}", "", ""])
    return table(["model", "seeds", "FLOPs", "seconds", "held-out loss", "FLOPs saved", "seconds saved"], lines)


def seconds_cell(share: tuple[float, float] | None) -> str:
    """Return seconds in parts of dense ones, with their standard error."""
    return "" if share is None else f"{share[0]:.2f} ± {share[0] * share[1]:.2f}"


def _realised(reading: Reading) -> str:
    return "" if reading.realised_share is None else "{:.2f} ± {:.2f}".format(*reading.realised_share)


def verdicts_table(evidence: Evidence) -> str:
    """Return the verdict on each method that was run."""
    methods = [arm for arm in evidence.study.others if arm.role == "method"]
    run = [arm for arm in methods if evidence.of(arm.name)]
    lines = [[arm.title, f"**{word}**", why] for arm in run for word, why in [verdict(evidence, arm)]]
    missing = ", ".join(arm.title for arm in methods if arm not in run)
    return table(["method", "verdict", "why"], lines) + (f"\n\nNot run yet: {missing}." if missing else "")


def in_short(found: Mapping[str, Evidence]) -> str:
    """Return how many methods have which verdict on each rung, and how many a smaller dense model does better than."""
    lines = []
    for evidence in found.values():
        methods = [arm for arm in evidence.study.others if arm.role == "method" and evidence.of(arm.name)]
        if not methods:
            continue
        words = Counter(verdict(evidence, arm)[0] for arm in methods)
        counted = ", ".join(f"**{word}** {words[word]}" for word in get_args(Verdict) if words[word])
        outdone = sum(all(map(evidence.better_model, evidence.of(arm.name))) for arm in methods)
        lines.append(
            f"- {evidence.rung.title.partition(',')[0]}, {len(methods)} methods and variants: {counted}. A dense model "
            f"with fewer blocks did better than {'all' if outdone == len(methods) else outdone} of them."
        )
    return "\n".join(lines)


def summary(found: Mapping[str, Evidence]) -> str:
    """Return what was found on each rung: what was trained, and a table of verdicts without intervals."""
    parts = []
    for evidence in found.values():
        name, _, rest = setting(evidence).partition(",")
        parts.append(f"**{name}**,{rest}\n\n{summary_table(evidence)}")
    return "\n\n".join(parts)


def summary_table(evidence: Evidence) -> str:
    """Return the verdicts of a rung, after what the best of the smaller dense models saves by itself."""
    readings = {(reading.arm.name, reading.budget): reading for reading in evidence.readings}
    budgets = sorted({budget for _, budget in readings})
    best = [evidence.best_smaller_model(budget) for budget in budgets]
    titles = " / ".join(dict.fromkeys(reading.arm.title for reading in best if reading is not None))
    lines = [[f"*{titles}*", "*no method*", *_savings(best), "", ""]] if titles else []
    for arm in evidence.study.others:
        run = [readings.get((arm.name, budget)) for budget in budgets]
        if arm.role == "method" and any(run):
            b1 = " / ".join(_outcome(reading and reading.b1) for reading in run)
            b2 = " / ".join(_outcome(reading and reading.b2) for reading in run)
            lines.append([arm.title, f"**{verdict(evidence, arm)[0]}**", *_savings(run), b1, b2])
    at = " / ".join(f"x{budget:g}" for budget in budgets)
    return table(["method", "verdict", f"FLOPs saved, {at}", f"seconds saved, {at}", "B1", "B2"], lines)


def _savings(readings: Sequence[Reading | None]) -> list[str]:
    """Return what was saved at each budget, in FLOPs and, in a cell of its own, in seconds."""
    costs: tuple[Cost, ...] = ("flops", "seconds")
    return [" / ".join("missing" if r is None else _in_short(r.saving(cost)) for r in readings) for cost in costs]


def _in_short(saving: Saving) -> str:
    if saving.share is not None:
        return f"{saving.share:+.0%}"
    return "?" if saving.outside is None else _bound(math.inf if saving.outside == "better" else -math.inf)


def _outcome(gap: Gap | None) -> str:
    return "missing" if gap is None else gap.outcome


def tuning_table(evidence: Evidence) -> str:
    """Return the trials of all learning rates."""
    budgets = evidence.rung.tuned_budgets
    found: list[tuple[Arm, float]] = [(DENSE, budget) for budget in budgets]
    known = {row["arm"] for row in evidence.study.rows if row["stage"] == "tune"}
    others = [*evidence.study.others, evidence.study.smaller_tuned]
    found += [(arm, budgets[0]) for arm in others if arm.name in known]
    trials = [(arm, budget, evidence.study.trials(arm, budget)) for arm, budget in found]
    rates = sorted({rate for _, _, losses in trials for rate in losses} | set(evidence.rung.grid))
    lines = []
    for arm, budget, losses in trials:
        best = min(losses.values(), default=math.nan)
        written = {rate: f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for rate, loss in losses.items()}
        cells = [written.get(rate, "") for rate in rates]
        rate = evidence.study.tuned(arm, budget)
        where = "" if rate is None else f"{rate:g}" + ("" if is_interior(losses) else ", at an end")
        lines.append([arm.title, f"x{budget:g}", *cells, where])
    return table(["arm", "budget", *(f"{rate:g}" for rate in rates), "optimum"], lines)


def saving_cell(saving: Saving) -> str:
    """Return a saving with its interval."""
    if saving.share is None:
        return (saving.reason or "").rpartition(": ")[2]
    if saving.low is None or saving.high is None:
        return f"{saving.share:+.0%}"
    return f"{saving.share:+.0%} [{_bound(saving.low)}, {_bound(saving.high)}]"


def _bound(value: float) -> str:
    return f"{value:+.0%}" if math.isfinite(value) else ("below all" if value < 0 else "above all")


def gap_cell(gap: Gap | None) -> str:
    """Return a gap with its interval."""
    return "" if gap is None else f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def card_table(evidence: Evidence, arms: Sequence[str]) -> str:
    """Return what the card of a method shows: its arms at all budgets, and its verdicts.

    Args:
        evidence: What the log says.
        arms: Names of the arms.
    """
    readings: list[Reading] = [reading for name in arms for reading in evidence.of(name)]
    lines = [
        [
            *(reading.arm.title, f"x{reading.budget:g}"),
            *(f"{reading.flops_share:.2f}", seconds_cell(reading.seconds_share)),
            *(saving_cell(reading.in_flops), saving_cell(reading.in_seconds)),
            *(gap_cell(reading.b1), gap_cell(reading.b2)),
        ]
        for reading in readings
    ]
    header = ["arm", "budget", "FLOPs", "seconds", "FLOPs saved", "seconds saved", "above B1", "above B2"]
    methods = [arm for arm in evidence.study.others if arm.name in arms and arm.role == "method"]
    words = [f"- {arm.title}: **{word}**; {why}." for arm in methods for word, why in [verdict(evidence, arm)]]
    return "\n".join([table(header, lines), "", *words]) if readings else "Not run yet."
