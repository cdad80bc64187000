"""The tables of arguments in the cards have every argument of the classes, with its default."""

from __future__ import annotations

import inspect
import re
from ast import literal_eval
from pathlib import Path

import pytest

from lit_accel import MultiLevelTraining, ProgressiveLayerDropping, SensitivityLayerDropping

METHODS = Path(__file__).parents[1] / "lit_accel" / "methods"


def defaults(kind):
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


def rows(card):
    """The arguments of a card's tables, with what stands as their defaults."""
    for table in re.findall(r"^\| argument \| default \|.*\n\|.*\n((?:\|.*\n)+)", card.read_text(), re.MULTILINE):
        for line in table.splitlines():
            named, default, _ = (cell.strip() for cell in line.strip("|").split("|", 2))
            yield from ((name, default) for name in re.findall(r"`(\w+)`", named))


@pytest.mark.parametrize(
    ("card", "kinds"),
    [
        ("multilevel", [MultiLevelTraining]),
        ("layer_dropping", [ProgressiveLayerDropping, SensitivityLayerDropping]),
    ],
)
def test_the_tables_of_a_card(card, kinds):
    told = dict(rows(METHODS / card / "README.md"))
    taken = [defaults(kind) for kind in kinds]
    assert told.keys() == set().union(*taken)
    compared = 0
    for name, default in told.items():
        value = re.fullmatch(r"`(\w+)`|(-?[\d.]+)", default)
        if value is None:
            continue  # words
        value = value[1] or literal_eval(value[2])
        known = [each[name] for each in taken if each.get(name) is not None]
        assert all(each == value for each in known), name
        compared += len(known)
    assert compared >= 4
