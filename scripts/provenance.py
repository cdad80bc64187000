"""Where a number comes from: the command, the commit, the versions and the machine, for every result file."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("lit-accel", "torch", "lightning", "transformers", "timm", "torchmetrics")
# What can change a number. Results lie among the scripts, and to write one is no change of what is measured.
_SOURCES = (":/lit_accel", ":/strategies", ":(top,glob)scripts/**/*.py")


def provenance() -> dict[str, Any]:
    """Return the command, the commit, the versions and the machine of this process, as primitives."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": shlex.join(["python", *_program(), *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions,
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def commit() -> str | None:
    """Return the commit that runs, with ``-dirty`` if sources differ from it; ``None`` outside of a git checkout."""
    name = _git("rev-parse", "--short=12", "HEAD")
    if not name:
        return None
    return f"{name}-dirty" if _git("status", "--porcelain", "--", *_SOURCES) else name


def device(machine: dict[str, Any]) -> str:
    """Return what a number was measured on, in words.

    Args:
        machine: The machine of its provenance.
    """
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return machine["gpu"] or f"{threads} of an {machine['processor']}"


def _program() -> list[str]:
    """Return what stands behind ``python``, so that the command can be given again."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    if specification is None:
        return [Path(sys.argv[0]).name]
    return ["-m", specification.name.removesuffix(".__main__")]


def _git(*arguments: str) -> str:
    try:
        # From the repository, wherever this is run.
        found = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
