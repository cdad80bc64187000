"""Layer dropping on one process and on two, with copies of the model and with shards: what one process does."""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.data import DataLoader

from lit_accel import Level, MultiLevelTraining, Phase, ProgressiveLayerDropping, SensitivityLayerDropping
from lit_accel.anatomy import anatomy_of, compile_blocks
from lit_accel.compute import forward_flops, training_flops
from lit_accel.methods.layer_dropping import BlockDropper
from lit_accel.methods.layer_dropping.sensitivity import ablation_flops
from lit_accel.routing import routing_of
from lit_accel.strategies import ResizableDDPStrategy, ResizableModelParallelStrategy
from tests.distributed.kill import Kill
from tests.distributed.sharded import Host, full_state
from tests.models import make_model
from tests.training import SIZE, make_trainer

STEPS = 20
NUM_BLOCKS = 6
# Of four blocks, when collectives are counted.
MASKS = ("1111", "1011", "0110")
# Tokens of a sequence, by rank.
LENGTHS = (12, 5)
# When sensitivities are measured first, and on how many batches.
MEASURED_AT, NUM_MEASURED = 5, 2
KEPT = 0.6
METHODS = {
    # Strong: from the second step on a third of the blocks does not run.
    "pld": lambda **options: ProgressiveLayerDropping(gamma=5.0, **{"check_ranks_every": 1, **options}),
    **{
        estimator: lambda estimator=estimator, **options: SensitivityLayerDropping(
            kept=KEPT,
            estimator=estimator,
            warmup=MEASURED_AT,
            ramp=0,
            release=0,
            protected=0.0,
            min_keep=0.1,
            measure_every=4,
            num_batches=NUM_MEASURED,
            **{"max_overhead": 1.0, "check_ranks_every": 1, **options},
        )
        for estimator in ("ablate", "taylor")
    },
}
STRATEGIES = {
    "single": lambda: "resizable",
    "ddp": lambda: "ddp_find_unused_parameters_true",
    "resizable_ddp": lambda: ResizableDDPStrategy(find_unused_parameters=True),
    "fsdp": lambda: ResizableModelParallelStrategy(save_distributed_checkpoint=False),
}


def cycle() -> MultiLevelTraining:
    """Half of the model in the middle of the run."""
    return MultiLevelTraining([Level()], [Phase(0, 4), Phase(1, 8), Phase(0)], alpha=0.5, optimizer_state="project")


class Deep(Host):
    """With more blocks to drop."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model("gpt2-tied", dtype=torch.float32, **{**SIZE, "blocks": NUM_BLOCKS}).train()


class Watch(L.Callback):
    """Looks at every step, and notes what was dropped. Stands right of the method.

    Args:
        method: The method.
        notes: Where rank 0 writes masks and probabilities, a line a step.
    """

    def __init__(self, method: Any, notes: Path) -> None:
        self.method, self.notes = method, notes

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        blocks = pl_module.net.transformer.h
        assert len(self.method.keep) == len(blocks)
        for keep, block in zip(self.method.keep, blocks, strict=True):
            assert all((parameter.grad is not None) is keep for parameter in block.parameters())
        if trainer.is_global_zero:
            with self.notes.open("a") as file:
                json.dump([trainer.global_step, self.method.keep, self.method.keep_probabilities], file)
                file.write("\n")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.world_size == 1:
            return
        sensitivities = getattr(self.method, "sensitivities", None) or []
        decided = [*self.method.keep, *self.method.keep_probabilities, *sensitivities]
        self.require_equal(trainer, torch.tensor(decided, dtype=torch.float64), "decisions")
        if not any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
            weights = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
            self.require_equal(trainer, weights, "weights")

    def require_equal(self, trainer: L.Trainer, mine: torch.Tensor, what: str) -> None:
        assert torch.equal(*trainer.strategy.all_gather(mine)), f"{what} differ after step {trainer.global_step}"


def trainer_for(folder: Path, strategy: Any, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    return make_trainer(
        folder,
        callbacks=callbacks,
        strategy=strategy,
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        use_distributed_sampler=False,
        limit_val_batches=0,
        **{"max_steps": STEPS, "max_epochs": -1, **options},
    )


def data() -> DataLoader:
    return DataLoader(range(100), batch_size=1)


def train(
    folder: Path,
    name: str,
    strategy: str,
    method: Any,
    *,
    kill_at: int | None = None,
    resume: bool = False,
    prepare: str | None = None,
    before: Sequence[L.Callback] = (),
    after: Sequence[L.Callback] = (),
) -> None:
    """Train, and write the final weights and what was measured to ``<name>.pt``."""
    L.seed_everything(3, verbose=False)
    module = Deep()
    if prepare == "checkpointing":
        module.net.gradient_checkpointing_enable()
    if prepare == "compile":
        compile_blocks(module.net, backend="eager")
    callbacks = [*before, method, *after, Watch(method, folder / f"{name}.jsonl")]
    if kill_at is not None:
        callbacks.append(Kill(kill_at))
    saves = kill_at is not None or resume
    if saves:
        callbacks.append(ModelCheckpoint(folder / name, save_last=True, every_n_train_steps=1, save_top_k=0))
    trainer = trainer_for(folder, STRATEGIES[strategy](), callbacks, enable_checkpointing=saves)
    trainer.fit(module, data(), ckpt_path=folder / name / "last.ckpt" if resume else None)
    weights = full_state(module)
    if trainer.is_global_zero:
        torch.save((weights, getattr(method, "sensitivities", None)), folder / f"{name}.pt")


def on_one_process(folder: Path) -> None:
    for name, make in METHODS.items():
        train(folder, f"{name}-single", "single", make())
    train(folder, "cycle-single", "single", METHODS["pld"](), before=[cycle()])
    count_collectives(folder, "single")


def on_two_processes(folder: Path) -> None:
    refused_or_not(folder)
    for name, make in METHODS.items():
        train(folder, f"{name}-ddp", "ddp", make())
        train(folder, f"{name}-fsdp", "fsdp", make())
    train(folder, "pld-ddp-again", "resizable_ddp", METHODS["pld"]())
    train(folder, "pld-fsdp-again", "fsdp", METHODS["pld"]())
    for prepare in ("checkpointing", "compile"):
        train(folder, f"pld-fsdp-{prepare}", "fsdp", METHODS["pld"](), prepare=prepare)
    train(folder, "cycle-ddp", "resizable_ddp", METHODS["pld"](), before=[cycle()])
    train(folder, "cycle-fsdp", "fsdp", METHODS["pld"](), after=[cycle()])
    count_collectives(folder, "fsdp")


# What DDP must be told


def refused_or_not(folder: Path) -> None:
    for strategy, message in (
        (lambda: "ddp", r'strategy="ddp_find_unused_parameters_true"'),
        (ResizableDDPStrategy, r"strategy=ResizableDDPStrategy\(find_unused_parameters=True\)"),
        (lambda: ResizableDDPStrategy(static_graph=True, find_unused_parameters=True), "Leave static_graph out"),
    ):
        for make in METHODS.values():
            module = Deep()
            with pytest.raises(MisconfigurationException, match=message):
                trainer_for(folder, strategy(), [make()]).fit(module, data())
            assert not module.losses
    for neutral in (ProgressiveLayerDropping(theta=1.0), SensitivityLayerDropping(kept=1.0)):
        module = Deep()
        trainer_for(folder, "ddp", [neutral], max_steps=2).fit(module, data())
        assert len(module.losses) == 2


# What is communicated


class Bare(Host):
    """Nothing but a transformer of four blocks."""

    def __init__(self) -> None:
        super().__init__()
        del self.head, self.frozen

    def loss(self, ids):
        logits = self.net(input_ids=ids).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Collectives(L.Callback):
    """Drops by given masks, and counts collectives from the beginning of a batch to the end of its backward pass."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, int]] = {}
        self.gradients: dict[str, dict[str, torch.Tensor]] = {}

    def on_train_start(self, trainer, pl_module):
        self.dropper = BlockDropper(routing_of(pl_module.net), "block")
        self.dropper.is_active = True

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mask = MASKS[trainer.global_step]
        self.dropper.set([bit == "1" for bit in self.mask], [0.5] * len(self.mask))
        self.mode = CommDebugMode()
        self.mode.__enter__()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.mode.__exit__(None, None, None)
        counts = {str(name): count for name, count in self.mode.get_comm_counts().items()}
        self.counts[self.mask] = tuple(
            sum(count for name, count in counts.items() if kind in name) for kind in ("allgather", "reduce_scatter")
        )
        self.gradients[self.mask] = {
            name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            for name, p in pl_module.named_parameters()
            if p.grad is not None
        }


def count_collectives(folder: Path, strategy: str) -> None:
    L.seed_everything(3, verbose=False)
    watch = Collectives()
    trainer = trainer_for(folder, STRATEGIES[strategy](), [watch], max_steps=len(MASKS))
    trainer.fit(Bare(), data())
    watch.dropper.close()
    if trainer.is_global_zero:
        torch.save((watch.counts, watch.gradients), folder / f"collectives-{strategy}.pt")


# Ranks that differ


class Ragged(Deep):
    """As with padding to the longest of a batch: each rank has its own length."""

    def share(self, batch_idx):
        return super().share(batch_idx)[:, : LENGTHS[self.global_rank]]


def num_affordable(estimator: str, num_tokens: int) -> float:
    """How many batches may be measured if measurements may cost as much as the run, and all sequences are so long."""
    anatomy = anatomy_of(Deep().net)
    training, forward = training_flops(anatomy, 1, num_tokens), forward_flops(anatomy, 1, num_tokens)
    cost = (
        ablation_flops(forward.blocks, forward.outside_blocks, range(NUM_BLOCKS))
        if estimator == "ablate"
        else (1 - KEPT) * sum(training.blocks)
    )
    return STEPS * KEPT * training.total / cost


def ragged(folder: Path, estimator: str, max_overhead: float) -> None:
    faulthandler.dump_traceback_later(60, exit=True)
    method = METHODS[estimator](max_overhead=max_overhead)
    watch = Watch(method, folder / "ragged.jsonl")
    trainer_for(folder, STRATEGIES["resizable_ddp"](), [method, watch]).fit(Ragged(), data())
    torch.save(method.history.measured_at, folder / f"{os.environ['RANK']}.pt")


class UpsideDown(ProgressiveLayerDropping):
    """Drops other blocks by the same rules, as by a mistake."""

    def probabilities(self, step):
        return super().probabilities(step)[::-1]


WHAT = {"masks": "the dropped layers", "seeds": "the rules of layer dropping"}


def disagreeing(folder: Path, strategy: str, about: str, options: dict[str, Any]) -> None:
    """An error on both ranks, and no waiting for each other."""
    faulthandler.dump_traceback_later(60, exit=True)
    rank = int(os.environ["RANK"])
    kind = UpsideDown if rank and about == "masks" else ProgressiveLayerDropping
    method = kind(seed=rank if about == "seeds" else 0, **options)
    module = Deep()
    with pytest.raises(RuntimeError, match=f"Ranks 1 and rank 0 disagree about {WHAT[about]} of step"):
        trainer_for(folder, STRATEGIES[strategy](), [method]).fit(module, data())
    torch.save(len(module.losses), folder / f"{rank}.pt")


# Interruptions


def killed(folder: Path, name: str, strategy: str, kill_at: int | None, resume: bool) -> None:
    train(folder, name, strategy, METHODS[name](), kill_at=kill_at, resume=resume)
