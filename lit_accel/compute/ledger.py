"""The callback that keeps the books: what every step cost, and what the full-size model would have paid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import is_grad_enabled, nn

from lit_accel.anatomy import Anatomy, anatomy_of, find_transformer, uses_activation_checkpointing
from lit_accel.compute.active import Active, active_of
from lit_accel.compute.flops import Flops, forward_flops, head_accountings, training_flops
from lit_accel.compute.observer import TransformerObserver
from lit_accel.compute.own_table import find_own, first_row, move_aside
from lit_accel.compute.phases import Amounts, Phases, saved_share
from lit_accel.compute.stopwatch import Stopwatch, synchronize
from lit_accel.compute.summary import phase_table
from lit_accel.compute.table import FILE_NAME, TableWriter, read_rows, rows_until
from lit_accel.flat_parameters import refuse_flat_parameters
from lit_accel.resizing import begin_anew, full_size, prepare_module
from lit_accel.run_folder import run_folder
from lit_accel.stored_state import require_readable

_STATE_VERSION = 2
# Where Lightning's ThroughputMonitor looks for the cost of a batch.
_FLOPS_PER_BATCH = "flops_per_batch"


class ComputeLedger(Callback):
    """Counts FLOPs, dense-equivalent FLOPs, tokens and seconds of a fit, step by step, and writes them down.

    Works on any LightningModule that holds one transformer of a known family, and does not change its training in
    a single bit. Every forward call that the transformer makes within a training batch is counted
    in closed form (see :mod:`lit_accel.compute.flops`) from the shape of its input, with its backward pass;
    without gradients, the forward pass alone. A block that a method skips is not charged, one that runs on some of its
    tokens is charged for those; of matrices whose units are off in part, what is on is charged, whether or not the
    machine computes the rest; and what a method spends on measuring the model is charged, too. Validation is not
    counted; frozen parameters are counted like trained ones. If the model is resized in mid-training, or a stage
    of its sparsity begins, a new *phase* begins.

    - *Dense-equivalent* FLOPs are what the full-size model would have paid on the same batches. The full size
      is the one that the module has where the run begins; a resumed run takes it from its checkpoint.
    - *Seconds* are the wall time of the fit from its first batch's loading to its end, without validation: data
      loading, optimizer, resizes and checkpoints are in it. With several processes it is rank zero's.
    - Tokens and FLOPs are those of all ranks; what a tensor-parallel group does together counts once. Padding counts:
      the model computes on it.

    Logged to every logger, each ``Trainer.log_every_n_steps`` optimizer steps: ``compute/flops``,
    ``compute/dense_flops``, ``compute/tokens``, ``compute/seconds`` (all cumulative), ``compute/saved_share``
    (1 - flops / dense_flops) and ``compute/step_flops`` (mean over the steps since the last time).

    Where units are off, ``compute/saved_share_head_masked`` and ``compute/saved_share_head_excluded`` say the same with
    the model's head counted as sparse as its blocks, and without it: what a saving is depends on that.

    Written to ``compute_ledger.csv`` at the same steps, after each validation (with the monitored metrics), where a
    phase ends and at the end: step, phase, num_parameters, tokens, flops, dense_flops, seconds, FLOPs by three ways to
    count the head, and a column for each metric. On resume the rows after the resumed step are dropped and the table
    goes on, also from another folder. Another run's table that lies where this one is to be is moved into a
    ``version_N`` beside it.

    Sets ``flops_per_batch`` on the module, which Lightning's ``ThroughputMonitor`` reads: this rank's FLOPs of the
    present batch. A module that has an attribute of this name keeps its own.

    Args:
        monitor: Logged metrics to write beside the costs after each validation.
        folder: Where to write the table. Default: the logger's folder of this run, or ``Trainer.default_root_dir``.
        print_table: Whether to print a summary by phase at the end.

    Raises:
        ValueError: If ``monitor`` is no list of names.
        AnatomyError: At ``setup``, if the module holds no transformer of a known family, or several.
        MisconfigurationException: At ``setup``, if the strategy is FSDP1 or DeepSpeed with ZeRO stage 3.

    Example::

        trainer = Trainer(callbacks=[ComputeLedger(monitor=["val/loss", "val/perplexity"])])
    """

    def __init__(
        self, monitor: Sequence[str] = ("val/loss",), folder: str | None = None, print_table: bool = True
    ) -> None:
        super().__init__()
        if monitor is None or isinstance(monitor, str) or not all(isinstance(name, str) for name in monitor):
            raise ValueError(f'monitor is {monitor!r}; it is a list of names of logged metrics, such as ["val/loss"].')
        self.monitor = list(monitor)
        self.folder = folder
        self.print_table = print_table
        self._phases = Phases()
        self._stopwatch = Stopwatch()
        self._observer: TransformerObserver | None = None
        self._table: TableWriter | None = None
        self._table_path: Path | None = None
        self._first_row: list[str] | None = None
        # Of the present batch: one that is not finished comes again after a resume.
        self._pending = Amounts()
        self._costs: dict[tuple[Any, ...], tuple[Flops, Amounts]] = {}
        self._costs_in_part: dict[tuple[Any, ...], Flops] = {}
        self._active: Active | None = None
        # What the present call costs on all tokens, and with each block on so many tokens of a sequence.
        self._present: tuple[Flops, Callable[[int], Flops]] | None = None
        self._step = 0
        self._logged: tuple[int, int] = (0, 0)
        self._in_batch = False
        self._has_warned = False
        self._batch_flops = 0
        self._sets_flops_per_batch = False

    @property
    def phases(self) -> Phases:
        """The counters, by phase; of several ranks, as of the last row."""
        return self._phases

    # --- life cycle

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what hides the model; take its present size as the full one, unless a checkpoint says otherwise."""
        if stage == "fit":
            refuse_flat_parameters(trainer.strategy, type(self).__name__)
        # A trainer that goes on from its own earlier fit keeps its books, and may have stopped at a small size.
        if stage == "fit" and trainer.global_step == 0:
            self._phases = Phases()
            self._table_path = self._first_row = None
            prepare_module(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to watch and to measure."""
        begin_anew(trainer, pl_module)
        self._dense = anatomy_of(find_transformer(pl_module)[1]).at(full_size(pl_module))
        self._step = trainer.global_step
        self._interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._costs, self._costs_in_part = {}, {}
        self._was_called, self._pending = False, Amounts()
        self._observer = TransformerObserver(pl_module, self._on_forward, self._on_part, self._on_end)
        self._sets_flops_per_batch = not hasattr(pl_module, _FLOPS_PER_BATCH)
        self._set_batch_flops(0)
        if not self._phases.list:
            # Of a resumed run the first call says whether the phase goes on.
            self._phases.enter(self._observer.anatomy)
        self._logged = (self._step, self._phases.total.flops)
        self._open_table(trainer)
        # Not in on_validation_start, which comes when the loaders were set up: workers that start take seconds.
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.run = partial(self._stop_clock_and, loop.run, trainer)  # type: ignore[method-assign]
        self._stopwatch.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a batch."""
        assert self._observer is not None
        self._observer.refresh()
        self._set_batch_flops(0)
        self._in_batch = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End a batch that a module has left out by returning -1 from its ``on_train_batch_start``."""
        self._in_batch = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the batch; where an optimizer step is complete and due, log it and write a row."""
        self._in_batch = False
        self._close_batch()
        phase = self._phases.list[-1]
        phase.seconds += self._stopwatch.lap()
        previous, self._step = self._step, trainer.global_step
        if self._step > previous:
            # Not by the batch: several may be computed as one.
            if not self._was_called and not self._has_warned:
                self._has_warned = True
                rank_zero_warn(
                    "ComputeLedger: the transformer was not called in this optimizer step, so nothing was counted. "
                    "Call the model itself; calls of its parts are not seen."
                )
            self._was_called = False
        phase.steps += self._step - previous
        # Not "divisible by": with several optimizers one batch makes several steps.
        if self._interval and self._step // self._interval > previous // self._interval:
            self._phases.collect(trainer.strategy, trainer.world_size)
            self._log(trainer)
            self._write_row()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a row with the monitored metrics, and let the clock go on."""
        if not self._is_training(trainer):
            return
        self._phases.collect(trainer.strategy, trainer.world_size)
        metrics = {name: trainer.callback_metrics[name] for name in self.monitor if name in trainer.callback_metrics}
        if missing := [name for name in self.monitor if name not in metrics]:
            rank_zero_warn(
                f"ComputeLedger monitors {', '.join(missing)}, which nothing has logged. What was: "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}. Name the held-out loss among them with "
                'ComputeLedger(monitor=["..."]); lit-accel report takes its name with --metric.'
            )
        self._write_row({name: repr(float(value)) for name, value in metrics.items()})
        synchronize(trainer.strategy.root_device)
        self._stopwatch.start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the books."""
        self._stop_clock(trainer)
        self._phases.collect(trainer.strategy, trainer.world_size)
        if self._table is not None and self._table.last_step != self._step:
            self._write_row()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the summary."""
        if self.print_table and trainer.is_global_zero and self._phases.list:
            Console().print(phase_table(self._phases.list, self._phases.total))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._close(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._close(pl_module)

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as primitives."""
        return {
            "version": _STATE_VERSION,
            "phases": self._phases.to_state(),
            "table": None if self._table_path is None else str(self._table_path),
            "first_row": self._first_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters over.

        Raises:
            MisconfigurationException: If a newer version wrote them, or they are damaged.
        """
        # Earlier versions do not say what their table begins with.
        present = {name: value for name, value in self.state_dict().items() if name != "first_row"}
        require_readable(state_dict, present, "the ledger")
        self._phases.load_state(state_dict["phases"])
        self._table_path = None if state_dict["table"] is None else Path(state_dict["table"])
        self._first_row = state_dict.get("first_row")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the saved counters up to date on all ranks: Lightning has asked for the state without a trainer."""
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if progress.processed == progress.ready:
            # Callbacks that save may come before this one.
            self._close_batch()
        self._phases.collect(trainer.strategy, trainer.world_size)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    # --- counting

    def _on_forward(self, anatomy: Anatomy, transformer: nn.Module, num_sequences: int, num_tokens: int) -> None:
        # Not "if transformer.training": models of from_pretrained are in evaluation mode and train all the same.
        assert self._observer is not None
        self._present = None
        if not (self._in_batch or self._observer.is_probing):
            return
        self._was_called = True
        active = active_of(transformer)
        if active != self._active:
            # Units differ in number from one stage to the next; costs of earlier ones will not be asked for again.
            self._active, self._costs, self._costs_in_part = active, {}, {}
        if self._phases.ends_with(anatomy, active):
            self._end_phase()
        self._phases.enter(anatomy, active)
        flops, amounts = self._cost(anatomy, transformer, num_sequences, num_tokens)
        in_part = partial(self._cost_in_part, anatomy, transformer, num_sequences, num_tokens, is_grad_enabled())
        self._present = flops, in_part
        if self._observer.is_probing:
            # Overhead: no tokens were trained on, and the full model without the method would not have paid it.
            amounts = replace(amounts, tokens=0, dense_flops=0, dense_head_excluded_flops=0)
        self._count(amounts)

    def _on_part(self, index: int, num_kept: int) -> None:
        if self._present is not None:
            whole, in_part = self._present
            flops = (in_part(num_kept).blocks[index] if num_kept else 0) - whole.blocks[index]
            self._count(
                Amounts(flops=flops, head_masked_flops=flops, head_dense_flops=flops, head_excluded_flops=flops)
            )

    def _on_end(self) -> None:
        self._present = None

    def _count(self, amounts: Amounts) -> None:
        self._pending.add(amounts)
        # Here and not at the batch's end: there the monitor may come before us.
        self._set_batch_flops(self._batch_flops + amounts.flops)

    def _close_batch(self) -> None:
        """Enter what the batch cost into the books."""
        if self._phases.list:
            self._phases.count(self._pending)
        self._pending = Amounts()

    def _end_phase(self) -> None:
        """Write the row that a phase ends with: what it cost must not depend on when rows are due."""
        assert self._observer is not None
        self._close_batch()
        trainer = self._observer.module.trainer
        self._phases.collect(trainer.strategy, trainer.world_size)
        if self._table is not None and self._table.last_step != self._step:
            self._write_row()

    def _cost(
        self, anatomy: Anatomy, transformer: nn.Module, num_sequences: int, num_tokens: int
    ) -> tuple[Flops, Amounts]:
        backward, recompute = is_grad_enabled(), transformer.training and uses_activation_checkpointing(transformer)
        key = (len(self._phases.list), num_sequences, num_tokens, backward, recompute)
        if key not in self._costs:

            def cost(model: Anatomy, active: Active | None) -> Flops:
                if backward:
                    return training_flops(
                        model, num_sequences, num_tokens, activation_checkpointing=recompute, active=active
                    )
                return forward_flops(model, num_sequences, num_tokens, active=active)

            flops, dense = cost(anatomy, self._active), cost(self._dense, None)
            by_head = head_accountings(anatomy, flops, cost(anatomy, None), self._active)
            self._costs[key] = (
                flops,
                Amounts(
                    tokens=num_sequences * num_tokens,
                    flops=flops.total,
                    dense_flops=dense.total,
                    head_masked_flops=by_head.masked,
                    head_dense_flops=by_head.dense,
                    head_excluded_flops=by_head.excluded,
                    dense_head_excluded_flops=dense.total - dense.head,
                ),
            )
        return self._costs[key]

    def _cost_in_part(
        self,
        anatomy: Anatomy,
        transformer: nn.Module,
        num_sequences: int,
        num_tokens: int,
        backward: bool,
        num_kept: int,
    ) -> Flops:
        """Return what the model costs if each block runs on so many tokens of a sequence.

        Whether there is a backward pass was seen where the model was called: reentrant checkpointing calls blocks
        without gradients at first.
        """
        recompute = transformer.training and uses_activation_checkpointing(transformer)
        key = (len(self._phases.list), num_sequences, num_tokens, backward, recompute, num_kept)
        if key not in self._costs_in_part:
            kept = dict.fromkeys(range(len(anatomy.blocks)), num_kept)
            self._costs_in_part[key] = (
                training_flops(
                    anatomy,
                    num_sequences,
                    num_tokens,
                    activation_checkpointing=recompute,
                    kept=kept,
                    active=self._active,
                )
                if backward
                else forward_flops(anatomy, num_sequences, num_tokens, kept=kept, active=self._active)
            )
        return self._costs_in_part[key]

    def _set_batch_flops(self, flops: int) -> None:
        self._batch_flops = flops
        if self._sets_flops_per_batch and self._observer is not None:
            setattr(self._observer.module, _FLOPS_PER_BATCH, flops)

    # --- writing

    def _log(self, trainer: L.Trainer) -> None:
        total = self._phases.total
        logged_step, logged_flops = self._logged
        self._logged = (self._step, total.flops)
        metrics = {
            "compute/flops": total.flops,
            "compute/dense_flops": total.dense_flops,
            "compute/saved_share": saved_share(total.flops, total.dense_flops),
            "compute/seconds": total.seconds,
            "compute/tokens": total.tokens,
            "compute/step_flops": (total.flops - logged_flops) / (self._step - logged_step),
        }
        if self._is_sparse:
            metrics["compute/saved_share_head_masked"] = saved_share(total.head_masked_flops, total.dense_flops)
            metrics["compute/saved_share_head_excluded"] = saved_share(
                total.head_excluded_flops, total.dense_head_excluded_flops
            )
        # Not self.log: it would round to float32. The step is the one that self.log uses.
        for logger in trainer.loggers:
            logger.log_metrics(
                {name: float(value) for name, value in metrics.items()},
                step=trainer.fit_loop.epoch_loop._batches_that_stepped,
            )

    @property
    def _is_sparse(self) -> bool:
        return any("stage" in phase.size for phase in self._phases.list)

    def _open_table(self, trainer: L.Trainer) -> None:
        folder = self.folder or run_folder(trainer)
        previous, self._table_path = self._table_path, Path(folder).absolute() / FILE_NAME
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rows: list[dict[str, str]] = []
        own = None
        if trainer.global_step and previous is not None:
            own = find_own(self._first_row, self._table_path, previous, trainer.ckpt_path)
            rows = rows_until([] if own is None else read_rows(own), trainer.global_step, self._phases.total.tokens)
            if own is None and self._first_row is not None:
                rank_zero_warn(
                    f"ComputeLedger: the rows of before the checkpoint are neither in {previous} nor beside the "
                    f"checkpoint. The table begins with step {trainer.global_step}; its costs are those of the whole "
                    f"run. To keep its beginning, put the run's {FILE_NAME} beside the checkpoint and resume again."
                )
            if rows and self._is_last_words(rows[-1], trainer):
                rows.pop()
        if own != self._table_path and (moved := move_aside(self._table_path)) is not None:
            rank_zero_warn(f"ComputeLedger: {self._table_path} is of another run; it was moved to {moved}.")
        if not rows:
            # What it is known by is still to be written.
            self._first_row = None
        self._table = TableWriter(self._table_path, self.monitor, rows)

    def _is_last_words(self, row: dict[str, str], trainer: L.Trainer) -> bool:
        """Whether a row was written only because its run ended there, which the resumed run does not."""
        is_due = self._interval and int(row["step"]) % self._interval == 0
        is_validation = any(row.get(metric) for metric in self.monitor)
        return int(row["step"]) == trainer.global_step and not is_due and not is_validation

    def _write_row(self, metrics: dict[str, str] | None = None) -> None:
        if self._table is None:
            return
        total = self._phases.total
        self._table.append(
            {
                "step": self._step,
                "phase": len(self._phases.list) - 1,
                "num_parameters": total.num_parameters,
                "tokens": total.tokens,
                "flops": total.flops,
                "dense_flops": total.dense_flops,
                "head_masked_flops": total.head_masked_flops,
                "head_dense_flops": total.head_dense_flops,
                "head_excluded_flops": total.head_excluded_flops,
                "dense_head_excluded_flops": total.dense_head_excluded_flops,
                "seconds": f"{total.seconds:.6f}",
                **(metrics or {}),
            }
        )
        if self._first_row is None:
            self._first_row = first_row(self._table.path)

    # --- helpers of the life cycle

    def _is_training(self, trainer: L.Trainer) -> bool:
        return self._observer is not None and not trainer.sanity_checking

    def _stop_clock_and(self, run: Callable[[], Any], trainer: L.Trainer) -> Any:
        if self._is_training(trainer):
            self._stop_clock(trainer)
        return run()

    def _stop_clock(self, trainer: L.Trainer) -> None:
        synchronize(trainer.strategy.root_device)
        self._phases.list[-1].seconds += self._stopwatch.lap()
        self._stopwatch.pause()

    def _close(self, pl_module: L.LightningModule) -> None:
        if self._observer is None:
            return
        self._observer.close()
        self._observer = None
        vars(pl_module.trainer.fit_loop.epoch_loop.val_loop).pop("run", None)
        self._table = None
        self._in_batch = False
        if self._sets_flops_per_batch:
            delattr(pl_module, _FLOPS_PER_BATCH)
