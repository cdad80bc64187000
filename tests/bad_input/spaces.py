"""Whole configurations, sensible and not, for hypothesis to draw from."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

# What no argument wants, beside what some do.
_ODD = st.sampled_from([0, -1, 1, 2, 3, 30, 0.0, 0.5, 1.0, 1.5, -0.5, float("nan"), float("inf"), True, None, "x", []])


def _either(sensible: Any) -> st.SearchStrategy[Any]:
    """Sensible values three times out of four."""
    return st.integers(0, 3).flatmap(lambda draw: _ODD if draw == 0 else sensible)


def _some(**arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some arguments of a class; what is left out has its default."""
    return st.fixed_dictionaries({}, optional={name: _either(values) for name, values in arguments.items()})


_duration = st.one_of(st.integers(0, 5), st.floats(0, 1))
_level = st.fixed_dictionaries(
    {"width": _either(st.sampled_from([1, 2, 4])), "depth": _either(st.sampled_from([1, 2, 4]))},
    optional={"merge_batches": _either(st.sampled_from([1, 2]))},
)
_phase = st.fixed_dictionaries(
    {"level": _either(st.integers(0, 2))},
    optional={"length": _either(_duration), "lr_scale": _either(st.floats(0.1, 2))},
)

METHODS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "MultiLevelTraining": _some(
        levels=st.lists(_level, max_size=2),
        phases=st.lists(_phase, max_size=4),
        preset=st.sampled_from(["correction", "paper", "exact"]),
        alpha=st.floats(0, 1),
        depth_mode=st.sampled_from(["avg", "ode", "zero"]),
        optimizer_state=st.sampled_from(["reset", "project", "second_moment"]),
        learning_rate=st.sampled_from(["continue", "rewarm", "paper"]),
        start_level=st.integers(0, 2),
    ),
    "ProgressiveLayerDropping": _some(
        theta=st.floats(0.1, 1),
        gamma=st.floats(0.01, 1),
        convention=st.sampled_from(["paper", "deepspeed", "timm"]),
        direction=st.sampled_from(["increasing", "decreasing"]),
        release=_duration,
        pinned=st.lists(st.integers(-6, 6), max_size=3),
        sampler=st.sampled_from(["systematic", "bernoulli"]),
        scale=st.sampled_from(["block", "sublayer", "none"]),
    ),
    "SensitivityLayerDropping": _some(
        kept=st.floats(0.1, 1),
        estimator=st.sampled_from(["ablate", "taylor", "ratio", "cos"]),
        allocation=st.sampled_from(["sensitivity", "depth", "uniform"]),
        warmup=_duration,
        ramp=_duration,
        release=_duration,
        min_keep=st.floats(0.1, 1),
        protected=st.floats(0, 0.9),
        measure_every=_duration,
        num_batches=st.integers(1, 3),
        max_overhead=st.floats(0.01, 1),
        pinned=st.lists(st.integers(-6, 6), max_size=3),
    ),
    "RandomLTD": _some(
        start_tokens=st.one_of(st.integers(1, 8), st.floats(0.1, 1)),
        growth=_duration,
        quantum=st.integers(1, 8),
        pinned=st.lists(st.integers(-6, 6), max_size=3),
        scope=st.sampled_from(["layer", "route", "input"]),
        keep_prefix=st.integers(0, 3),
        max_lengths=st.integers(2, 4),
        num_tokens=st.integers(4, 12),
        compat=st.sampled_from([None, "deepspeed"]),
    ),
    "MixedSparsityTraining": _some(
        stages=st.lists(st.tuples(_duration, st.floats(0, 0.99)), max_size=4),
        ffn_units=st.sampled_from(["neuron", "element", "block", "2:4", "dense"]),
        attention_units=st.sampled_from(["head", "element", "block", "1:2", "dense"]),
        head_units=st.sampled_from(["element", "dense"]),
        update_every=st.integers(1, 3),
        drop_fraction=st.floats(0, 0.9),
        gradient_share=st.floats(0, 1),
        distribution=st.sampled_from(["uniform", "er", "erk"]),
        quantum=st.integers(1, 8),
        block_size=st.sampled_from([2, 4, 8]),
        attention_pattern=st.sampled_from(["window", "strided", "fixed", "union", "dense"]),
        attention_window=st.integers(1, 8),
        execution=st.sampled_from(["compact", "masked"]),
        preset=st.sampled_from([None, "paper_4x"]),
    ),
    "Composition": _some(
        dense_warmup=_duration,
        dense_tail=_duration,
        drop_levels=st.lists(st.integers(0, 2), max_size=2),
        schedules=st.sampled_from(["run", "level"]),
        least_cost=st.floats(0, 0.9),
    ),
}

_sizes = {
    "blocks": _either(st.sampled_from([1, 2, 4, 6])),
    "width": _either(st.sampled_from([8, 12, 16])),
    "heads": _either(st.sampled_from([1, 2, 4])),
}

CONFIGURATIONS = st.fixed_dictionaries(
    {
        "family": st.sampled_from(["gpt2", "bert", "vit"]),
        "sizes": st.fixed_dictionaries(_sizes),
        "methods": st.lists(
            st.sampled_from(sorted(METHODS)).flatmap(lambda name: st.tuples(st.just(name), METHODS[name])),
            max_size=3,
            unique_by=lambda chosen: chosen[0],
        ),
        "data": _some(block_size=st.sampled_from([4, 8, 16]), batch_size=st.integers(1, 4)),
        "trainer": st.fixed_dictionaries(
            {"max_steps": st.sampled_from([2, 3]), "strategy": st.sampled_from(["resizable", "resizable", "auto"])},
            optional={
                "accumulate_grad_batches": st.sampled_from([1, 2]),
                "gradient_clip_val": st.sampled_from([0.5, 1]),
            },
        ),
        "optimizer": st.sampled_from(["AdamW", "AdamW", "SGD", "Adagrad", "RMSprop"]),
    }
)
"""Models, methods, data and trainers."""
