"""Arguments of layer and token dropping in Python: refused where they are given."""

from __future__ import annotations

import math

import pytest

from lit_accel import (
    ProgressiveLayerDropping,
    RandomLTD,
    SensitivityLayerDropping,
)
from tests.bad_input.harness import run_call
from tests.bad_input.rows import call

ROWS = [
    # Layer dropping
    call(
        "theta of zero",
        lambda: ProgressiveLayerDropping(theta=0),
        "theta is 0; it is a keep probability and must be in (0, 1].",
    ),
    call(
        "theta that is NaN",
        lambda: ProgressiveLayerDropping(theta=math.nan),
        "theta is nan; it is a keep probability and must be in (0, 1].",
    ),
    call(
        "theta that is text",
        lambda: ProgressiveLayerDropping(theta="half"),
        "theta is 'half'; it is a keep probability and must be in (0, 1].",
    ),
    call(
        "theta that is true",
        lambda: ProgressiveLayerDropping(theta=True),
        "theta is True; it is a keep probability and must be in (0, 1].",
    ),
    call(
        "gamma beside its factor",
        lambda: ProgressiveLayerDropping(gamma=0.1, gamma_factor=10),
        "gamma and gamma_factor are two ways to say the same; give one of them.",
    ),
    call("a rate of zero", lambda: ProgressiveLayerDropping(gamma=0), "gamma is 0; it is a rate and must be positive."),
    call(
        "an infinite rate",
        lambda: ProgressiveLayerDropping(gamma_factor=math.inf),
        "gamma_factor is inf; it is a rate and must be positive.",
    ),
    call(
        "a direction that is none",
        lambda: ProgressiveLayerDropping(direction="up"),
        "direction is 'up'; allowed are 'increasing', 'decreasing'.",
    ),
    call(
        "a release above the run",
        lambda: ProgressiveLayerDropping(release=1.5),
        "release is 1.5; it is a number of optimizer steps (int), or a share of the",
    ),
    call(
        "a release that is NaN",
        lambda: ProgressiveLayerDropping(release=math.nan),
        "release is nan; it is a number of optimizer steps (int), or a share of the",
    ),
    call(
        "pins that are a number",
        lambda: ProgressiveLayerDropping(pinned=3),
        "pinned is 3; it lists blocks by their indices, which are integers",
    ),
    call(
        "pins that are names",
        lambda: ProgressiveLayerDropping(pinned=["first"]),
        "pinned is ['first']; it lists blocks by their indices, which are integers",
    ),
    call(
        "a sampler that is none",
        lambda: ProgressiveLayerDropping(sampler="bernouli"),
        "sampler is 'bernouli'; allowed are 'systematic', 'bernoulli'. Did you mean",
    ),
    call(
        "a scale that is none",
        lambda: ProgressiveLayerDropping(scale="blocks"),
        "scale is 'blocks'; allowed are 'block', 'sublayer', 'none'. Did you",
    ),
    call("a seed that is text", lambda: ProgressiveLayerDropping(seed="one"), "seed is 'one'; it is a whole number."),
    call(
        "ranks compared never",
        lambda: ProgressiveLayerDropping(check_ranks_every=0),
        "check_ranks_every is 0; it is a number of steps, at least 1.",
    ),
    call(
        "a DeepSpeed section that is not there",
        lambda: ProgressiveLayerDropping.from_deepspeed({"zero": {}}),
        'No section "progressive_layer_drop" with "enabled", "theta" and "gamma"',
    ),
    call(
        "a DeepSpeed section without gamma",
        lambda: ProgressiveLayerDropping.from_deepspeed({"enabled": True, "theta": 0.5}),
        '"progressive_layer_drop" is enabled but lacks gamma; DeepSpeed needs both.',
    ),
    call("nothing kept", lambda: SensitivityLayerDropping(kept=0), "kept is 0; it is a share and must be in (0, 1]."),
    call(
        "more kept than there is",
        lambda: SensitivityLayerDropping(kept=1.2),
        "kept is 1.2; it is a share and must be in (0, 1].",
    ),
    call(
        "an estimator that is none",
        lambda: SensitivityLayerDropping(estimator="tailor"),
        "estimator is 'tailor'; allowed are 'ablate', 'taylor', 'ratio', 'cos'. Did",
    ),
    call(
        "all blocks protected",
        lambda: SensitivityLayerDropping(protected=1),
        "protected is 1; it is a share and must be in [0, 1).",
    ),
    call(
        "a mean that never moves",
        lambda: SensitivityLayerDropping(ema=1.0),
        "ema is 1.0; it is a share and must be in [0, 1).",
    ),
    call(
        "no batch to measure on",
        lambda: SensitivityLayerDropping(num_batches=0),
        "num_batches is 0; it is a number of batches of a measurement, at least 1.",
    ),
    call(
        "a negative warm-up",
        lambda: SensitivityLayerDropping(warmup=-1),
        "warmup is -1; it is a number of optimizer steps (int), or a share of the",
    ),
    call(
        "a measurement at no time",
        lambda: SensitivityLayerDropping(measure_every="often"),
        "measure_every is 'often'; it is a number of optimizer steps (int), or a",
    ),
    # Random-LTD
    call(
        "no token at first",
        lambda: RandomLTD(start_tokens=0),
        "start_tokens is 0; it is a number of tokens (int), at least 1, or a share",
    ),
    call(
        "more than the sequence at first",
        lambda: RandomLTD(start_tokens=1.5),
        "start_tokens is 1.5; it is a number of tokens (int), at least 1, or a",
    ),
    call(
        "start_tokens that is NaN",
        lambda: RandomLTD(start_tokens=math.nan),
        "start_tokens is nan; it is a number of tokens (int), at least 1, or a",
    ),
    call(
        "start_tokens that is text",
        lambda: RandomLTD(start_tokens="half"),
        "start_tokens is 'half'; it is a number of tokens (int), at least 1, or a",
    ),
    call(
        "no growth",
        lambda: RandomLTD(growth=0),
        "growth is 0: nothing would ever be dropped. Leave the callback out, or set",
    ),
    call(
        "growth that is true",
        lambda: RandomLTD(growth=True),
        "growth is True; it is a number of optimizer steps (int), or a share of the",
    ),
    call(
        "a quantum of zero",
        lambda: RandomLTD(quantum=0),
        "quantum is 0; kept tokens grow by multiples of it, so it is at least 1. 8",
    ),
    call(
        "a quantum that is a fraction",
        lambda: RandomLTD(quantum=2.5),
        "quantum is 2.5; kept tokens grow by multiples of it, so it is at least 1.",
    ),
    call(
        "a scope that is none",
        lambda: RandomLTD(scope="lyer"),
        "scope is 'lyer'; allowed are 'layer', 'route', 'input'. Did you mean",
    ),
    call(
        "pins of an input scope",
        lambda: RandomLTD(scope="input", pinned=[0]),
        'pinned has no meaning with scope="input", which drops tokens before the',
    ),
    call(
        "a negative prefix",
        lambda: RandomLTD(keep_prefix=-1),
        "keep_prefix is -1; it is a number of tokens, at least 0.",
    ),
    call(
        "one length",
        lambda: RandomLTD(max_lengths=1),
        "max_lengths is 1; the whole sequence is one length, so at least 2 are",
    ),
    call(
        "no token in a sequence",
        lambda: RandomLTD(num_tokens=0),
        "num_tokens is 0; it is a number of tokens, at least 1.",
    ),
    call(
        "a share under DeepSpeed's formula",
        lambda: RandomLTD(compat="deepspeed"),
        'compat="deepspeed" is its formula as it is: start_tokens is a number of',
    ),
    call(
        "another's formula",
        lambda: RandomLTD(compat="megatron"),
        "compat is 'megatron'; allowed are None and 'deepspeed'.",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_where_it_is_given(row, tmp_path, monkeypatch):
    run_call(row, tmp_path, monkeypatch)
