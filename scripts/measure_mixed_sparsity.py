"""How much of the counted saving of mixed sparsity arrives in seconds: a step, a whole run, and attention by itself.

*Steps*: a GPT of 6 blocks, width 512, 8 heads and 8192 tokens of vocabulary, 512 tokens a sequence, in bfloat16
autocast. The arms take turns, a few optimizer steps each, within one process: dense; a fifth of the neurons and 2 of 8
heads, compact; the same with window attention; and, as controls, the same units masked, a tenth of the entries masked,
and an eighth of the tiles of 64 x 64. The realised share of an arm is ``log(time ratio) / log(FLOPs ratio)``.

*Runs*: the same model under a Trainer, dense and with ``MixedSparsityTraining()`` as it comes, whole runs in turns.

*Attention*: 12 heads of 64 features, 2 sequences, window 128, forward and backward, against the fused causal kernel.

Written to ``scripts/results/mixed_sparsity.json``. On a GPU also the steps of GPT-2 small at 1024 tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from lit_accel import ComputeLedger, MixedSparsityTraining
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import read_ledger, training_flops
from lit_accel.draws import generator
from lit_accel.methods.mixed_sparsity import (
    AttentionPattern,
    SparseModel,
    SparsitySchedule,
    Targets,
    UnitSpace,
    spaces_of,
    updated,
)
from lit_accel.methods.mixed_sparsity.attention import PATTERNS
from lit_accel.tasks.cross_entropy import cross_entropy_sum
from scripts.provenance import provenance
from scripts.timed_gpt import KEEP_MEMORY, NO_DROPOUT, TimedGPT, run_apart, train

RESULTS = Path(__file__).parent / "results" / "mixed_sparsity.json"
WINDOW = 128
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
SMALL = {"n_layer": 6, "n_embd": 512, "n_head": 8, "n_positions": 512, "vocab_size": 8192, **NO_TOKENS, **NO_DROPOUT}
NUM_TOKENS = 512
# Each arm follows each other one once: what a turn leaves in the caches and the allocator cancels.
_ORDER = (0, 1, 2, 3, 4, 5, 0, 2, 1, 3, 5, 4, 0, 3, 1, 5, 2, 4, 1, 0, 4, 3, 2, 5, 1, 4, 2, 0, 5, 3)


@dataclass(frozen=True)
class Arm:
    """A way to make a step cheaper, or to pretend to.

    Args:
        units: Of feed-forward networks, of attention and of the head.
        sparsity: Share of the units that are off.
        is_compact: Whether units are taken out of the model.
        has_window: Whether attention follows a window.
    """

    units: tuple[str, str, str] = ("dense", "dense", "dense")
    sparsity: float = 0.0
    is_compact: bool = True
    has_window: bool = False


ARMS = {
    "dense": Arm(),
    "neurons and heads": Arm(("neuron", "head", "dense"), 0.8),
    "neurons and heads, window attention": Arm(("neuron", "head", "dense"), 0.8, has_window=True),
    "the same neurons and heads, masked": Arm(("neuron", "head", "dense"), 0.8, is_compact=False),
    "entries, masked": Arm(("element", "element", "dense"), 0.9),
    "tiles of 64": Arm(("block", "block", "dense"), 0.875),
}


def measure_steps(name: str, batch_size: int, rounds: int, length: int) -> list[dict[str, Any]]:
    """Time the steps of all arms.

    Args:
        name: ``"cpu"`` or ``"gpu"``.
        batch_size: Sequences of a step.
        rounds: How often the order of turns is run through.
        length: Optimizer steps of a turn, the first of which is not counted.
    """
    device = torch.device("cpu" if name == "cpu" else "cuda")
    config = transformers.GPT2Config(**(SMALL if name == "cpu" else {**NO_TOKENS, **NO_DROPOUT}))
    num_tokens = config.n_positions
    model = transformers.GPT2LMHeadModel(config).train().to(device)
    anatomy = anatomy_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (batch_size, num_tokens), device=device)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy_sum(logits.flatten(0, 1), labels, -100) / (labels >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    switching: list[float] = []
    flops: dict[str, int] = {}
    step()
    for turn in range(rounds * len(_ORDER)):
        name_of_arm = list(ARMS)[_ORDER[turn % len(_ORDER)]]
        arm = ARMS[name_of_arm]
        targets = targets_of(anatomy, arm)
        started = time.perf_counter()
        sparse = SparseModel(model, anatomy, targets.spaces, "compact" if arm.is_compact else "masked")
        sparse.optimizers = [optimizer]
        sparse.set_masks(topology(sparse, targets, turn))
        sparse.compact()
        if name_of_arm == "neurons and heads":
            switching.append(time.perf_counter() - started)
        assert anatomy.attend is not None
        undo = anatomy.attend(model, AttentionPattern("window", WINDOW)) if arm.has_window else lambda: None
        # Masks of entries are laid on gradients and weights, as the callback does.
        seconds[name_of_arm] += [step_with(sparse, step) for _ in range(length)][1:]
        undo()
        sparse.expand()
        flops[name_of_arm] = training_flops(
            anatomy, batch_size, num_tokens, active=targets.active(1, targets.counts(1))
        ).total
    median = {arm: statistics.median(values) for arm, values in seconds.items()}
    return [
        {
            "arm": arm,
            "blocks": config.n_layer,
            "width": config.n_embd,
            "num_tokens": num_tokens,
            "batch_size": batch_size,
            "vocab": config.vocab_size,
            "num_timed": len(seconds[arm]),
            "dense_step_seconds": median["dense"],
            "step_seconds": median[arm],
            "flops_ratio": flops[arm] / flops["dense"],
            "time_ratio": median[arm] / median["dense"],
            "realised_share": math.log(median[arm] / median["dense"]) / math.log(flops[arm] / flops["dense"]),
            "switch_in_dense_steps": statistics.median(switching) / median["dense"],
        }
        for arm in ARMS
        if arm != "dense"
    ]


def targets_of(anatomy: Any, arm: Arm) -> Targets:
    """Return the numbers of units of an arm; step 1 is in its sparse stage."""
    return Targets(
        anatomy=anatomy,
        spaces=spaces_of(anatomy, *arm.units),
        schedule=SparsitySchedule((0, 1), (0.0, arm.sparsity), 2),
        pattern=AttentionPattern("window", WINDOW) if arm.has_window else None,
        pattern_steps=(0, 2),
    )


def topology(sparse: SparseModel, targets: Targets, turn: int) -> dict[str, torch.Tensor]:
    """Choose the units of an arm by magnitude, as a run does when it becomes sparse."""
    spaces: dict[str, UnitSpace] = sparse.spaces
    changes = targets.changes(1, {name: space.num_units for name, space in spaces.items()})
    magnitudes, draws = sparse.magnitudes(), generator(turn)
    return {name: updated(sparse.masks[name], changes[name], magnitudes[name], None, 0.0, draws) for name in spaces}


def step_with(sparse: SparseModel, step: Callable[[], float]) -> float:
    """Time a step, with what has to be done for entries that are off."""
    optimizer = sparse.optimizers[0]
    hook = optimizer.register_step_pre_hook(lambda *_: sparse.mask_gradients())
    post = optimizer.register_step_post_hook(lambda *_: sparse.hold_off())
    taken = step()
    hook.remove()
    post.remove()
    return taken


def measure_run(is_sparse: bool, num_steps: int, batch_size: int) -> dict[str, float]:
    """Train a whole run under a Trainer; return its seconds and FLOPs."""
    torch.manual_seed(0)
    module = TimedGPT(transformers.GPT2Config(**SMALL), compiled=False)
    with tempfile.TemporaryDirectory() as folder:
        ledger = ComputeLedger(monitor=[], folder=folder, print_table=False)
        methods = [MixedSparsityTraining()] if is_sparse else []
        train(module, [*methods, ledger], num_steps, batch_size, NUM_TOKENS, "cpu")
        table = read_ledger(folder)
    return {"seconds": table.seconds[-1], "flops": table.flops[-1]}


def measure_runs(num_steps: int, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Train dense and sparse runs in turns."""
    runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for round_ in range(rounds):
        for is_sparse in (False, True) if round_ % 2 == 0 else (True, False):
            runs[is_sparse].append(measure_run(is_sparse, num_steps, batch_size))
    dense, sparse = (statistics.median(run["seconds"] for run in runs[key]) for key in (False, True))
    flops_ratio = runs[True][0]["flops"] / runs[False][0]["flops"]
    return [
        {
            "num_steps": num_steps,
            "batch_size": batch_size,
            "num_runs": rounds,
            "dense_seconds": dense,
            "seconds": sparse,
            "flops_ratio": flops_ratio,
            "time_ratio": sparse / dense,
            "realised_share": math.log(sparse / dense) / math.log(flops_ratio),
        }
    ]


def measure_attention(num_repeats: int) -> list[dict[str, Any]]:
    """Time the patterns against dense causal attention, in turns."""
    rows = []
    for num_tokens in (256, 512, 1024, 2048):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [torch.randn(2, 12, num_tokens, 64, dtype=dtype, requires_grad=True) for _ in range(3)]
            gradient = torch.randn(2, 12, num_tokens, 64, dtype=dtype)
            kernels: dict[str, Any] = {kind: AttentionPattern(kind, WINDOW) for kind in PATTERNS}
            kernels["dense"] = lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kernels}
            for repeat in range(num_repeats + 1):
                for name, kernel in kernels.items():
                    started = time.perf_counter()
                    out = kernel(*inputs, None)
                    middle = time.perf_counter()
                    torch.autograd.grad(out, inputs, gradient)
                    if repeat:
                        seconds[name].append((middle - started, time.perf_counter() - started))
            forward, both = (
                {name: statistics.median(pair[part] for pair in pairs) for name, pairs in seconds.items()}
                for part in (0, 1)
            )
            rows += [
                {
                    "pattern": kind,
                    "num_tokens": num_tokens,
                    "dtype": str(dtype).removeprefix("torch."),
                    "pairs": AttentionPattern(kind, WINDOW).pairs(num_tokens),
                    "causal_pairs": num_tokens * (num_tokens + 1) // 2,
                    "dense_seconds": both["dense"],
                    "forward_speed": forward["dense"] / forward[kind],
                    "speed": both["dense"] / both[kind],
                }
                for kind in PATTERNS
            ]
    return rows


def print_steps(rows: list[dict[str, Any]]) -> None:
    """Print a row a measurement."""
    table = Table(title="A step, or a whole run, in parts of a dense one")
    for column in ("what", "tokens a step", "glibc keeps memory", "FLOPs", "seconds", "times faster", "realised share"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        table.add_row(
            row.get("arm", f"default run, {row.get('num_steps')} steps"),
            str(row["batch_size"] * row.get("num_tokens", NUM_TOKENS)),
            "yes" if row["keeps_memory"] else "no",
            f"{row['flops_ratio']:.3f}",
            f"{row['time_ratio']:.3f}",
            f"{1 / row['time_ratio']:.2f}",
            f"{row['realised_share']:.2f}",
        )
    Console(width=130).print(table)


def print_attention(rows: list[dict[str, Any]]) -> None:
    """Print how many times faster each pattern is."""
    table = Table(title="Attention by patterns, times faster than dense causal attention, forward and backward")
    for column in ("tokens", "type", *PATTERNS):
        table.add_column(column, justify="right")
    for num_tokens, dtype in dict.fromkeys((row["num_tokens"], row["dtype"]) for row in rows):
        speeds = {r["pattern"]: r["speed"] for r in rows if (r["num_tokens"], r["dtype"]) == (num_tokens, dtype)}
        table.add_row(str(num_tokens), dtype, *(f"{speeds[kind]:.2f}" for kind in PATTERNS))
    Console(width=100).print(table)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--run-steps", type=int, default=200)
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "BATCH"), help="measure one thing here, and print its rows")
    arguments = parser.parse_args()
    if arguments.only:
        transformers.logging.set_verbosity_error()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        what, batch_size = arguments.only[0], int(arguments.only[1])
        if what == "attention":
            rows = measure_attention(num_repeats=9)
        elif what == "run":
            rows = measure_runs(arguments.run_steps, batch_size, rounds=2)
        else:
            rows = measure_steps(what, batch_size, arguments.rounds, arguments.length)
        print(json.dumps(rows))
        return
    options = ["--rounds", str(arguments.rounds), "--length", str(arguments.length)]
    options += ["--run-steps", str(arguments.run_steps)]
    settings = [("cpu", 2, False), ("cpu", 8, False), ("cpu", 2, True), ("cpu", 8, True)]
    settings += [("gpu", 16, False)] if torch.cuda.is_available() else []

    def measured(what: str, batch_size: int, keeps_memory: bool) -> list[dict[str, Any]]:
        only = ["--only", what, str(batch_size), *options]
        rows = run_apart("scripts.measure_mixed_sparsity", only, keeps_memory)
        return [{"keeps_memory": keeps_memory, **row} for row in rows]

    steps: list[dict[str, Any]] = []
    for what, batch_size, keeps_memory in settings:
        steps += measured(what, batch_size, keeps_memory)
        print_steps(steps)
    runs = [row for keeps_memory in (False, True) for row in measured("run", 2, keeps_memory)]
    print_steps(runs)
    attention = measured("attention", 2, False)
    print_attention(attention)
    record = {"steps": steps, "runs": runs, "attention": attention, "keep_memory": KEEP_MEMORY}
    RESULTS.write_text(json.dumps({**record, "provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
