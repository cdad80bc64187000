"""Settings with a name."""

from __future__ import annotations

from typing import Any, Literal

PresetName = Literal["paper_4x"]
DEFAULTS: dict[str, Any] = {
    "ffn_units": "neuron",
    "attention_units": "head",
    "head_units": "dense",
    "distribution": "uniform",
    "attention_pattern": "dense",
}
PRESETS: dict[PresetName, dict[str, Any]] = {
    # What the paper masks: all matrices by entries, the tied head and with it the embeddings too, and attention to near
    # and to strided tokens while sparsity is at its highest. Its own spans and sparsities are unknown; the default
    # stages reach its factor of four by its way of counting.
    "paper_4x": {
        "ffn_units": "element",
        "attention_units": "element",
        "head_units": "element",
        "distribution": "er",
        "attention_pattern": "union",
    }
}
