"""How each two methods that go together are tried: the families, and the settings of each method beside the other."""

from __future__ import annotations

from lit_accel.methods.compatibility import MST, MULTI_LEVEL, PLD, RANDOM_LTD, SBLD
from tests.composition.runs import LATE_STAGES, METHODS

FAMILIES = {
    (MULTI_LEVEL, PLD): ("gpt2-tied", "bert-mlm"),
    (MULTI_LEVEL, SBLD): ("gpt2-tied", "vit", "swin"),
    (MULTI_LEVEL, RANDOM_LTD): ("gpt2-tied", "llama-gqa"),
    (MULTI_LEVEL, MST): ("gpt2-tied", "deit-distilled"),
    (PLD, RANDOM_LTD): ("gpt2-tied", "deit-distilled"),
    (SBLD, RANDOM_LTD): ("gpt2-tied", "llama-gqa"),
    (PLD, MST): ("gpt2-tied", "bert-mlm"),
    (SBLD, MST): ("gpt2-tied", "vit"),
    (RANDOM_LTD, MST): ("gpt2-tied", "llama-gqa"),
    (MULTI_LEVEL, PLD, RANDOM_LTD): ("gpt2-tied", "llama-gqa"),
    (MULTI_LEVEL, SBLD, RANDOM_LTD, MST): ("gpt2-tied",),
}
CASES = [(titles, family) for titles, families in FAMILIES.items() for family in families]


def resumed_after(titles, family):
    """After which steps a run is resumed: right before a change of size or of sparsity, and within a phase."""
    if family != "gpt2-tied":
        return (8,)
    # Sizes change at 3 and 8; units at 3, 6 and 12, or at 9 and 14 where sizes do.
    return (3, 6, 14) if {MULTI_LEVEL, MST} <= set(titles) else (3, 6)


def settings(title, titles, family):
    """Return what is given to a method beside others."""
    given = {}
    if title == PLD and family == "bert-mlm":
        # Gentle, as its own warning says.
        given = {"theta": 0.7}
    if title == MULTI_LEVEL and family == "swin":
        # Half of the blocks of the second stage, whose first would be too short to drop from.
        given = {"levels": [{"width": 2, "depth": [1, 2]}]}
    if title == SBLD and family == "swin":
        given = {"kept": 0.85}
    if title == SBLD and family == "vit":
        given = {"estimator": "taylor"}
    if title == MST:
        given = {"stages": LATE_STAGES} if MULTI_LEVEL in titles else {}
        if family == "llama-gqa":
            given["ffn_units"], given["attention_units"] = "element", "dense"
    return given


def callbacks(titles, family="gpt2-tied"):
    return [METHODS[title](**settings(title, titles, family)) for title in titles]
