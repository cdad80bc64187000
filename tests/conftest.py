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


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The models are tiny: threads would only wait for each other. Sums depend on it too."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # What starts processes would have set the number anew.
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def own_port(monkeypatch):
    """Where a strategy opens a process group, it would look for a port that another worker may find as well."""
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
