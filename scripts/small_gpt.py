"""The small GPT on the standard library's sources that the demo and the comparisons train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.optim import Optimizer

from lit_accel import ComputeLedger, MultiLevelTraining
from lit_accel.anatomy import Anatomy, anatomy_of
from lit_accel.compute import read_ledger, training_flops
from lit_accel.data import TextDataModule
from lit_accel.methods.multilevel.phases import resolve_phases
from lit_accel.tasks import CausalLM, WarmupDecay

Scheduler = Callable[[Optimizer], WarmupDecay]


def warmup_and_linear_decay(optimizer: Optimizer) -> WarmupDecay:
    """Return a warm-up over 5 % of the run and a decay to zero at its end."""
    return WarmupDecay(optimizer, num_warmup_steps=0.05)


@dataclass(frozen=True)
class Setup:
    """A model, its data and the length of its dense run.

    Args:
        num_blocks: Blocks of the full model.
        embed: Its width.
        heads: Its attention heads.
        vocab_size: Tokens of the byte-level BPE.
        block_size: Tokens of a sequence.
        batch_size: Sequences of a step.
        num_steps: Optimizer steps of the dense run.
        num_evaluations: How often the held-out loss is measured in the dense run.
        val_batches: Batches of the held-out set.
        lr: Peak learning rate.
        max_bytes: How much of the text to use; ``None`` for all.
    """

    num_blocks: int
    embed: int
    heads: int
    vocab_size: int
    block_size: int
    batch_size: int
    num_steps: int
    num_evaluations: int = 10
    val_batches: int = 20
    lr: float = 4e-3
    max_bytes: int | None = None

    def data(self, seed: int = 0) -> TextDataModule:
        """Return the data; the held-out part is the same for every seed."""
        return TextDataModule(
            vocab_size=self.vocab_size,
            block_size=self.block_size,
            batch_size=self.batch_size,
            val_batches=self.val_batches,
            seed=seed,
            max_bytes=self.max_bytes,
        )

    def module(self, lr: float | None = None, scheduler: Scheduler | None = warmup_and_linear_decay) -> CausalLM:
        """Return the task: AdamW, and by default warm-up over 5 % of the run and decay to zero.

        Args:
            lr: Peak learning rate instead of the set-up's own.
            scheduler: Makes the learning-rate schedule; ``None`` is a constant rate.
        """
        peak = self.lr if lr is None else lr
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return CausalLM(
            "gpt2",
            overrides={
                "n_layer": self.num_blocks,
                "n_embd": self.embed,
                "n_head": self.heads,
                "n_positions": self.block_size,
                "bos_token_id": None,
                "eos_token_id": None,
                **dropout,
            },
            vocab_size=self.vocab_size,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.95), weight_decay=0.1),
            lr_scheduler=scheduler,
        )

    def step_flops(self, anatomy: Anatomy) -> int:
        """Return the FLOPs of an optimizer step."""
        return training_flops(anatomy, self.batch_size, self.block_size).total

    def steps_for_budget(self, method: MultiLevelTraining, budget: float, small_tokens: float = 1.0) -> int:
        """Return how many steps a method gets for a share of the dense run's FLOPs.

        Args:
            method: The method; shares in its phases are shares of the returned number.
            budget: The share.
            small_tokens: Tokens of a step at the smaller levels, relative to those of the full model.
        """
        with torch.device("meta"):
            anatomy = anatomy_of(self.module().model)
        levels = [anatomy, *(level_map.small for level_map in method.plan_levels(anatomy))]
        costs = [round(self.step_flops(level) * (small_tokens if number else 1)) for number, level in enumerate(levels)]
        budget_flops = budget * costs[0] * self.num_steps

        def total(num_steps: int) -> int:
            phases = resolve_phases(method.phases, len(costs), num_steps)
            return sum((phase.end - phase.start) * costs[phase.level] for phase in phases)

        num_steps = self.num_steps
        while total(num_steps + 1) <= budget_flops:
            num_steps += 1
        while total(num_steps) > budget_flops or num_steps % self.num_evaluations:
            num_steps -= 1
        return num_steps

    def run(
        self,
        folder: Path,
        num_steps: int,
        method: MultiLevelTraining | None = None,
        *,
        seed: int = 0,
        lr: float | None = None,
        quiet: bool = False,
        accumulate: int = 1,
        evaluate_every: int | None = None,
        callbacks: Sequence[L.Callback] = (),
        scheduler: Scheduler = warmup_and_linear_decay,
    ) -> tuple[CausalLM, L.Trainer]:
        """Train once; the ledger goes to ``folder``.

        Args:
            folder: The run's folder.
            num_steps: Optimizer steps.
            method: The method, or none for dense training.
            seed: Of initialisation and data order.
            lr: Peak learning rate instead of the set-up's own.
            quiet: Whether to leave out progress bars and summaries.
            accumulate: In how many micro-batches a step is computed.
            evaluate_every: Micro-batches between evaluations; default is ``num_evaluations`` of them in the run.
            callbacks: More callbacks; they come before the method.
            scheduler: Makes the learning-rate schedule, unless the method brings its own.
        """
        if num_steps % self.num_evaluations:
            # What is compared is the end of the run, where the learning rate is zero: it must be evaluated.
            raise ValueError(f"num_steps is {num_steps}; it must be a multiple of {self.num_evaluations}.")
        L.seed_everything(seed, verbose=False)
        ledger: L.Callback = ComputeLedger(folder=str(folder), print_table=not quiet)
        own_schedule = method is not None and method.learning_rate == "paper"
        module = self.module(lr, None if own_schedule else scheduler)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            strategy="resizable" if method is not None else "auto",
            precision="bf16-mixed",
            max_steps=num_steps,
            max_epochs=-1,
            val_check_interval=evaluate_every or num_steps // self.num_evaluations * accumulate,
            accumulate_grad_batches=accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            log_every_n_steps=10,
            callbacks=[ledger, *callbacks, *([method] if method is not None else [])],
            logger=CSVLogger(folder, name="", version=""),
            enable_checkpointing=False,
            enable_progress_bar=not quiet,
            enable_model_summary=False,
        )
        trainer.fit(module, replace(self, batch_size=self.batch_size // accumulate).data(seed))
        return module, trainer


def end_of(folder: str | Path, num_steps: int) -> dict[str, float]:
    """Return what a run cost and reached: ``flops``, ``seconds`` and ``val_loss`` at its last step.

    Args:
        folder: The run's folder.
        num_steps: Its optimizer steps.

    Raises:
        RuntimeError: If its last evaluation is not at its end, where the learning rate is zero.
    """
    ledger = read_ledger(folder)
    last = ledger.measured("val/loss")[-1]
    if ledger.step[last] != num_steps:
        raise RuntimeError(f"The last evaluation is at step {ledger.step[last]}, of {num_steps}: no end of a run.")
    return {
        "flops": float(ledger.flops[last]),
        "seconds": float(ledger.seconds[last]),
        "val_loss": float(ledger.metrics["val/loss"][last]),
    }
