"""Write the measured tables of the README and of the method's card from the result files, so that no number is typed.

With ``--check`` nothing is written; it fails if a table is not the one that the files give.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from scripts.compare_presets import VARIANTS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"


def machine(record: dict[str, Any]) -> str:
    """Return where and when a result was measured, in words."""
    versions, where = record["versions"], record["machine"]
    device = where["gpu"] or f"{where['threads']} threads of an {where['processor']}"
    return f"{device}, torch {versions['torch']}, lightning {versions['lightning']}, {record['date']}"


def presets_table() -> str:
    """Return the comparison of presets, mean and spread over seeds at each learning rate."""
    rows = [json.loads(line) for line in (RESULTS / "presets.jsonl").read_text().splitlines()]
    rates = sorted({row["lr"] for row in rows})
    variants = [variant for variant in VARIANTS if any(row["variant"] == variant for row in rows)]
    dense_flops = max(row["flops"] for row in rows if row["variant"] == "dense 100 %")

    def cell(variant: str, rate: float) -> str:
        losses = [row["val_loss"] for row in rows if row["variant"] == variant and row["lr"] == rate]
        if not losses:
            return ""
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        return f"{statistics.mean(losses):.3f}{spread}"

    lines = [
        "| variant | FLOPs | " + " | ".join(f"loss, lr {rate:g}" for rate in rates) + " |",
        "| --- | --- | " + " | ".join("---" for _ in rates) + " |",
    ]
    for variant in variants:
        flops = statistics.mean(row["flops"] for row in rows if row["variant"] == variant) / dense_flops
        lines.append(f"| {variant} | {flops:.0%} | " + " | ".join(cell(variant, rate) for rate in rates) + " |")
    return "\n".join(
        [
            "Held-out loss (nats a token) of a GPT of 4 blocks and width 128 on the standard library's sources,",
            "600 dense steps of 2,048 tokens. Every run has its own completed learning-rate decay; lower is better.",
            "Mean ± standard deviation over three seeds; without ±, one seed.",
            "",
            *lines,
            "",
            f"`python -m scripts.compare_presets`; {machine(rows[0]['provenance'])}.",
            "A small model and short runs: they rank the choices, and do not predict what a large run saves.",
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
            f"`python -m scripts.measure_transition`; {machine(record)}.",
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
    presets = presets_table()
    targets = {
        ROOT / "README.md": {"results": f"{presets}\n\n{transition_table()}"},
        ROOT / "lit_accel/methods/multilevel/README.md": {"results:presets": presets},
    }
    for path, blocks in targets.items():
        text = filled(path, blocks)
        if not check:
            path.write_text(text)
        elif text != path.read_text():
            sys.exit(f"{path.relative_to(ROOT)} is not what the result files give. Run: make bench-report")


if __name__ == "__main__":
    main()
