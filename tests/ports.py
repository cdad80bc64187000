"""Ports that neither another process of the test run asks for nor the system takes for connections."""

from __future__ import annotations

import os

from scripts.soaking.ports import Ports

_STRETCH = 500
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
free_port = Ports(20_000 + _STRETCH * (_WORKER % 20), _STRETCH).free
