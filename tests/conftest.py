import pytest
import torch

from tests.ports import free_port


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def own_port(monkeypatch):
    """Where a strategy opens a process group, it would look for a port that another worker may find as well."""
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
