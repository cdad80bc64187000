"""Fixtures for folders of tests in which pictures are by-products: to draw one takes longer than most of their runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

_SAVE = Figure.savefig


@pytest.fixture(autouse=True, scope="module")
def pictures_are_not_drawn():
    """A figure is made as ever; its file stays empty.

    Of a module, since a folder without ``__init__.py`` is no package to pytest, which would end the fixture with the
    whole session.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())
        yield


@pytest.fixture
def pictures_are_drawn(monkeypatch):
    """Of a test that looks at one."""
    monkeypatch.setattr(Figure, "savefig", _SAVE)
