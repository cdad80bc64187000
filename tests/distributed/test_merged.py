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
    (many, plain), (few, actual), (_, other) = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "4-0", "4-1"))
    assert few < many
    for name, value in plain.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-10, msg=name)
        assert torch.equal(actual[name], other[name])
