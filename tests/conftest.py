import gc

import pytest
import torch

from tests.ports import free_port


def pytest_collection_finish():
    """A change of size collects garbage: what was imported is none, and need not be searched each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Libraries look at the end for what was never freed."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def cuda_devices_are_counted_once():
    """Torch asks the driver again for each optimizer step and each fake tensor, until CUDA is in use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_cached_device_count", torch.cuda.device_count())
        yield


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
