"""A change of size collects garbage: what was imported is none, and need not be searched each time."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
