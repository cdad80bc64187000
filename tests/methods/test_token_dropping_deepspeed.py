"""The random-LTD section of DeepSpeed configurations, translated or refused."""

from __future__ import annotations

import copy
import json
import math

import pytest

from lit_accel import RandomLTD

SECTION = {
    "enabled": True,
    "total_layer_num": 12,
    "random_ltd_layer_num": 10,
    "random_ltd_layer_id": list(range(1, 11)),
    "model_mask_name": "attention_mask",
    "model_type": "decoder",
    "hidden_state_order": "batch_seq_dim",
    "random_ltd_schedule": {
        "min_value": 128,
        "max_value": 1024,
        "schedule_type": "fixed_linear",
        "schedule_config": {"require_steps": 400, "seq_per_step": 8},
    },
}
ROUTING = {"enabled": True, "random_ltd": SECTION}
WHOLE = {"train_batch_size": 4, "data_efficiency": {"enabled": True, "seed": 1234, "data_routing": ROUTING}}


def changed(**values):
    """Return the section with other entries; ``None`` leaves one out."""
    section = copy.deepcopy(SECTION)
    for name, value in values.items():
        into = next(
            part
            for part in (section, section["random_ltd_schedule"], section["random_ltd_schedule"]["schedule_config"])
            if name in part or (part is section and name not in str(section))
        )
        into[name] = value
        if value is None:
            del into[name]
    return section


@pytest.mark.parametrize(("config", "seed"), [(WHOLE, 1234), (SECTION, 0)], ids=["whole", "section"])
@pytest.mark.parametrize("form", ["dict", "path", "str"])
def test_a_configuration_of_deepspeed(tmp_path, config, seed, form):
    if form != "dict":
        path = tmp_path / "ds_config.json"
        path.write_text(json.dumps(config))
        config = path if form == "path" else str(path)
    translated = RandomLTD.from_deepspeed(config)
    assert (translated.start_tokens, translated.growth, translated.quantum) == (128, 400, 8)
    assert (translated.num_tokens, translated.pinned, translated.compat) == (1024, [0, 11], "deepspeed")
    assert (translated.scope, translated.keep_prefix, translated.max_lengths) == ("layer", None, None)
    assert translated.seed == seed


@pytest.mark.parametrize(
    ("start", "length", "growth", "quantum"), [(32, 197, 391, 8), (128, 1024, 400, 8), (66, 197, 80, 16)]
)
def test_its_schedule_is_the_formula_of_deepspeed(start, length, growth, quantum):
    section = changed(min_value=start, max_value=length, require_steps=growth, seq_per_step=quantum)
    schedule = RandomLTD.from_deepspeed(section)._schedule_of(growth)
    for step in range(2 * growth):
        value = math.floor(step / growth * (length - start) + start)
        assert schedule.kept_tokens(step, length) == min(value - value % quantum, length)


def test_blocks_that_are_not_named_are_pinned():
    some = changed(random_ltd_layer_id=[2, 5, 6], random_ltd_layer_num=3, total_layer_num=8)
    assert RandomLTD.from_deepspeed(some).pinned == [0, 1, 3, 4, 7]
    every = changed(random_ltd_layer_id=list(range(12)), random_ltd_layer_num=12)
    assert RandomLTD.from_deepspeed(every).pinned == []


def test_options_override_what_is_translated():
    translated = RandomLTD.from_deepspeed(WHOLE, start_tokens=0.5, compat=None, growth=0.7, seed=3)
    assert (translated.start_tokens, translated.compat, translated.growth, translated.seed) == (0.5, None, 0.7, 3)
    assert (translated.quantum, translated.num_tokens, translated.pinned) == (8, 1024, [0, 11])


def test_a_seed_may_stand_on_any_level():
    config = copy.deepcopy(WHOLE)
    config["data_efficiency"]["data_routing"]["seed"] = 7
    assert RandomLTD.from_deepspeed(config).seed == 7
    del config["data_efficiency"]["seed"], config["data_efficiency"]["data_routing"]["seed"]
    assert RandomLTD.from_deepspeed(config).seed == 0


def test_a_schedule_of_learning_rates_that_is_off_may_stand_there():
    assert RandomLTD.from_deepspeed(changed(layer_token_lr_schedule={"enabled": False})).growth == 400


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        ([1], ["mapping", "list"]),
        ({}, ['No section "data_efficiency.data_routing.random_ltd"', r"\[\]"]),
        ({"train_batch_size": 8}, ["No section", "'train_batch_size'"]),
        ({"data_efficiency": {"data_routing": {}}}, ["No section"]),
        (changed(enabled=False), ["is not enabled", "leave the callback out"]),
        (changed(enabled=None), ["is not enabled"]),
        (changed(random_ltd_layers=[1]), [r"unknown keys \['random_ltd_layers'\]"]),
        (
            changed(layer_token_lr_schedule={"enabled": True, "total_layer_tokens": 10}),
            ["layer_token_lr_schedule", "never released", "lit_accel.LayerTokenLR"],
        ),
        (changed(schedule_type="fixed_root"), ["schedule_type is 'fixed_root'", "fixed_linear"]),
        (changed(min_value=None), ["lacks 'min_value'"]),
        (changed(max_value=None), ["lacks 'max_value'"]),
        (changed(schedule_config=None), ["lacks 'schedule_config'"]),
        (changed(require_steps=None), ["lacks 'require_steps'"]),
        (changed(seq_per_step=None), ["lacks 'seq_per_step'"]),
        (changed(total_layer_num=None), ["lacks 'total_layer_num'"]),
        (changed(random_ltd_layer_id=None), ["lacks 'random_ltd_layer_id'"]),
        (changed(min_value=8, seq_per_step=16), ["rounds start_tokens 8 down", "Raise start_tokens"]),
        (changed(require_steps=0), ["growth is 0"]),
    ],
)
def test_configurations_that_cannot_be_translated(config, messages, tmp_path):
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    for given in (config, tmp_path / "ds_config.json"):
        with pytest.raises(ValueError, match=messages[0]) as refusal:
            RandomLTD.from_deepspeed(given)
        for message in messages[1:]:
            refusal.match(message)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (changed(random_ltd_layer_id=[1, 12], random_ltd_layer_num=2), "12"),
        (changed(random_ltd_layer_num=9), "random_ltd_layer_num"),
    ],
    ids=["no such layer", "another number"],
)
def test_layers_that_contradict_each_other_are_refused(section, message):
    """DeepSpeed refuses them, too: it would convert other blocks than were meant."""
    with pytest.raises(ValueError, match=message):
        RandomLTD.from_deepspeed(section)


def test_a_section_without_content_is_refused_with_a_message():
    with pytest.raises(ValueError, match="No section"):
        RandomLTD.from_deepspeed({"data_efficiency": None})


@pytest.mark.parametrize("name", ["data_efficiency", "data_routing"])
def test_what_is_switched_off_further_out_is_not_enabled(name):
    config = copy.deepcopy(WHOLE)
    outer = config["data_efficiency"]
    (outer if name == "data_efficiency" else outer["data_routing"])["enabled"] = False
    with pytest.raises(ValueError, match=f'"{name}".*is not enabled'):
        RandomLTD.from_deepspeed(config)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        RandomLTD.from_deepspeed(tmp_path / "nowhere.json")
