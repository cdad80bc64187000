"""The ranges of ``pyproject.toml`` are what ``make versions`` has run the fast tests with. Here files are read."""

from __future__ import annotations

import json

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from scripts.fast_tests import FAST_TESTS
from scripts.versions import (
    BOUNDED,
    ENDS,
    RESULTS,
    ROOT,
    bound,
    next_minor,
    project,
    requirements,
    supported_pythons,
)

RECORD = json.loads(RESULTS.read_text())
REQUIREMENTS = requirements()


def installed(end: str, name: str) -> Version:
    # Without a local part such as +cpu.
    return Version(Version(RECORD[end]["packages"][name]).public)


@pytest.mark.parametrize("end", ENDS)
def test_the_fast_tests_passed(end):
    tests = RECORD[end]["tests"]
    assert tests["failures"] == []
    assert tests["failed"] == 0
    assert tests["passed"] > 1000


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_the_floor_is_what_was_installed_at_the_low_end(name):
    assert bound(REQUIREMENTS[name].specifier, ">=") == installed("lowest", name)


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_what_was_installed_at_the_high_end_is_in_the_range(name):
    assert installed("highest", name) in REQUIREMENTS[name].specifier


@pytest.mark.parametrize("name", BOUNDED)
def test_the_range_ends_with_the_minor_version_that_passed(name):
    assert bound(REQUIREMENTS[name].specifier, "<") == next_minor(installed("highest", name))


def test_the_ends_are_those_of_the_supported_pythons():
    pythons = [".".join(RECORD[end]["python"].split(".")[:2]) for end in ENDS]
    assert pythons == [supported_pythons()[0], supported_pythons()[-1]]
    named = {each.rpartition(" ")[2] for each in project()["classifiers"] if each.startswith("Programming Language")}
    assert named == set(supported_pythons())


def test_compromised_releases_are_excluded():
    for version in ("2.6.2", "2.6.3"):
        assert version not in REQUIREMENTS["lightning"].specifier


def test_the_machine_that_is_lent_is_supported():
    """It has a GPU and these versions, and nothing can be installed on it."""
    assert "3.12" in SpecifierSet(project()["requires-python"])
    assert "2.11.0" in REQUIREMENTS["torch"].specifier
    assert "5.17.0" in REQUIREMENTS["transformers"].specifier


def test_the_fast_tests_exist():
    for test in FAST_TESTS:
        path, _, name = test.partition("::")
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), test
