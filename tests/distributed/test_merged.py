"""Merged micro-batches on several processes: gradients are synchronised once, by the merged call."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import merged
from tests.distributed.launch import launch

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("strategy", ["resizable_ddp", "resizable_model_parallel"])
def test_merging_changes_no_optimizer_step_on_two_processes(tmp_path, strategy):
    launch(merged.main, tmp_path, strategy, devices=2)
    assert_merging_changed_nothing(tmp_path)


def test_merging_changes_no_optimizer_step_after_a_resume_in_mid_window(tmp_path):
    """The merged call must be the one that synchronises, or each rank trains alone."""
    launch(merged.resume_in_mid_window, tmp_path, devices=2)
    assert_merging_changed_nothing(tmp_path)


def assert_merging_changed_nothing(folder):
    (many, plain), (few, actual), (_, other) = (torch.load(folder / f"{name}.pt") for name in ("1-0", "4-0", "4-1"))
    assert few < many
    for name, value in plain.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-10, msg=name)
        assert torch.equal(actual[name], other[name])
