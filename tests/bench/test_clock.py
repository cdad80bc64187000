"""Seconds are those of training, whenever validation comes between."""

import time

import lightning.pytorch as L
import pytest

from scripts.bench.clock import CpuClock, reference_step
from tests.bench.small_study import SMALL
from tests.training import TinyModule, loader


def burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


class Burning(TinyModule):
    def training_step(self, batch, batch_idx):
        burn(0.05)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        burn(0.2)


@pytest.mark.parametrize("interval", [1, 2, 6])
def test_validation_is_left_out_and_all_of_training_is_in(tmp_path, interval):
    clock = CpuClock()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=6,
        val_check_interval=interval,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Burning(), loader(), loader())
    assert trainer.global_step == 6
    # Some seconds of the first step's own, but no 0.2 of a validation.
    assert 6 * 0.05 <= clock.seconds < 6 * 0.05 + 0.19


def test_a_reference_step_takes_time_and_changes_no_draw():
    import torch

    torch.manual_seed(0)
    expected = torch.rand(3)
    reference_step(SMALL)
    torch.manual_seed(0)
    assert 0 < reference_step(SMALL) < 1
    assert torch.equal(torch.rand(3), expected)
