import pytest
import torch


@pytest.fixture(autouse=True)
def autocast_knows_the_meta_device(monkeypatch):
    """Older torch and transformers ask whether autocast is on for the meta device, and torch does not know it."""
    is_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: device != ("meta",) and is_enabled(*device))
