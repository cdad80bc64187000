"""Arguments of mixed sparsity training that cannot be, refused where they are given, with name and value."""

from __future__ import annotations

import math
import re

import pytest

from lit_accel import MixedSparsityMixin, MixedSparsityTraining
from tests.training import TinyModule

NAN, INF = math.nan, math.inf
SHARE = ["it is a share, from 0 to"]
COUNT = ["a whole number, at least 1"]
PAIR = ["each is a pair of a start and a sparsity"]
EMPTY = ["at 1 every layer would be empty", "at least 0 and below 1"]
START = ["a number of optimizer steps (int), or a share of the run (float from 0 to 1)"]
ORDER = ["stages are out of order", "List them by their starts"]
NEURONS = ["'neuron', 'element', 'block', 'dense', or \"N:M\" such as \"2:4\""]
HEADS = ["'head', 'element', 'block', 'dense', or \"N:M\" such as \"2:4\""]
OUTPUTS = ["it is one of 'element', 'dense'."]
KEPT = ["are kept. Keep at least 1 and fewer than all"]
PATTERNS = ["'window', 'strided', 'fixed', 'union', 'dense', None"]
PHASE = ["it is a pair: the first step that attends by the pattern and the first one after"]


def refused(arguments, messages):
    """The first of which says what was given; none leaves out what is allowed."""
    with pytest.raises(ValueError, match=re.escape(messages[0])) as refusal:
        MixedSparsityTraining(**arguments)
    for message in messages[1:]:
        refusal.match(re.escape(message))


def name(arguments):
    return ",".join(f"{key}={value}" for key, value in arguments.items())


def stages(*pairs):
    return {"stages": list(pairs)}


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (stages(), ["stages is empty", "at least one pair of a start and a sparsity, such as [[0, 0.0]]"]),
        (stages([0]), ["stages has the entry [0]", *PAIR]),
        (stages([0, 0.5, 1]), ["stages has the entry [0, 0.5, 1]", *PAIR]),
        (stages([0, 1]), ["stages has the sparsity 1:", *EMPTY]),
        (stages([0, 1.0]), ["stages has the sparsity 1.0:", *EMPTY]),
        (stages([0, 0.0], [0.1, -0.1]), ["stages has the sparsity -0.1", "at least 0 and below 1"]),
        (stages([0, NAN]), ["stages has the sparsity nan", "at least 0 and below 1"]),
        (stages([0, 90]), ["stages has the sparsity 90", "at least 0 and below 1"]),
        (stages([0, True]), ["stages has the sparsity True"]),
        (stages([5, 0.5]), ["The first of stages starts at 5; it starts at 0"]),
        (stages([0.1, 0.5]), ["The first of stages starts at 0.1; it starts at 0"]),
        (stages([0, 0.0], [-1, 0.5]), ["stages has the start -1", *START]),
        (stages([0, 0.0], [-0.1, 0.5]), ["stages has the start -0.1", *START]),
        (stages([0, 0.0], [1.5, 0.5]), ["stages has the start 1.5", *START]),
        (stages([0, 0.0], [INF, 0.5]), ["stages has the start inf", *START]),
        (stages([0, 0.0], [10, 0.5], [5, 0.9]), [*ORDER, "start at [0, 10, 5]"]),
        (stages([0.0, 0.0], [0.5, 0.5], [0.2, 0.9]), [*ORDER, "start at [0.0, 0.5, 0.2]"]),
        # Among others of another kind, between which nobody knows yet.
        (stages([0, 0.0], [10, 0.5], [0.9, 0.2], [5, 0.9]), [*ORDER, "start at [0, 10, 5]"]),
        ({"ffn_units": "head"}, ["ffn_units is 'head'", *NEURONS]),
        ({"ffn_units": "neurons"}, ["ffn_units is 'neurons'", *NEURONS]),
        ({"ffn_units": ""}, ["ffn_units is ''", *NEURONS]),
        ({"ffn_units": "2:4:8"}, ["ffn_units is '2:4:8'", *NEURONS]),
        ({"ffn_units": "4:4"}, ["ffn_units is '4:4': of 4 neighbours 4", *KEPT]),
        ({"ffn_units": "0:4"}, ["ffn_units is '0:4': of 4 neighbours 0", *KEPT]),
        ({"attention_units": "neuron"}, ["attention_units is 'neuron'", *HEADS]),
        ({"attention_units": "3:2"}, ["attention_units is '3:2': of 2 neighbours 3", *KEPT]),
        ({"head_units": "2:4"}, ["head_units is '2:4'", *OUTPUTS]),
        ({"head_units": "block"}, ["head_units is 'block'", *OUTPUTS]),
        ({"head_units": "head"}, ["head_units is 'head'", *OUTPUTS]),
        ({"update_every": 0}, ["update_every is 0", *COUNT]),
        ({"update_every": 1.5}, ["update_every is 1.5", *COUNT]),
        ({"update_every": True}, ["update_every is True", *COUNT]),
        ({"update_every": "100"}, ["update_every is '100'", *COUNT]),
        ({"update_every": None}, ["update_every is None", *COUNT]),
        ({"drop_fraction": 1.0}, ["drop_fraction is 1.0", *SHARE, "below 1"]),
        ({"drop_fraction": -0.1}, ["drop_fraction is -0.1", *SHARE]),
        ({"drop_fraction": NAN}, ["drop_fraction is nan", *SHARE]),
        ({"gradient_share": 1.1}, ["gradient_share is 1.1", *SHARE]),
        ({"gradient_share": -0.1}, ["gradient_share is -0.1", *SHARE]),
        ({"gradient_share": NAN}, ["gradient_share is nan", *SHARE]),
        ({"distribution": "ERK"}, ["distribution is 'ERK'", "'uniform', 'er', 'erk'"]),
        ({"distribution": None, "execution": "sparse"}, ["execution is 'sparse'", "'compact', 'masked'"]),
        ({"execution": None}, ["execution is None", "'compact', 'masked'"]),
        ({"quantum": 0}, ["quantum is 0", *COUNT]),
        ({"quantum": 2.0}, ["quantum is 2.0", *COUNT]),
        ({"block_size": -64}, ["block_size is -64", *COUNT]),
        ({"block_size": "64"}, ["block_size is '64'", *COUNT]),
        ({"attention_pattern": "local"}, ["attention_pattern is 'local'", *PATTERNS]),
        ({"attention_window": 0}, ["attention_window is 0", *COUNT]),
        ({"attention_window": None}, ["attention_window is None", *COUNT]),
        ({"attention_phase": (1,)}, ["attention_phase is [1]", *PHASE]),
        ({"attention_phase": (0, 1, 2)}, ["attention_phase is [0, 1, 2]", *PHASE]),
        ({"attention_phase": (-1, 5)}, ["attention_phase is [-1, 5]", *PHASE]),
        ({"preset": "paper"}, ["preset is 'paper'", "'paper_4x', or None"]),
        ({"preset": "paper_4x", "head_units": "block"}, ["head_units is 'block'", *OUTPUTS]),
    ],
    ids=lambda value: name(value) if isinstance(value, dict) else "",
)
def test_values_that_are_not_allowed(arguments, messages):
    refused(arguments, messages)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"stages": 5}, ["stages is 5"]),
        (stages(0, 0.5), ["stages has the entry 0", *PAIR]),
        (stages("ab"), ["stages has the"]),
        (stages([0, "a"]), ["stages has the sparsity", "at least 0 and below 1"]),
        (stages([0, None]), ["stages has the sparsity", "at least 0 and below 1"]),
        (stages(["0", 0.5]), ["stages has the start", *START]),
        (stages([0, 0.0], [NAN, 0.5]), ["stages has the start nan", *START]),
        ({"ffn_units": 3}, ["ffn_units is 3", *NEURONS]),
        ({"attention_units": ["head"]}, ["attention_units is ['head']", *HEADS]),
        ({"head_units": 1}, ["head_units is 1", *OUTPUTS]),
        ({"drop_fraction": "0.3"}, ["drop_fraction is '0.3'", *SHARE]),
        ({"drop_fraction": None}, ["drop_fraction is None", *SHARE]),
        ({"gradient_share": "a"}, ["gradient_share is 'a'", *SHARE]),
        ({"attention_phase": None}, ["attention_phase is None", *PHASE]),
        ({"attention_phase": 5}, ["attention_phase is 5", *PHASE]),
        ({"attention_phase": ("a", "b")}, ["attention_phase is ['a', 'b']", *PHASE]),
        ({"preset": ["paper_4x"]}, ["preset is ['paper_4x']", "'paper_4x', or None"]),
    ],
    ids=lambda value: name(value) if isinstance(value, dict) else "",
)
def test_values_of_another_type(arguments, messages):
    refused(arguments, messages)


@pytest.mark.parametrize("seed", ["a", 1.5, None])
def test_a_seed_that_is_no_integer(seed):
    """Which nobody would see before the first update, in the midst of training."""
    refused({"seed": seed}, [f"seed is {seed!r}"])


@pytest.mark.parametrize("phase", [(0.5, 1.5), (NAN, 1.0), (0.5, INF)])
def test_a_phase_of_attention_that_is_no_part_of_a_run(phase):
    refused({"attention_phase": phase}, [f"attention_phase is {list(phase)}", *PHASE])


@pytest.mark.parametrize("phase", [(0.8, 0.1), (20, 10)])
def test_a_phase_of_attention_that_ends_before_it_begins(phase):
    """As stages that are out of order are, and not taken for one that never begins."""
    refused({"attention_phase": phase}, [f"attention_phase is {list(phase)}"])


@pytest.mark.parametrize(
    "arguments",
    [
        stages((0, 0.0)),
        stages([0.0, 0.5], [1.0, 0.0]),
        # One of these may well be the later one.
        stages((0, 0.0), (100, 0.5), (0.5, 0.0)),
        {"drop_fraction": 0, "gradient_share": 1},
        {"ffn_units": "1:2", "attention_units": "15:16", "head_units": "element"},
        {"attention_phase": (0, 0)},
        {"attention_phase": (5, 0.5)},
        {"seed": -1},
        {"preset": "paper_4x", "ffn_units": "neuron"},
    ],
    ids=name,
)
def test_values_at_the_edge_of_what_is_allowed(arguments):
    MixedSparsityTraining(**arguments)


def test_the_mixin_refuses_as_the_callback_does():
    class Module(MixedSparsityMixin, TinyModule):
        pass

    with pytest.raises(ValueError, match="quantum is 0"):
        Module(mst_quantum=0)
    with pytest.raises(ValueError, match="stages is empty"):
        Module(mst_stages=[])
