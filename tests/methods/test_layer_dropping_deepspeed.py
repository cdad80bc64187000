"""Configurations of DeepSpeed, translated or refused."""

from __future__ import annotations

import json

import pytest

from lit_accel import (
    ProgressiveLayerDropping,
)

SECTION = {"enabled": True, "theta": 0.6, "gamma": 0.002}
WHOLE = {"train_batch_size": 8, "progressive_layer_drop": SECTION}


@pytest.mark.parametrize("config", [WHOLE, SECTION], ids=["whole", "section"])
@pytest.mark.parametrize("form", ["dict", "path", "str"])
def test_a_configuration_of_deepspeed(tmp_path, config, form):
    if form != "dict":
        path = tmp_path / "ds_config.json"
        path.write_text(json.dumps(config))
        config = path if form == "path" else str(path)
    translated = ProgressiveLayerDropping.from_deepspeed(config)
    assert (translated.theta, translated.gamma) == (0.6, 0.002)
    assert (translated.convention, translated.sampler, translated.scale) == ("deepspeed", "bernoulli", "none")
    assert (translated.direction, translated.release, translated.needs_length) == ("increasing", 0, False)


def test_options_override_what_is_translated():
    translated = ProgressiveLayerDropping.from_deepspeed(WHOLE, theta=0.9, sampler="systematic", seed=3, pinned=[0])
    assert (translated.theta, translated.gamma, translated.seed, translated.pinned) == (0.9, 0.002, 3, [0])
    assert (translated.convention, translated.sampler) == ("deepspeed", "systematic")


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        ([1], ["mapping", "list"]),
        ({}, ['No section "progressive_layer_drop"', "enabled"]),
        ({"train_batch_size": 8}, ['No section "progressive_layer_drop"', "'train_batch_size'"]),
        ({"progressive_layer_drop": None}, ['No section "progressive_layer_drop"', "None"]),
        ({"progressive_layer_drop": {"theta": 0.5, "gamma": 1e-3}}, ["enabled", "'theta', 'gamma'"]),
        ({"progressive_layer_drop": {"enabled": False}}, ["not enabled", "leave the callback out"]),
        ({"enabled": True, "theta": 0.5}, ["lacks gamma", "needs both"]),
        ({"enabled": True}, ["lacks gamma, theta"]),
        ({**SECTION, "alpha": 1}, [r"unknown keys \['alpha'\]", "known are enabled, theta and gamma"]),
        ({**SECTION, "theta": 0}, ["theta is 0"]),
        ({**SECTION, "gamma": 0}, ["gamma is 0"]),
    ],
)
def test_configurations_that_cannot_be_translated(config, messages, tmp_path):
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    for given in (config, tmp_path / "ds_config.json"):
        with pytest.raises(ValueError, match=messages[0]) as refusal:
            ProgressiveLayerDropping.from_deepspeed(given)
        for message in messages[1:]:
            refusal.match(message)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ProgressiveLayerDropping.from_deepspeed(tmp_path / "nowhere.json")
