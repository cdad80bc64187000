"""Write the measured tables and pictures from the result files, so that no number is typed.

With ``--check`` nothing is written; it fails if a table is not the one that the files give.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from scripts import compare_layer_dropping as layer_dropping
from scripts import compare_mixed_sparsity as mixed_sparsity
from scripts import compare_token_dropping as token_dropping
from scripts import compare_vision as vision
from scripts import composition_tables, draw_models, measure_models, measure_plan, versions
from scripts.bench import report as bench
from scripts.compare_presets import CHOICES, CHOICES_LR, DEFAULT, SETUPS, VARIANTS, read_results
from scripts.comparison import Comparison
from scripts.provenance import device
from scripts.soaking import tables as soak

CHOICES_SETUP = "width 128"
# How the first results name what made them.
_PROGRAM = re.compile(r"python (\w+)\.py")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"


def machine(record: dict[str, Any]) -> str:
    """Return where and when a result was measured, in words."""
    where, versions = device(record["machine"]), record["versions"]
    return f"{where}, torch {versions['torch']}, lightning {versions['lightning']}, {record['date']}"


def source(*records: dict[str, Any]) -> str:
    """Return by which commands, where and when results were measured, as their provenance has it."""
    commands = dict.fromkeys(_PROGRAM.sub(r"python -m scripts.\1", record["command"]) for record in records)
    # Runs of a comparison are made by one command after the other, whose arguments choose among them.
    (program,) = {command.split()[2] for command in commands}
    by = next(iter(commands)) if len(commands) == 1 else f"python -m {program}"
    machines = Counter(map(machine, records))
    places = [f"{place} ({number} runs)" if len(machines) > 1 else place for place, number in machines.items()]
    return f"`{by}`; {'; '.join(places)}."


def presets_table(setup: str) -> str:
    """Return the comparison of presets of one set-up, mean and spread over seeds at each learning rate."""
    rows = [row for row in read_results() if row["setup"] == setup]
    rates = sorted({row["lr"] for row in rows})
    # The first set-up has a table of single choices besides; of the second there are too few runs for one.
    shown = [name for name in VARIANTS if name not in CHOICES or setup != CHOICES_SETUP]
    variants = [name for name in shown if any(row["variant"] == name for row in rows)]
    dense_flops = max(row["flops"] for row in rows if row["variant"] == "dense 100 %")

    def cell(variant: str, rate: float) -> str:
        losses = [row["val_loss"] for row in rows if row["variant"] == variant and row["lr"] == rate]
        return mean_and_spread(losses, 1, 3) if losses else ""

    lines = [
        "| variant | FLOPs | " + " | ".join(f"loss, lr {rate:g}" for rate in rates) + " |",
        "| --- | --- | " + " | ".join("---" for _ in rates) + " |",
    ]
    for variant in variants:
        flops = statistics.mean(row["flops"] for row in rows if row["variant"] == variant) / dense_flops
        lines.append(f"| {variant} | {flops:.0%} | " + " | ".join(cell(variant, rate) for rate in rates) + " |")
    full = SETUPS[setup]
    tokens = full.batch_size * full.block_size
    return "\n".join(
        [
            f"Held-out loss (nats a token) of a GPT of {full.num_blocks} blocks and width {full.embed} on the standard "
            "library's",
            f"sources, {full.num_steps:,} dense steps of {tokens:,} tokens. Every run has its own completed "
            "learning-rate decay; lower is",
            "better. Mean ± standard deviation over two or three seeds; without ±, one seed.",
            "",
            *lines,
            "",
            source(*(row["provenance"] for row in rows if row["variant"] in variants)),
        ]
    )


def choices_table() -> str:
    """Return what each single choice does to the held-out loss, best first."""
    rows = [row for row in read_results() if row["lr"] == CHOICES_LR and row["setup"] == CHOICES_SETUP]
    default = {row["seed"]: row["val_loss"] for row in rows if row["variant"] == DEFAULT}
    found = []
    for name in CHOICES:
        chosen = {row["seed"]: row["val_loss"] for row in rows if row["variant"] == name}
        if chosen:
            # By seed: a seed has the same data and the same first weights in every variant.
            gaps = [loss - default[seed] for seed, loss in chosen.items()]
            found.append((statistics.mean(gaps), min(gaps), max(gaps), len(gaps), name))
    table = [
        f"| {name} | {mean:+.3f} | {low:+.3f} to {high:+.3f} | {number} |"
        for mean, low, high, number, name in sorted(found)
    ]
    spread = statistics.stdev(default.values())
    return "\n".join(
        [
            f"One choice at a time in the set-up of {CHOICES_SETUP}, all else as in the default, with the same 80 % of",
            f"the FLOPs and learning rate {CHOICES_LR:g}. Difference of the held-out loss to the default with the same",
            "seed; negative is better.",
            f"The default's own standard deviation over its {len(default)} seeds is {spread:.3f}: smaller differences",
            "say little.",
            "",
            "| choice | mean | from, to | seeds |",
            "| --- | --- | --- | --- |",
            *table,
            "",
            source(*(row["provenance"] for row in rows if row["variant"] in (DEFAULT, *CHOICES))),
        ]
    )


def vision_table() -> str:
    """Return accuracy and cost of the vision recipes, dense and by V-cycle."""
    rows = [json.loads(line) for line in (RESULTS / "vision.jsonl").read_text().splitlines()]
    lines = ["| model | run | seeds | FLOPs | top-1, % | loss |", "| --- | --- | --- | --- | --- | --- |"]
    for model in vision.MODELS:
        for arm in (vision.DENSE, vision.RECIPE, *vision.CHOICES):
            chosen = [row for row in rows if (row["model"], row["arm"]) == (model, arm)]
            if chosen:
                top1, loss = ([row[key] for row in chosen] for key in ("val_top1", "val_loss"))
                flops = statistics.mean(row["flops_share"] for row in chosen)
                lines.append(
                    f"| {model} | {arm} | {len(chosen)} | {flops:.0%} | "
                    f"{mean_and_spread(top1, 100, 2)} | {mean_and_spread(loss, 1, 4)} |"
                )
    return "\n".join(
        [
            "The small recipes of DeiT and SwinV2 on scikit-learn's digits (held-out fifth, 359 images), dense and by",
            "V-cycle with the same number of steps, each with its own completed decay. Mean ± standard deviation.",
            "The other DeiT rows change one choice of the recipe. Of DeiT, `small phase 50 %` is the recipe itself, "
            "run",
            "again beside other work: what lies between the two is rounding, and smaller differences say nothing.",
            "",
            *lines,
            "",
            source(*(row["provenance"] for row in rows)),
        ]
    )


def mean_and_spread(values: list[float], unit: float, digits: int) -> str:
    """Return ``mean ± standard deviation`` in a unit."""
    spread = f" ± {unit * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{unit * statistics.mean(values):.{digits}f}{spread}"


def share_table() -> str:
    """Return how much of the small level's counted saving arrives in seconds."""
    records = json.loads((RESULTS / "realised_share.json").read_text())
    record = records[-1]
    shares = [
        f"{row['realised_share']:.2f} on {each['provenance']['date']}"
        for each in records
        for row in each["rows"]
        if row["merge_batches"] == record["accumulate"] and row["keeps_memory"] and not row["is_quick"]
    ]
    lines = [
        f"| {row['merge_batches']} | {'yes' if row['keeps_memory'] else 'no'} | {'yes' if row['is_quick'] else 'no'} | "
        f"{row['step_seconds'][0]:.2f} s | {row['flops_ratio']:.3f} | {row['time_ratio']:.3f} | "
        f"{row['realised_share']:.2f} |"
        for row in record["rows"]
    ]
    return "\n".join(
        [
            "An optimizer step of the small level in parts of one of the full level: a GPT of 12 blocks and width 256,",
            f"{record['num_tokens']} tokens, bf16-mixed, a step being {record['accumulate']} micro-batches of "
            f"{record['micro_batch']} sequences at level 0;",
            "the levels are measured in turns within a run. Realised share: log(time ratio) / log(FLOPs ratio). Quick "
            "options:",
            "attention as plain matrix products and GELU as one operation, of which the full model gains, too.",
            "",
            "| `merge_batches` | glibc keeps memory | quick options | full step | FLOPs | seconds | realised share |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            f"Machines differ. All in one piece, memory kept, no quick options: {', '.join(shares)}.",
            "",
            source(record["provenance"]),
        ]
    )


def dropping_seconds_table() -> str:
    """Return how much of the counted saving of dropped blocks arrives in seconds."""
    record = json.loads((RESULTS / "layer_dropping.json").read_text())
    lines = [
        f"| {row['blocks']} blocks, width {row['width']}, {row['num_tokens']} tokens | "
        f"{'yes' if row['compiled'] else 'no'} | {row['flops_ratio']:.3f} | {row['time_ratio']:.3f} | "
        f"{row['realised_share']:.2f} | {row['overhead_when_all_kept']:+.1%} |"
        for row in record["rows"]
    ]
    return "\n".join(
        [
            "An optimizer step of a GPT with 9 of 12 blocks kept, in parts of one with all of them, bf16-mixed; the "
            "arms",
            "take turns within a run. Realised share: log(time ratio) / log(FLOPs ratio). Last column: a step with the",
            "callback attached and every block kept, against one without it.",
            "",
            "| model | compiled | FLOPs | seconds | realised share | attached, all kept |",
            "| --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            source(record["provenance"]),
        ]
    )


def token_seconds_table() -> str:
    """Return how much of the counted saving of dropped tokens arrives in seconds."""
    record = json.loads((RESULTS / "token_dropping.json").read_text())
    lines = [
        f"| {row['blocks']} blocks, width {row['width']}, {row['num_tokens']} tokens | "
        f"{'yes' if row['compiled'] else 'no'} | {'yes' if row['keeps_memory'] else 'no'} | "
        f"{row['kept']:.0%} | {row['flops_ratio']:.3f} | "
        f"{row['time_ratio']:.3f} | {row['realised_share']:.2f} | {row['moving_share']:.1%} |"
        for row in record["rows"]
    ]
    return "\n".join(
        [
            "An optimizer step of a GPT whose middle blocks run on a part of the tokens, in parts of a dense one,",
            "bf16-mixed; the arms take turns within a run. Realised share: log(time ratio) / log(FLOPs ratio). Last",
            "column: taking tokens out and putting them back, timed by itself, in parts of that step.",
            "",
            "| model | compiled | glibc keeps memory | kept | FLOPs | seconds | realised share | moving tokens |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            source(record["provenance"]),
        ]
    )


def sparsity_seconds_tables() -> str:
    """Return how much of the counted saving of mixed sparsity arrives in seconds, and how fast patterns are."""
    record = json.loads((RESULTS / "mixed_sparsity.json").read_text())

    def line(what: str, row: dict[str, Any], num_tokens: int) -> str:
        return (
            f"| {what} | {row['batch_size'] * num_tokens:,} | {'yes' if row['keeps_memory'] else 'no'} | "
            f"{row['flops_ratio']:.3f} | {row['time_ratio']:.3f} | {1 / row['time_ratio']:.2f} | "
            f"{row['realised_share']:.2f} |"
        )

    num_tokens = record["steps"][0]["num_tokens"]
    lines = [line(row["arm"], row, row["num_tokens"]) for row in record["steps"]]
    lines += [line(f"**a whole default run, {row['num_steps']} steps**", row, num_tokens) for row in record["runs"]]
    patterns = list(dict.fromkeys(row["pattern"] for row in record["attention"]))
    speeds = []
    for tokens, dtype in dict.fromkeys((row["num_tokens"], row["dtype"]) for row in record["attention"]):
        found = {r["pattern"]: r for r in record["attention"] if (r["num_tokens"], r["dtype"]) == (tokens, dtype)}
        cells = " | ".join(f"{found[pattern]['speed']:.2f}" for pattern in patterns)
        speeds.append(f"| {tokens:,} | {dtype} | {cells} |")
    first = record["steps"][0]
    switch = max(row["switch_in_dense_steps"] for row in record["steps"])
    return "\n".join(
        [
            f"An optimizer step of a GPT of {first['blocks']} blocks, width {first['width']}, 8 heads and "
            f"{first['vocab']:,} words, {num_tokens} tokens a sequence,",
            "bf16, in parts of a dense one; a fifth of the neurons and 2 of 8 heads, a tenth of the entries, an eighth "
            "of the",
            "tiles. The arms take turns within a process; whole runs, dense and with `MixedSparsityTraining()` as it "
            "comes, take",
            "turns too. Realised share: log(time ratio) / log(FLOPs ratio), the head counted dense. Choosing neurons "
            "and heads and",
            f"taking the others out takes {switch:.2f} dense steps at most.",
            "",
            "| what | tokens a step | glibc keeps memory | FLOPs | seconds | times faster | realised share |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            "Attention by itself, forward and backward: times faster than torch's fused causal attention. 2 sequences, "
            "12 heads of",
            "64 features, window 128.",
            "",
            f"| tokens | type | {' | '.join(patterns)} |",
            f"| --- | --- |{' --- |' * len(patterns)}",
            *speeds,
            "",
            source(record["provenance"]),
        ]
    )


def quality_table(comparison: Comparison, dense: str) -> str:
    """Return held-out losses of the arms of a comparison.

    Args:
        comparison: The comparison.
        dense: The arm whose FLOPs are 100 %.
    """
    rows = comparison.read()
    full = max(row["flops"] for row in rows if row["arm"] == dense)
    lines = ["| run | seeds | FLOPs | held-out loss |", "| --- | --- | --- | --- |"]
    for arm in comparison.arms:
        if chosen := [row for row in rows if row["arm"] == arm]:
            flops = statistics.mean(row["flops"] for row in chosen) / full
            losses = mean_and_spread([row["val_loss"] for row in chosen], 1, 3)
            lines.append(f"| {arm} | {len(chosen)} | {flops:.0%} | {losses} |")
    setup = comparison.setup
    missing = [f"`{arm}`" for arm in comparison.arms if all(row["arm"] != arm for row in rows)]
    rates = ", ".join(f"{rate:g}" for rate in sorted({row["lr"] for row in rows}))
    return "\n".join(
        [
            f"A first look at quality: a GPT of {setup.num_blocks} blocks and width {setup.embed} on the standard "
            "library's sources,",
            f"{setup.num_steps:,} steps of {setup.batch_size * setup.block_size:,} tokens, one learning rate "
            f"({rates}), tuned for nobody.",
            "Every run has its own completed decay. Nats a token, lower is better; mean ± standard deviation. These "
            "runs are",
            "far from converged, where cheap steps count for more than they would later: no verdict.",
            *([f"Not run yet: {', '.join(missing)}."] if missing else []),
            "",
            *lines,
            "",
            source(*(row["provenance"] for row in rows)),
        ]
    )


def transition_table() -> str:
    """Return what a transition costs."""
    record = json.loads((RESULTS / "transition.json").read_text())
    lines = [
        "| optimizer state | down | up | peak extra memory |",
        "| --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        extra = max(row["extra_bytes_down"], row["extra_bytes_up"]) / row["weights_and_moments_bytes"]
        lines.append(
            f"| {row['optimizer_state']} | {row['down_in_steps']:.2f} steps | {row['up_in_steps']:.2f} steps | "
            f"{extra:.2f} of weights and moments |"
        )
    first = record["rows"][0]
    return "\n".join(
        [
            f"What a transition costs a GPT of {first['num_parameters'] / 1e6:.1f}M parameters, in optimizer steps",
            f"of the full model ({first['tokens_per_step']:,} tokens each):",
            "",
            *lines,
            "",
            source(record),
        ]
    )


def plan_table() -> str:
    """Return how well runs were predicted."""
    record = json.loads(measure_plan.RESULTS.read_text())
    lines = [
        "| recipe | FLOPs of dense | planned FLOPs | predicted seconds | seconds | off by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for recipe, run in record["runs"].items():
        planned, trained = sum(run["planned"]["seconds"]), sum(run["trained"]["seconds"])
        is_exact = run["planned"]["flops"] == run["trained"]["flops"]
        lines.append(
            f"| {recipe} | {measure_plan.trained_share(run):.1%} | "
            f"{'exact' if is_exact else f'{measure_plan.flops_off(run):+.2%}'} | {planned:.1f} | {trained:.1f} | "
            f"{planned / trained - 1:+.1%} |"
        )
    steps = {run["steps"] for run in record["runs"].values()}
    return "\n".join(
        [
            f"Small recipes of {', '.join(map(str, sorted(steps)))} optimizer steps, planned with",
            "`--calibrate true` and then trained, without validation and checkpoints:",
            "",
            *lines,
            "",
            source(record["provenance"]),
        ]
    )


def filled(path: Path, blocks: dict[str, str]) -> str:
    """Return a file's text with the blocks between its markers replaced."""
    text = path.read_text()
    for name, content in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{path.name} has no block {name!r}.")
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only see whether the tables are up to date")
    check = parser.parse_args().check
    presets = "\n\n".join(presets_table(setup) for setup in SETUPS)
    targets = {
        ROOT / "README.md": {"results:versions": versions.table(json.loads(versions.RESULTS.read_text()))},
        ROOT / "lit_accel/methods/multilevel/README.md": {
            "results:presets": presets,
            "results:choices": choices_table(),
            "results:vision": vision_table(),
            "results:share": "\n\n".join([share_table(), transition_table()]),
        },
        ROOT / "lit_accel/methods/layer_dropping/README.md": {
            "results:dropping": "\n\n".join(
                [
                    quality_table(layer_dropping.COMPARISON, layer_dropping.DENSE),
                    dropping_seconds_table(),
                ]
            )
        },
        ROOT / "lit_accel/methods/token_dropping/README.md": {
            "results:tokens": "\n\n".join(
                [
                    quality_table(token_dropping.COMPARISON, token_dropping.DENSE),
                    token_seconds_table(),
                ]
            )
        },
        ROOT / "lit_accel/methods/mixed_sparsity/README.md": {
            "results:sparsity": "\n\n".join(
                [
                    quality_table(mixed_sparsity.COMPARISON, mixed_sparsity.DENSE),
                    sparsity_seconds_tables(),
                ]
            )
        },
        ROOT / "docs/composition.md": {
            "facts": composition_tables.facts_table(),
            "pairs": composition_tables.pairs_table(),
        },
        ROOT / "docs/results/README.md": {"results:models": measure_models.table(measure_models.read_rows())},
        ROOT / "docs/plan_and_report.md": {"results:plan": plan_table()},
        ROOT / "docs/robustness.md": {
            "results:soak": "\n\n".join([soak.kills_table(), soak.memory_table()]),
            "results:parity": soak.parity_table(),
        },
    }
    study = bench.blocks()
    for path in targets.keys() | study.keys():
        text = filled(path, targets.get(path, {}) | study.get(path, {}))
        if not check:
            path.write_text(text)
        elif text != path.read_text():
            sys.exit(f"{path.relative_to(ROOT)} is not what the result files give. Run: make bench-report")
    if not check:
        bench.draw()
        draw_models.draw(measure_models.read_rows(), draw_models.PICTURE)


if __name__ == "__main__":
    main()
