"""Double precision all the way: the RMS norms of Hugging Face compute in single precision whatever they are given."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.methods.dropping import Graphs
from tests.pictures import pictures_are_drawn, pictures_are_not_drawn  # noqa: F401


def _in_double(original):
    def forward(self, hidden_states):
        if hidden_states.dtype != torch.float64:
            return original(self, hidden_states)
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    return forward


@pytest.fixture(autouse=True, scope="module")
def rms_norms_in_double():
    with pytest.MonkeyPatch.context() as patch:
        for package, prefix in (
            ("llama", "Llama"),
            ("mistral", "Mistral"),
            ("qwen2", "Qwen2"),
            ("qwen3", "Qwen3"),
        ):
            module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
            norm = getattr(module, f"{prefix}RMSNorm")
            patch.setattr(norm, "forward", _in_double(norm.forward))
        yield


@pytest.fixture
def graphs():
    """A backend of torch.compile that counts graphs, and no graph of an earlier test."""
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()
