"""Run the fast tests against the lowest and the highest versions that ``pyproject.toml`` allows.

The lowest end has the oldest Python and the floor of every range; the highest end has the newest Python and what the
resolver gives within the ranges. Both are read from ``pyproject.toml``, and ``tests/test_versions.py`` holds its
ranges against the file that this script writes. So a range is widened by editing it there, and running this::

    make versions                                    # both ends; an environment is reused while its pins are the same
    python -m scripts.versions --ends highest        # one of them

The interpreters ``python3.N`` of both ends have to be on the path.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts import provenance
from scripts.fast_tests import FAST_TESTS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results" / "versions.json"
ENVIRONMENTS = ROOT / ".cache" / "versions"
ENDS = ("lowest", "highest")
# What the tests need; linters and type checkers belong to no range that a test could vouch for.
EXTRA = "test"
# The libraries whose insides the package looks into: a new minor version of theirs has to be seen before it is allowed.
BOUNDED = ("torch", "lightning", "transformers", "timm")


@cache
def project() -> dict[str, Any]:
    """Return the table ``project`` of ``pyproject.toml``."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(extra: str = EXTRA) -> dict[str, Requirement]:
    """Return what the package and an extra of it require, by name, with the extras that this one refers to."""
    found = {}
    for text in [*project()["dependencies"], *project()["optional-dependencies"][extra]]:
        requirement = Requirement(text)
        if requirement.name == project()["name"]:
            for other in requirement.extras:
                found.update(requirements(other))
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def bound(ranges: SpecifierSet, operator: str) -> Version:
    """Return the version that stands beside ``>=`` or ``<`` in a range.

    Raises:
        ValueError: Unless there is exactly one.
    """
    found = [each.version for each in ranges if each.operator == operator]
    if len(found) != 1:
        raise ValueError(f"A range has one {operator!r}; {str(ranges)!r} has {len(found)}.")
    return Version(found[0])


def next_minor(version: Version) -> Version:
    """Return the first version that is not of the same minor version."""
    return Version(f"{version.major}.{version.minor + 1}")


def supported_pythons() -> list[str]:
    """Return the minor versions of Python that the package supports, oldest first."""
    ranges = SpecifierSet(project()["requires-python"])
    low, high = bound(ranges, ">="), bound(ranges, "<")
    return [f"{low.major}.{minor}" for minor in range(low.minor, high.minor)]


def interpreter(python: str) -> str:
    """Return where a Python is.

    Raises:
        SystemExit: If there is none on the path.
    """
    command = f"python{python}"
    if shutil.which(command):
        # pyenv has a stub on the path for every Python that it knows; this tells it which one is wanted.
        environment = {**os.environ, "PYENV_VERSION": python}
        ask = [command, "-c", "import sys; print(sys.executable)"]
        started = subprocess.run(ask, env=environment, stdout=subprocess.PIPE, text=True)
        if started.returncode == 0:
            return started.stdout.strip()
    raise SystemExit(f"There is no {command} on the path. The ends have the oldest and the newest supported Python.")


@dataclass(frozen=True)
class Environment:
    """The virtual environment of one end.

    Args:
        end: Which end.
    """

    end: str

    @property
    def folder(self) -> Path:
        """Where it is."""
        return ENVIRONMENTS / self.end

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.folder / "bin" / "python")

    def pins(self) -> list[str]:
        """Return what is pinned besides the ranges: all floors, at the lowest end."""
        if self.end == "highest":
            return []
        return [f"{name}=={bound(each.specifier, '>=')}" for name, each in requirements().items()]

    def install(self) -> None:
        """Make it, unless the one that is there was made from the same ranges and pins; then bring it up to date."""
        base = interpreter(supported_pythons()[0 if self.end == "lowest" else -1])
        made_from = json.dumps([base, sorted(map(str, requirements().values())), self.pins()], indent=1)
        stamp = self.folder / "made_from.json"
        if not stamp.exists() or stamp.read_text() != made_from:
            shutil.rmtree(self.folder, ignore_errors=True)
            subprocess.run([base, "-m", "venv", str(self.folder)], check=True)
            self._pip("install", "--quiet", "--upgrade", "pip")
        # Eager: also what is required indirectly is what the resolver gives today, as in a new environment. Where pins
        # contradict each other, pip is to say so and not to try ever older packages that it would have to build.
        options = ("--quiet", "--upgrade", "--upgrade-strategy", "eager", "--only-binary", ":all:")
        self._pip("install", *options, *self.pins(), "--editable", f".[{EXTRA}]")
        stamp.write_text(made_from)

    def packages(self) -> dict[str, str]:
        """Return the version of everything that is installed, but for the package itself."""
        listed = json.loads(self._pip("list", "--format", "json", "--exclude-editable"))
        return {canonicalize_name(each["name"]): each["version"] for each in listed}

    def test(self) -> dict[str, Any]:
        """Run the fast tests and return how many there were of each outcome, and which failed."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        options = ("-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}")
        command = [self.python, "-m", "pytest", *options, *FAST_TESTS]
        ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        # 1 is for tests that failed; anything else, and the report would be of a part of them.
        if ended not in (0, 1):
            raise SystemExit(f"pytest ended with {ended} at the {self.end} end.")
        return outcomes(ElementTree.parse(report).getroot())

    def _pip(self, *arguments: str) -> str:
        return printed(self.python, "-m", "pip", "--disable-pip-version-check", *arguments)


def outcomes(report: ElementTree.Element) -> dict[str, Any]:
    """Return what a JUnit report says: numbers of tests and the names of those that failed."""
    cases = list(report.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [f"{case.get('file')}::{case.get('name')}" for case in failed],
    }


def printed(*command: str) -> str:
    """Return what a command prints, run in the repository."""
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def run(end: str, commit: str | None) -> dict[str, Any]:
    """Install one end, test it, and return what is to be said of it."""
    environment = Environment(end)
    environment.install()
    python = "import platform; print(platform.python_version())"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "python": printed(environment.python, "-c", python),
        "tests": environment.test(),
        "packages": environment.packages(),
    }


def table(record: dict[str, Any]) -> str:
    """Return what the README says of the two ends."""
    low, high = (record[end] for end in ENDS)
    lines = [f"| Python | {project()['requires-python']} | {low['python']} | {high['python']} |"]
    for name in BOUNDED:
        versions = (end["packages"][name] for end in (low, high))
        lines.append(f"| {name} | {ordered(requirements()[name].specifier)} | {' | '.join(versions)} |")
    counts = " | ".join(f"{end['tests']['passed']} passed, {end['date']}" for end in (low, high))
    return "\n".join(
        [
            "| | supported | lowest that passed | highest that passed |",
            "| --- | --- | --- | --- |",
            *lines,
            f"| fast tests | | {counts} |",
            "",
            "At the lowest end every other dependency was at the floor of its range, too. `make versions`.",
        ]
    )


def ordered(ranges: SpecifierSet) -> str:
    """Return a range with its floor first; the library returns it in any order."""
    return ",".join(sorted(map(str, ranges), reverse=True))


def main() -> None:
    """Run the ends that were asked for, and keep what is known of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=ENDS)
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    ends = parser.parse_args().ends
    # Now: what the first end writes is no change of what the second one tests.
    tested = provenance.commit()
    for end in ends:
        record[end] = run(end, tested)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{end}: {record[end]['tests']}")
    if failed := [end for end in ends if record[end]["tests"]["failed"]]:
        raise SystemExit(f"Tests failed at the end: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
