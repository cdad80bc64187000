"""Mixed sparsity training on one process and on two, through all of its phases: what one process does."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import signal
import weakref
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lit_accel import ComputeLedger, MixedSparsityTraining
from tests.distributed.kill import Kill
from tests.distributed.sharded import Host
from tests.models import make_model
from tests.training import SIZE, make_trainer

# Dense, two steps of warm-up, ultra-sparsification, two of restoration, and dense again.
STAGES = [(0, 0.0), (2, 0.25), (4, 0.5), (6, 0.625), (14, 0.5), (16, 0.25), (18, 0.0)]
STEPS = 20
UPDATE_EVERY = 2
RULES: dict[str, Any] = {"stages": STAGES, "update_every": UPDATE_EVERY, "drop_fraction": 0.9, "quantum": 2}
ELEMENTS = dict.fromkeys(("ffn_units", "attention_units", "head_units"), "element")
BLOCKS = {"ffn_units": "block", "attention_units": "block", "block_size": 2}
PATTERN = {"attention_pattern": "union", "attention_window": 4, "attention_phase": (6, 14)}
KINDS: dict[str, dict[str, Any]] = {
    "neurons": {},
    "elements": {**ELEMENTS, "distribution": "er"},
    "blocks": BLOCKS,
    # One of each kind in which a model can be held, and sparse attention.
    "all": {**BLOCKS, "attention_units": "head", "head_units": "element", **PATTERN},
}
STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: "ddp",
    "resizable": lambda: "resizable_ddp",
    "views": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "unused": lambda: DDPStrategy(find_unused_parameters=True),
    "static": lambda: DDPStrategy(static_graph=True),
}
ACCUMULATED: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}


class Sparse(Host):
    """With heads enough to have some of them off and others replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model("gpt2-tied", dtype=torch.float32, **{**SIZE, "heads": 8, "head_dim": 2, "blocks": 2})
        self.net.train()


def fingerprint(tensors: Iterable[torch.Tensor]) -> int:
    """A number that stands for every bit of some tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(str(tensor.shape).encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 2


def copy(masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: mask.clone() for name, mask in masks.items()}


def optimizer_tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for of_one in state["state"].values() for _, value in sorted(of_one.items())]


class Watch(L.Callback):
    """Compares ranks after every step, and writes down what each step has made. Stands right of the method.

    Args:
        method: The method.
        notes: Where rank 0 writes a line a step: step, digest of the masks, active units of a group by space, units
            switched on in this step, entries that the module holds, and fingerprints of the masks, of the module's
            state and of the optimizer's.
    """

    def __init__(self, method: MixedSparsityTraining, notes: Path) -> None:
        self.method, self.notes = method, notes

    def on_train_start(self, trainer, pl_module):
        self.step = trainer.global_step
        self.wrapper = weakref.ref(trainer.strategy.model)
        self.masks = copy(self.method.masks)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step, self.step = self.step, trainer.global_step
        if step == self.step:
            return
        if self.wrapper() is not trainer.strategy.model:
            # Another one of DDP, and nothing holds the buckets of the old one.
            assert self.wrapper() is None
            self.wrapper = weakref.ref(trainer.strategy.model)
        before, masks = self.masks, self.method.masks
        self.masks = copy(masks)
        num_grown = sum(int((mask & ~before[name]).sum()) for name, mask in masks.items())
        counts = {name: mask.sum(1) for name, mask in masks.items()}
        assert all((number == number[0]).all() for number in counts.values())
        numbers = {name: int(number[0]) for name, number in counts.items()}
        assert numbers == self.method.targets.counts(step)
        marks = [
            self.method.digest,
            fingerprint(masks.values()),
            fingerprint(pl_module.state_dict().values()),
            fingerprint(optimizer_tensors(trainer.optimizers[0].state_dict())),
        ]
        gathered = trainer.strategy.all_gather(torch.tensor(marks)).view(trainer.world_size, -1)
        assert (gathered == torch.tensor(marks)).all(), f"ranks differ after step {step}: {gathered.tolist()}"
        if trainer.is_global_zero:
            held = sum(parameter.numel() for parameter in pl_module.parameters())
            with self.notes.open("a") as file:
                json.dump([step, marks[0], list(numbers.values()), num_grown, held, *marks[2:]], file)
                file.write("\n")


class KillInside(L.Callback):
    """Ends the process without a word between a forward pass and its optimizer step.

    Args:
        step: The step.
        hook: ``"on_after_backward"``, or ``"on_before_optimizer_step"``: right of the method, when this has already
            chosen other units.
    """

    def __init__(self, step: int, hook: str) -> None:
        def kill(trainer, pl_module, *args):
            if trainer.global_step == step:
                trainer.strategy.barrier()
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, hook, kill)


class Perturb(L.Callback):
    """Gives each rank a gradient of its own, as a module might that does not leave it to DDP. Left of the method.

    Args:
        step: The step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            generator = torch.Generator().manual_seed(trainer.global_rank)
            for parameter in pl_module.net.parameters():
                parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))


def trainer_for(folder: Path, strategy: str, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    return make_trainer(
        folder,
        callbacks=callbacks,
        strategy=STRATEGIES[strategy](),
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        use_distributed_sampler=False,
        max_epochs=-1,
        log_every_n_steps=1,
        **{"max_steps": STEPS, "limit_val_batches": 0, **options},
    )


def data() -> DataLoader:
    return DataLoader(range(2 * STEPS), batch_size=1)


def train(
    folder: Path,
    name: str,
    strategy: str,
    kind: str,
    *,
    kill: L.Callback | None = None,
    resume: bool = False,
    **options: Any,
) -> None:
    """Train, and write what there is at the end to ``<name>.pt``."""
    L.seed_everything(3, verbose=False)
    module = Sparse()
    method = MixedSparsityTraining(**{**RULES, **KINDS[kind]})
    ledger = ComputeLedger(print_table=False, folder=str(folder / name))
    callbacks = [method, ledger, Watch(method, folder / f"{name}.jsonl")]
    saves = kill is not None or resume
    if kill is not None:
        callbacks.append(kill)
    if saves:
        callbacks.append(ModelCheckpoint(folder / name, save_last=True, every_n_train_steps=1, save_top_k=0))
    trainer = trainer_for(folder, strategy, callbacks, enable_checkpointing=saves, **options)
    trainer.fit(module, data(), data(), ckpt_path=folder / name / "last.ckpt" if resume else None)
    if trainer.is_global_zero:
        phases = [asdict(phase) for phase in ledger.phases.list]
        for phase in phases:
            del phase["seconds"]
        end = {
            "weights": {key: value.clone() for key, value in module.state_dict().items()},
            "optimizer": trainer.optimizers[0].state_dict(),
            "method": method.state_dict(),
            "phases": phases,
        }
        torch.save(end, folder / f"{name}.pt")


def disagreeing(folder: Path, rules: dict[str, Any], *others: L.Callback, what: str, num_steps: int = 0) -> None:
    """An error on both ranks, and no waiting for each other."""
    module = Sparse()
    method = MixedSparsityTraining(**{**RULES, **rules})
    before = {key: value.shape for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"Ranks 1 and rank 0 disagree about the {what}.*step {num_steps}"):
        trainer_for(folder, "ddp", [*others, method]).fit(module, data())
    assert len(module.losses) == num_steps + bool(num_steps)
    assert {key: value.shape for key, value in module.state_dict().items()} == before
    assert {name: parameter.shape for name, parameter in module.named_parameters()}.items() <= before.items()
    assert not module.net._state_dict_hooks


# By the name of an argument, the values of both ranks.
SETTINGS: dict[str, tuple[Any, Any]] = {
    "seed": (0, 1),
    "stages": (STAGES, [(0, 0.0), (2, 0.5), (18, 0.0)]),
    "update_every": (2, 3),
    "drop_fraction": (0.9, 0.8),
    "gradient_share": (0.75, 0.5),
    "ffn_units": ("neuron", "element"),
    "attention_units": ("head", "dense"),
    "head_units": ("dense", "element"),
    "distribution": ("uniform", "er"),
    "quantum": (2, 4),
    "block_size": (2, 4),
    "attention_pattern": (None, "window"),
    "attention_window": (4, 8),
    "attention_phase": ((0.5, 0.9), (0.5, 1.0)),
    "evaluate_pattern": (True, False),
    "execution": ("compact", "masked"),
    "preset": (None, "paper_4x"),
}


OF_PATTERNS = {"attention_window", "attention_phase", "evaluate_pattern"}

# Of DDP; each with the same result.
OPTIONS = ("resizable", "views", "unused", "static")


def on_one_process(folder: Path) -> None:
    for kind in KINDS:
        train(folder, f"single-{kind}", "single", kind)
    train(folder, "single-accumulated", "single", "neurons", **ACCUMULATED)


def on_two_processes(folder: Path) -> None:
    faulthandler.dump_traceback_later(100, exit=True)
    for kind in KINDS:
        train(folder, f"ddp-{kind}", "ddp", kind)
        train(folder, f"again-{kind}", "ddp", kind)
    for strategy in OPTIONS:
        train(folder, f"{strategy}-neurons", strategy, "neurons")
    train(folder, "validated-neurons", "ddp", "neurons", limit_val_batches=1, val_check_interval=1)
    for strategy in ("ddp", "views"):
        train(folder, f"{strategy}-accumulated", strategy, "neurons", **ACCUMULATED)


def on_two_processes_that_disagree(folder: Path) -> None:
    faulthandler.dump_traceback_later(100, exit=True)
    rank = int(os.environ["RANK"])
    for name, values in SETTINGS.items():
        # What says how to attend by a pattern matters where there is one.
        pattern = {"attention_pattern": "window"} if name in OF_PATTERNS else {}
        disagreeing(folder, {**pattern, name: values[rank]}, what="rules of mixed sparsity")
    # What DDP sends in its place is the same on both; what they choose by is not.
    for kind in KINDS:
        disagreeing(folder, KINDS[kind], Perturb(6), what="units that are on", num_steps=6)


def on_two_processes_with_checkpoints_of_their_own(folder: Path, step: int) -> None:
    """As where each machine has a disk of its own, and files of different runs on it."""
    faulthandler.dump_traceback_later(100, exit=True)
    rank = int(os.environ["RANK"])
    trainer = trainer_for(folder, "ddp", [MixedSparsityTraining(**RULES)], max_steps=step)
    trainer.fit(Sparse(), data())
    trainer.save_checkpoint(folder / "both.ckpt")
    checkpoint = torch.load(folder / "both.ckpt", weights_only=True)
    if rank:
        flip(checkpoint["callbacks"])
    torch.save(checkpoint, folder / f"{rank}.ckpt")
    module = Sparse()
    trainer = trainer_for(folder, "ddp", [MixedSparsityTraining(**RULES)])
    with pytest.raises(RuntimeError, match="Ranks 1 and rank 0 disagree about the units"):
        trainer.fit(module, data(), ckpt_path=folder / f"{rank}.ckpt")
    assert not module.losses


def flip(state: Any) -> None:
    """Turn around all boolean tensors in a state: as many units are on, but other ones."""
    for key, value in list(state.items()):
        if isinstance(value, dict):
            flip(value)
        elif isinstance(value, torch.Tensor) and value.dtype == torch.bool:
            state[key] = value.flip(1)


def killed(folder: Path, strategy: str, kill: tuple[int, str | None] | None, resume: bool) -> None:
    killer: L.Callback | None = None
    if kill is not None:
        step, hook = kill
        killer = Kill(step) if hook is None else KillInside(step, hook)
    train(folder, "killed", strategy, "all", kill=killer, resume=resume)
