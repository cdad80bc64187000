"""What the soak has found, as tables for the documentation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lit_accel.methods.compatibility import TITLES
from scripts.soaking import memory, parity
from scripts.soaking.cases import cases
from scripts.soaking.recording import Record, is_bad, read

_MOMENTS = {
    "time": "from outside, after a random time",
    "step": "before a step, after any transition",
    "backward": "between backward pass and optimizer step",
    "validation": "within an evaluation",
    "write": "within the write of a checkpoint",
    "resize": "within a change of size",
    "update": "within an update of the units",
    "rank": "one of two ranks alone, at any of these",
}


def kills_table() -> str:
    """Return what came of the kills, by the moment of death and by method."""
    records = read()
    lines = [
        "| killed | kills | resumed bitwise equal | checkpoints lost | hung |",
        "| --- | --- | --- | --- | --- |",
        *(_row(words, [each for each in records if each["kind"] == kind]) for kind, words in _MOMENTS.items()),
        _row("**all**", records),
        "",
        "| method, alone or in a pair | kills | resumed bitwise equal | checkpoints lost | hung |",
        "| --- | --- | --- | --- | --- |",
        *(_row(title, [each for each in records if title in each["methods"]]) for title in TITLES),
    ]
    num_runs = len({record["attempt"] for record in records})
    names = {case.name for case in cases()}
    ran = {record["case"] for record in records}
    unlogged = sum(bool(record["unlogged_rows"]) for record in records)
    alone = [record["seconds_alone"] for record in records if record["seconds_alone"] is not None]
    commits = sorted({record["commit"] for record in records})
    versions = records[-1]["versions"]
    return "\n".join(
        [
            f"{len(records)} kills in {num_runs} runs of {len(ran & names)} cases, drawn from {len(names)}: every",
            "method and every pair that is not refused, on GPT-2, BERT and DeiT, on one process and on two (DDP; FSDP2",
            "where the methods can). Compared with the uninterrupted run: weights, optimizer, state of methods, ledger",
            "and its table, position in the data, and every row of the logs.",
            "",
            *lines,
            "",
            f"{unlogged} of them fell between the write of a checkpoint and the last lines that Lightning logs of that",
            "step, which are missing then (see below): no other line is.",
            f"A rank whose partner was killed ended with an error after {max(alone):.1f} s at most",
            f"({len(alone)} times).",
            "`make soak` appends to the file; `python -m scripts.soak --summary` has more. Commit",
            f"{', '.join(commits)}, torch {versions['torch']}, lightning {versions['lightning']}.",
        ]
    )


def _row(words: str, records: Sequence[Record]) -> str:
    equal = sum(not is_bad(record) for record in records)
    lost, hung = (sum(bool(record[key]) for record in records) for key in ("lost", "hung"))
    return f"| {words} | {len(records)} | {equal} | {lost} | {hung} |"


def memory_table() -> str:
    """Return how resident memory has grown."""
    record: dict[str, Any] = json.loads(memory.RESULT.read_text())[-1]
    kinds = {"levels": "changes of level", "units": "updates of units"}
    grown = " and ".join(f"{arm['growth']:.2%} with {kinds[name]}" for name, arm in record["arms"].items())
    return (
        f"{record['steps']:,} steps with a switch every {record['switch_every']}: after {record['warm_up_cycles']} "
        f"cycles resident memory has grown by {grown} at most\n(`python -m scripts.soak --memory`)."
    )


def parity_table() -> str:
    """Return how far two ranks are from one."""
    record = json.loads(parity.RESULT.read_text())
    lines = [
        "| method | two ranks | largest difference of a weight from one rank | weights have moved by | repetition |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in record["runs"]:
        if row["strategy"] == "single":
            continue
        repetition = "bitwise equal" if row["repetition_difference"] == 0 else f"{row['repetition_difference']:.1e}"
        strategy = {"ddp": "DDP", "fsdp": "FSDP2"}[row["strategy"]]
        lines.append(f"| {row['method']} | {strategy} | {row['difference']:.1e} | {row['moved']:.2g} | {repetition} |")
    return "\n".join(
        [
            f"A GPT-2 on the same global batches, {record['steps']} steps in fp32, AdamW:",
            "",
            *lines,
            "",
            "`python -m scripts.soak --parity`. Random-LTD draws other tokens for each rank: its one-process run has a",
            "micro-batch for each, with its draws.",
        ]
    )
