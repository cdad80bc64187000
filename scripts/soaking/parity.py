"""Two ranks train as one process on the same global batches, but for rounding; a repetition, to the bit.

Writes ``scripts/results/soak_parity.json``: for each method the largest difference of a final weight.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_accel import RandomLTD
from lit_accel.data import TextDataModule
from lit_accel.data.sampling import ShuffledSampler
from lit_accel.methods.compatibility import RANDOM_LTD, TITLES
from scripts.soaking.cases import GLOBAL_BATCH, STEPS, Case, cases, methods_of, strategy_of
from scripts.soaking.processes import CONTEXT, start_ranks
from scripts.soaking.recording import origin
from scripts.soaking.training import TEXT, module_of, speak_to

RESULT = Path(__file__).parents[1] / "results" / "soak_parity.json"
TOLERANCE = 1e-5
"""Largest difference of a weight: the learning rate is 3e-3, so that a wrong step would be far above it."""
_MICRO = 2
# Where a gradient is zero but for rounding, as of the biases of keys, Adam would make a whole step of the rounding.
_OPTIMIZER = partial(torch.optim.AdamW, lr=3e-3, eps=1e-3)


class ByRank(ShuffledSampler):
    """On one process: a global batch as the micro-batches that two ranks would have."""

    def __iter__(self) -> Iterator[int]:
        keys = list(super().__iter__())
        for start in range(0, len(keys), GLOBAL_BATCH):
            for rank in range(_MICRO):
                yield from keys[start : start + GLOBAL_BATCH][rank::_MICRO]


class DataInOne(TextDataModule):
    """The data of two ranks on one process."""

    def _training_sampler(self, dataset: Any, **position: Any) -> ByRank:
        return ByRank(dataset, GLOBAL_BATCH, **position)


class TokensInOne(RandomLTD):
    """Draws for each of two micro-batches what a rank draws for its own."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw the tokens of a new batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self._dropper is not None
        self._position = trainer.global_step, (trainer.current_epoch, batch_idx // _MICRO, batch_idx % _MICRO)
        self._dropper.set(*self._position)


def train(case: Case, path: Path, cache: Path) -> None:
    """Train a case and write its final weights."""
    speak_to(path.with_suffix(f".{os.environ.get('RANK', 0)}.txt"))
    L.seed_everything(3, verbose=False)
    # Each rank draws tokens of its own: one process can do that with a micro-batch for each rank alone.
    in_parts = case.how == "single" and RANDOM_LTD in case.titles
    kind = DataInOne if in_parts else TextDataModule
    batch_size = GLOBAL_BATCH // _MICRO if in_parts else case.batch_size
    data = kind(batch_size=batch_size, seed=1, cache_dir=cache, **TEXT)
    module: Any = module_of(case, data)
    module._optimizer = _OPTIMIZER
    start = {name: value.clone() for name, value in module.state_dict().items()}
    methods = methods_of(case)
    if in_parts:
        (tokens,) = methods
        assert isinstance(tokens, RandomLTD)
        methods = [TokensInOne(start_tokens=tokens.start_tokens, growth=tokens.growth, quantum=tokens.quantum)]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=case.ranks,
        strategy=strategy_of(case),
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=_MICRO if in_parts else 1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=methods,
        logger=False,
        default_root_dir=path.parent,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    weights = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in module.state_dict().items()
    }
    if trainer.is_global_zero:
        torch.save({"weights": weights, "start": start}, path)


def measure(console: Console) -> int:
    """Train each method on one rank and on two, twice; write and print how far they are apart.

    Args:
        console: Where to print.

    Returns:
        0 if two ranks train as one and repetitions are equal, 1 if not.
    """
    CONTEXT.set_forkserver_preload([__name__])
    source, rows = origin(), []
    headings = ("method", "strategy", "largest difference from one rank", "repetition", "weights have moved by")
    table = Table(*headings, title="Two ranks, and one")
    with tempfile.TemporaryDirectory() as folder:
        every = {(case.titles, case.how): case for case in cases() if case.family == "gpt2"}
        for title in TITLES:
            one, start = _weights(every[(title,), "single"], Path(folder), 0)
            # What a difference is to be compared with.
            moved = largest_difference(one, start)
            for how in ("single", "ddp", "fsdp"):
                case = every.get(((title,), how))
                if case is None:
                    continue
                mine, again = (_weights(case, Path(folder), repetition)[0] for repetition in (1, 2))
                far, apart = largest_difference(mine, one), largest_difference(again, mine)
                differences = {"difference": far, "repetition_difference": apart, "moved": moved}
                rows.append({"method": title, "strategy": how, **differences})
                repetition = "bitwise equal" if apart == 0 else f"{apart:.1e}"
                table.add_row(title, how, f"{far:.1e}", repetition, f"{moved:.2g}")
    console.print(table)
    settings = {"steps": STEPS, "global_batch": GLOBAL_BATCH, "tolerance": TOLERANCE}
    RESULT.write_text(json.dumps({**source, **settings, "runs": rows}, indent=1) + "\n")
    return int(any(row["difference"] > TOLERANCE or row["repetition_difference"] for row in rows))


def largest_difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return how far two sets of weights are apart."""
    assert mine.keys() == theirs.keys()
    return max((mine[name].double() - value.double()).abs().max().item() for name, value in theirs.items())


def _weights(case: Case, folder: Path, repetition: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train a case; return its final weights and its first ones."""
    path = folder / f"{case.name}-{repetition}.pt"
    ranks = start_ranks(train, (case, path, folder / "cache"), case.ranks)
    for rank in ranks:
        rank.join()
    if codes := [rank.exitcode for rank in ranks if rank.exitcode]:
        raise RuntimeError(f"{case.name} ended with {codes}")
    saved = torch.load(path)
    return saved["weights"], saved["start"]
