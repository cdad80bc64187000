import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Token files of all rows: made once."""
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """A name that the hub might know is not asked for five times."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
