"""Measure what a transition costs: seconds against optimizer steps of the full model, and peak extra memory.

Writes ``scripts/results/transition.json`` with the command, the versions and the machine in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as L
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from lit_accel import MultiLevelTraining, Phase
from lit_accel.anatomy import anatomy_of
from lit_accel.methods.multilevel.moments import OptimizerStatePolicy
from scripts.provenance import provenance

RESULT = Path(__file__).parent / "results" / "transition.json"


class RandomTokens(L.LightningModule):
    """A GPT-2 of ten million parameters on random tokens: only its cost matters here."""

    def __init__(self, batch_size: int, length: int) -> None:
        super().__init__()
        config = GPT2Config(n_embd=320, n_head=10, n_layer=8, vocab_size=512, n_positions=length)
        for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            setattr(config, dropout, 0.0)
        self.model = GPT2LMHeadModel(config)
        self.data = torch.randint(512, (64, batch_size, length))

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.data, batch_size=None)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of live tensor storages, operation by operation.

    Resident memory would say little: allocators keep what activations have left behind.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in tensors:
            self._add(tensor)
        self.before = self.peak = self.now()

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self._live[reference.cdata] = (reference, storage.nbytes())

    def now(self) -> int:
        """Return the bytes of all storages that are still alive."""
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(size for _, size in self._live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self._add(value)
        self.peak = max(self.peak, self.now())
        return result


class Watch(L.Callback):
    """Times full-size optimizer steps, and watches memory while the method resizes, if asked to (that is slow)."""

    def __init__(self, method: MultiLevelTraining, depth: int, *, watches_memory: bool) -> None:
        self.method, self.depth, self.watches_memory = method, depth, watches_memory
        self.step_seconds: list[float] = []
        self.extra_bytes: list[int] = []
        self._started = 0.0

    def watch_resizes(self, strategy: Any) -> None:
        resize = strategy.resize

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.watches_memory:
                return resize(*args, **kwargs)
            with LiveBytes(self._present_tensors(strategy)) as memory:
                event = resize(*args, **kwargs)
            # What is there before and what is there after are both needed; more than the larger one is extra.
            self.extra_bytes.append(memory.peak - max(memory.before, memory.now()))
            return event

        strategy.resize = watched

    def _present_tensors(self, strategy: Any) -> Iterable[torch.Tensor]:
        yield from strategy.lightning_module.parameters()
        yield from (p.grad for p in strategy.lightning_module.parameters() if p.grad is not None)
        for optimizer in strategy.optimizers:
            yield from (v for entry in optimizer.state.values() for v in entry.values() if torch.is_tensor(v))
        for state in self.method.state_dict()["stored"].values():
            yield from state.values()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch_resizes(trainer.strategy)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.model.config.n_layer == self.depth:
            self.step_seconds.append(time.perf_counter() - self._started)


def run_cycle(optimizer_state: str, batch_size: int, length: int, *, watches_memory: bool) -> tuple[Any, Watch]:
    """Run a short V-cycle; return its trainer and what was watched."""
    L.seed_everything(0, verbose=False)
    module = RandomTokens(batch_size, length)
    method = MultiLevelTraining(phases=[Phase(0, 3), Phase(1, 2), Phase(0)], optimizer_state=optimizer_state, alpha=0.5)
    watch = Watch(method, module.model.config.n_layer, watches_memory=watches_memory)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy="resizable",
        max_steps=8,
        # The watch comes second, so that a step's time holds no transition.
        callbacks=[method, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return trainer, watch


def measure(policies: Sequence[str], rounds: int, batch_size: int = 8, length: int = 128) -> list[dict[str, Any]]:
    """Return what the transitions of a ten-million-parameter GPT cost, in seconds and bytes, a row a policy.

    The policies take turns, and a first round warms the process up: whichever resizes first would pay for that.

    Args:
        policies: What becomes of the optimizer's state.
        rounds: How often each is timed; the median counts.
        batch_size: Sequences a step.
        length: Tokens a sequence.
    """
    watches: dict[str, list[Watch]] = {policy: [] for policy in policies}
    resizes: dict[str, list[Any]] = {policy: [] for policy in policies}
    for number in range(rounds + 1):
        for policy in policies:
            trainer, watch = run_cycle(policy, batch_size, length, watches_memory=False)
            if number:
                watches[policy].append(watch)
                resizes[policy].append(trainer.strategy.resizes)
    num_parameters = anatomy_of(trainer.lightning_module.model).num_parameters
    # One step of all: that of the full model is the same whatever becomes of the state.
    step = statistics.median(second for found in watches.values() for watch in found for second in watch.step_seconds)
    rows = []
    for policy in policies:
        # Between two steps no activation is alive: for memory the shortest steps will do.
        _, memory = run_cycle(policy, 1, length, watches_memory=True)
        down, up = (statistics.median(found[i].seconds for found in resizes[policy]) for i in (0, 1))
        rows.append(
            {
                "optimizer_state": policy,
                "num_parameters": num_parameters,
                "tokens_per_step": batch_size * length,
                "rounds": rounds,
                "full_step_seconds": step,
                "down_seconds": [found[0].seconds for found in resizes[policy]],
                "up_seconds": [found[1].seconds for found in resizes[policy]],
                "down_in_steps": down / step,
                "up_in_steps": up / step,
                "weights_and_moments_bytes": 3 * 4 * num_parameters,
                "extra_bytes_down": memory.extra_bytes[0],
                "extra_bytes_up": memory.extra_bytes[1],
            }
        )
    return rows


def main() -> None:
    """Measure all policies and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=7, help="how often each policy is timed")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = measure(get_args(OptimizerStatePolicy), arguments.rounds, arguments.batch_size, arguments.length)
    for row in rows:
        share = max(row["extra_bytes_down"], row["extra_bytes_up"]) / row["weights_and_moments_bytes"]
        print(
            f"{row['optimizer_state']:14} down {row['down_in_steps']:.2f} steps, up {row['up_in_steps']:.2f} steps, "
            f"peak extra memory {share:.2f} of weights and moments"
        )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({**provenance(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
