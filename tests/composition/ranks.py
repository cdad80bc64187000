"""A V-cycle with dropped layers and tokens on one process and on two: what one process of the test does."""

from __future__ import annotations

import faulthandler
import json
import os

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lit_accel import Composition, ComputeLedger, Level, MultiLevelTraining, Phase, ProgressiveLayerDropping, RandomLTD
from lit_accel.strategies import ResizableDDPStrategy
from tests.composition.runs import Ran
from tests.distributed.sharded import GLOBAL_BATCH, Host, full_state
from tests.models import make_model
from tests.training import SIZE, make_trainer

STEPS = 14
PHASES = [(0, 3), (1, 5), (0, None)]
DROP = {"theta": 0.4, "gamma": 0.5}
LTD = {"start_tokens": 0.25, "growth": 10, "quantum": 1, "num_tokens": 12}


class Deep(Host):
    """Six blocks, and nothing that would give a block another gradient than its tokens do."""

    def __init__(self):
        super().__init__()
        self.net = make_model("gpt2-tied", dtype=torch.float32, **{**SIZE, "blocks": 6}).train()


class Watch(L.Callback):
    """After every step, all ranks have the same weights, bit for bit, and have run the same blocks."""

    def __init__(self, ran, notes):
        self.ran, self.notes = ran, notes

    def on_train_batch_end(self, trainer, pl_module, *_):
        call = self.ran.calls[-1]
        rows = [call["rows"].get(index, 0) // call["shape"][0] for index in range(len(call["anatomy"].blocks))]
        if trainer.world_size > 1:
            weights = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
            for mine in (weights, torch.tensor(rows)):
                assert torch.equal(*trainer.strategy.all_gather(mine)), f"ranks differ after step {call['step']}"
        if trainer.is_global_zero:
            with self.notes.open("a") as file:
                json.dump([call["step"], rows], file)
                file.write("\n")


class InOne(Deep):
    """On one process: two micro-batches are what two ranks have of a global batch."""

    def share(self, batch_idx):
        return self.tokens[batch_idx // 2 * GLOBAL_BATCH :][:GLOBAL_BATCH][batch_idx % 2 :: 2]


class TokensInOne(RandomLTD):
    """Draws for each of two micro-batches what a rank draws."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._position = trainer.global_step, (0, batch_idx // 2, batch_idx % 2)
        self._dropper.set(*self._position)


def train(folder, name, *, reverse=False, dense_tail=2, strategy=None):
    """Train, and write the final weights and FLOPs to ``<name>.pt``."""
    L.seed_everything(3, verbose=False)
    levels = MultiLevelTraining(
        [Level()], [Phase(*phase) for phase in PHASES], coarse=0.5, fine=0.5, optimizer_state="project"
    )
    ledger, ran = ComputeLedger(print_table=False, folder=str(folder / name)), Ran()
    is_one = "WORLD_SIZE" not in os.environ
    tokens = (TokensInOne if is_one else RandomLTD)(**LTD)
    methods = [levels, ProgressiveLayerDropping(**DROP), tokens]
    trainer = make_trainer(
        folder,
        callbacks=[
            *(methods[::-1] if reverse else methods),
            Composition(dense_tail=dense_tail),
            ledger,
            ran,
            Watch(ran, folder / f"{name}.jsonl"),
        ],
        strategy=strategy or ("resizable" if is_one else ResizableDDPStrategy(find_unused_parameters=True)),
        accumulate_grad_batches=2 if is_one else 1,
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        use_distributed_sampler=False,
        limit_val_batches=0,
        max_steps=STEPS,
        max_epochs=-1,
        log_every_n_steps=1,
    )
    module = InOne() if is_one else Deep()
    trainer.fit(module, DataLoader(range(100), batch_size=1))
    weights = full_state(module)
    if trainer.is_global_zero:
        torch.save((weights, counted(ledger)), folder / f"{name}.pt")


def counted(ledger):
    names = ("size", "steps", "tokens", "flops", "dense_flops")
    return [{name: getattr(phase, name) for name in names} for phase in ledger.phases.list]


def on_one_process(folder):
    train(folder, "one")


def on_two_processes(folder):
    faulthandler.dump_traceback_later(100, exit=True)
    train(folder, "two")
    train(folder, "again", reverse=True)
    with pytest.raises(RuntimeError, match="Ranks 1 and rank 0 disagree about the rules of composition"):
        train(folder, "rules", dense_tail=2 + int(os.environ["RANK"]))
    # What would not work is refused on both.
    with pytest.raises(MisconfigurationException, match="find_unused_parameters=True"):
        train(folder, "refused", strategy="resizable_ddp")
