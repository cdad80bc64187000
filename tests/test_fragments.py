"""The methods' fragments: all arguments are there, as the defaults are, and none stands in the way of another."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

import lit_accel
from lit_accel import MixedSparsityTraining, ProgressiveLayerDropping
from lit_accel.methods.mixed_sparsity.presets import PRESETS

FOLDER = Path(__file__).parents[1] / "configs" / "method"
FRAGMENTS = sorted(FOLDER.glob("*.yaml"))


def callback_of(path):
    """Return the method's class and the arguments that a fragment gives."""
    callbacks = yaml.safe_load(path.read_text())["trainer"]["callbacks+"]
    (given,) = (each for each in callbacks if each["class_path"] != "lit_accel.ComputeLedger")
    return getattr(lit_accel, given["class_path"].removeprefix("lit_accel.")), given["init_args"]


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_every_argument_is_there_to_be_changed(path):
    method, given = callback_of(path)
    commented = set(re.findall(r"^ +# (\w+):", path.read_text(), re.MULTILINE))
    assert given.keys() | commented == inspect.signature(method).parameters.keys()


def test_a_preset_on_the_command_line_chooses_what_the_fragment_leaves_open():
    _, given = callback_of(FOLDER / "mixed_sparsity.yaml")
    method = MixedSparsityTraining(**{**given, "preset": "paper_4x"})
    assert {name: getattr(method, name) for name in PRESETS["paper_4x"]} == PRESETS["paper_4x"]


def test_a_preset_that_nothing_is_left_for_is_warned_of():
    with pytest.warns(UserWarning, match="preset='paper_4x' is ignored"):
        MixedSparsityTraining(
            preset="paper_4x",
            ffn_units="neuron",
            attention_units="head",
            head_units="dense",
            distribution="uniform",
            attention_pattern="dense",
        )


def test_gamma_on_the_command_line_takes_the_place_of_the_factor():
    _, given = callback_of(FOLDER / "progressive_layer_dropping.yaml")
    assert ProgressiveLayerDropping(**{**given, "gamma": 0.01}).gamma == 0.01
