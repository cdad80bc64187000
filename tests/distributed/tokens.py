"""Token dropping on one process and on two, with copies of the model and with shards: what one process does."""

from __future__ import annotations

import faulthandler
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lit_accel import ComputeLedger, LayerTokenLR, RandomLTD
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import training_flops
from lit_accel.methods.token_dropping import TokenDropper, TokenSchedule
from lit_accel.routing import Order, hidden_states_of, routing_of
from lit_accel.strategies import ResizableModelParallelStrategy
from tests.distributed.kill import Kill
from tests.distributed.sharded import GLOBAL_BATCH, Host, full_state
from tests.models import make_model
from tests.training import SIZE, make_trainer

STEPS = 14
# The run ends in its third epoch.
BATCHES_PER_EPOCH = 6
NUM_BLOCKS = 5
NUM_TOKENS = 12
# Tokens of a sequence, by rank, where each has its own.
LENGTHS = (12, 7)
RULES: dict[str, Any] = {"start_tokens": 0.25, "growth": 11, "quantum": 2, "num_tokens": NUM_TOKENS}
WARMUP = 3
STRATEGIES = {
    "single": lambda: "resizable",
    # Which does not look for unused parameters, and would miss the gradient of one.
    "ddp": lambda: "ddp",
    "fsdp": lambda: ResizableModelParallelStrategy(save_distributed_checkpoint=False),
}


def make_optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)


def part(tokens: torch.Tensor, batch_idx: int, rank: int, num_ranks: int) -> torch.Tensor:
    """A rank's sequences of a global batch."""
    return tokens[batch_idx * GLOBAL_BATCH :][:GLOBAL_BATCH][rank::num_ranks]


class Deep(Host):
    """With blocks enough to drop tokens in, and a learning rate that follows them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model("gpt2-tied", dtype=torch.float32, **{**SIZE, "blocks": NUM_BLOCKS}).train()

    def configure_optimizers(self):
        optimizer = make_optimizer(self)
        scheduler = LayerTokenLR(optimizer, num_warmup_steps=WARMUP)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Ragged(Deep):
    """As with padding to the longest of a batch: each rank has its own length."""

    def share(self, batch_idx):
        return super().share(batch_idx)[:, : LENGTHS[self.global_rank]]


class Watch(L.Callback):
    """Sees from outside which tokens each block changes, compares ranks, and counts by brute force.

    Args:
        method: The method.
        ledger: What keeps the books.
        notes: Where rank 0 writes a line a step: step, learning rate, kept tokens of each block on each rank, and a
            sum that stands for which ones.
        is_ragged: Whether ranks have sequences of their own length.
    """

    def __init__(self, method: RandomLTD, ledger: ComputeLedger, notes: Path, is_ragged: bool) -> None:
        self.method, self.ledger, self.notes, self.is_ragged = method, ledger, notes, is_ragged
        self.layer_tokens = self.flops = 0

    def on_train_start(self, trainer, pl_module):
        self.routing = routing_of(pl_module.net)
        self.routing.add(self.look, Order.SKIP)
        self.anatomy = anatomy_of(pl_module.net)
        self.recomputes = pl_module.net.is_gradient_checkpointing

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step
        self.changed: dict[int, torch.Tensor] = {}

    def look(self, call, run):
        output = run(call)
        with torch.no_grad():
            changed = (hidden_states_of(output) != call.hidden_states).any(-1)
        # Once more where activations are computed once more: the same.
        assert torch.equal(self.changed.setdefault(call.index, changed), changed)
        return output

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        assert all(parameter.grad is not None for parameter in pl_module.parameters() if parameter.requires_grad)
        num_kept = [changed.sum(1) for _, changed in sorted(self.changed.items())]
        assert len(num_kept) == NUM_BLOCKS
        assert all((of_sequences == of_sequences[0]).all() for of_sequences in num_kept)
        mine = torch.stack([of_sequences[0] for of_sequences in num_kept])
        self.count(mine.tolist())
        rate = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)
        kept = self.on_ranks(trainer, mine)
        rates = self.on_ranks(trainer, rate)
        assert (rates == rate).all()
        if trainer.world_size > 1 and not self.is_ragged:
            assert (kept == mine).all()
            self.compare_sets(trainer)
        if trainer.is_global_zero:
            places = torch.arange(1, mine[0] + 1)
            which = [int((changed * places.square()).sum()) for _, changed in sorted(self.changed.items())]
            with self.notes.open("a") as file:
                json.dump([self.step, rate.item(), kept.tolist(), which], file)
                file.write("\n")

    def count(self, mine: list[int]) -> None:
        num_sequences, num_tokens = self.changed[0].shape
        self.layer_tokens += num_sequences * sum(mine)
        self.flops += training_flops(
            self.anatomy,
            num_sequences,
            num_tokens,
            activation_checkpointing=self.recomputes,
            kept=dict(enumerate(mine)),
        ).total

    def compare_sets(self, trainer):
        for index, changed in self.changed.items():
            theirs = self.on_ranks(trainer, changed)
            is_dense = changed.all()
            assert is_dense == (index in (0, NUM_BLOCKS - 1) or self.step >= RULES["growth"])
            assert is_dense or not torch.equal(theirs[0], theirs[1])

    def on_ranks(self, trainer: L.Trainer, mine: torch.Tensor) -> torch.Tensor:
        return trainer.strategy.all_gather(mine).view(trainer.world_size, *mine.shape)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
            weights = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
            assert (self.on_ranks(trainer, weights) == weights).all(), f"weights differ after step {self.step}"

    def on_train_end(self, trainer, pl_module):
        self.routing.remove(self.look)
        self.expected = self.on_ranks(trainer, torch.tensor([self.layer_tokens, self.flops])).sum(0).tolist()

    def require_exact(self) -> None:
        """Compare with what was counted, after a run that began at its beginning."""
        assert [self.method.total.layer_tokens, self.ledger.phases.total.flops] == self.expected


def trainer_for(folder: Path, strategy: str, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    return make_trainer(
        folder,
        callbacks=callbacks,
        strategy=STRATEGIES[strategy](),
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        use_distributed_sampler=False,
        limit_val_batches=0,
        max_steps=STEPS,
        max_epochs=-1,
        log_every_n_steps=1,
        **options,
    )


def data() -> DataLoader:
    return DataLoader(range(BATCHES_PER_EPOCH), batch_size=1)


def train(
    folder: Path,
    name: str,
    strategy: str,
    *,
    kind: type[Deep] = Deep,
    checkpointing: str | None = None,
    kill_at: int | None = None,
    resume: bool = False,
) -> None:
    """Train, and write the final weights and counts to ``<name>.pt``."""
    L.seed_everything(3, verbose=False)
    module = kind()
    if checkpointing is not None:
        how = {"use_reentrant": checkpointing == "reentrant"}
        module.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    method, ledger = RandomLTD(**RULES), ComputeLedger(print_table=False, folder=str(folder / name))
    watch = Watch(method, ledger, folder / f"{name}.jsonl", kind is Ragged)
    callbacks = [method, ledger, watch]
    saves = kill_at is not None or resume
    if kill_at is not None:
        callbacks.append(Kill(kill_at))
    if saves:
        callbacks.append(ModelCheckpoint(folder / name, save_last=True, every_n_train_steps=1, save_top_k=0))
    trainer = trainer_for(folder, strategy, callbacks, enable_checkpointing=saves)
    trainer.fit(module, data(), ckpt_path=folder / name / "last.ckpt" if resume else None)
    if not saves:
        watch.require_exact()
    weights = full_state(module)
    if trainer.is_global_zero:
        torch.save((weights, method.total, ledger.phases.total.flops), folder / f"{name}.pt")


def by_hand(folder: Path) -> None:
    """What two ranks do, in a plain loop on one process."""
    L.seed_everything(3, verbose=False)
    module = Deep()
    dropper = TokenDropper(
        routing_of(module.net),
        range(1, NUM_BLOCKS - 1),
        TokenSchedule(RULES["start_tokens"], RULES["growth"], RULES["quantum"]),
    )
    dropper.is_active = True
    optimizer = make_optimizer(module)
    for step in range(STEPS):
        epoch, batch_idx = divmod(step, BATCHES_PER_EPOCH)
        optimizer.param_groups[0]["lr"] = 1e-2 * rate(step)
        for rank in range(2):
            dropper.set(step, (epoch, batch_idx, rank))
            (module.loss(part(module.tokens, batch_idx, rank, 2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({name: value.detach() for name, value in module.named_parameters()}, folder / "by-hand.pt")


def rate(step: int) -> float:
    """The factor of the learning rate, from the spent layer tokens; see :func:`kept`."""
    spent = [2 + (NUM_BLOCKS - 2) * kept(each) / NUM_TOKENS for each in range(STEPS)]
    before, after, total = (sum(spent[:end]) / NUM_BLOCKS for end in (step, step + 1, STEPS))
    return min(1.0, after / WARMUP) if before < WARMUP else (total - before) / (total - WARMUP)


def kept(step: int, num_tokens: int = NUM_TOKENS) -> int:
    """From a quarter of the tokens, rounded up, to all of them, in twos."""
    first = round(num_tokens / 4)
    grown = first + (num_tokens - first) * step / RULES["growth"]
    return num_tokens if step >= RULES["growth"] else max(first + first % 2, int(grown + 1e-9) // 2 * 2)


def on_one_process(folder: Path) -> None:
    train(folder, "single", "single")
    by_hand(folder)


def on_two_processes(folder: Path) -> None:
    faulthandler.dump_traceback_later(100, exit=True)
    train(folder, "ddp", "ddp")
    train(folder, "ragged", "ddp", kind=Ragged)
    train(folder, "fsdp", "fsdp")
    for strategy in ("ddp", "fsdp"):
        for checkpointing in ("reentrant", "not-reentrant"):
            train(folder, f"{strategy}-{checkpointing}", strategy, checkpointing=checkpointing)
    untold(folder)
    rank = int(os.environ["RANK"])
    for strategy in ("ddp", "fsdp"):
        for name, value in (("seed", rank), ("quantum", 2 + 2 * rank), ("start_tokens", (0.25, 1.0)[rank])):
            disagreeing(folder, strategy, RandomLTD(**{**RULES, name: value}))


def untold(folder: Path) -> None:
    """Nobody says how long sequences are: what is saved is worked out in the first call, with the model in shards."""

    class Plain(Deep):
        def configure_optimizers(self):
            return make_optimizer(self)

    method, module = RandomLTD(**{**RULES, "num_tokens": None}), Plain()
    trainer_for(folder, "fsdp", [method]).fit(module, data())
    assert len(module.losses) == STEPS


def disagreeing(folder: Path, strategy: str, method: RandomLTD) -> None:
    """An error on both ranks before the first step, and no waiting for each other."""
    module = Deep()
    with pytest.raises(RuntimeError, match="Ranks 1 and rank 0 disagree about the rules of token dropping"):
        trainer_for(folder, strategy, [method]).fit(module, data())
    assert not module.losses


def killed(folder: Path, strategy: str, kill_at: int | None, resume: bool) -> None:
    train(folder, "killed", strategy, kill_at=kill_at, resume=resume)
