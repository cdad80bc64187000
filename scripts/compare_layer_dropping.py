"""A first look at what layer dropping is worth: a small GPT of 12 blocks, dense and with blocks dropped.

Methods train as many steps as the longest dense run and cost less; beside them stand the controls that cost as little:
dense training for fewer steps, with its own completed learning-rate decay, and a shallower dense model. Runs are
appended to ``scripts/results/layer_dropping_quality.jsonl`` as they finish; calling the script again goes on where it
stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_accel import ProgressiveLayerDropping, SensitivityLayerDropping
from scripts.comparison import Arm, Comparison
from scripts.small_gpt import Setup

DENSE = "dense"
# The defaults when these runs were made; the study in docs/results has changed them.
_SBLD: dict[str, Any] = {"warmup": 0.05, "scale": "block"}
_PLD: dict[str, Any] = {"scale": "block"}
COMPARISON = Comparison(
    title="Held-out loss of a small GPT with and without dropped blocks",
    results=Path(__file__).parent / "results" / "layer_dropping_quality.jsonl",
    setup=Setup(num_blocks=12, embed=64, heads=4, vocab_size=1024, block_size=128, batch_size=16, num_steps=800),
    arms={
        DENSE: Arm(),
        "dense, 80 % of the steps": Arm(steps=0.8),
        "dense, 9 of the blocks": Arm(changes={"num_blocks": 9}),
        "PLD as published": Arm(lambda: ProgressiveLayerDropping(scale="sublayer", sampler="bernoulli")),
        "PLD": Arm(lambda: ProgressiveLayerDropping(**_PLD)),
        "PLD, release 20 %": Arm(lambda: ProgressiveLayerDropping(**_PLD, release=0.2)),
        "PLD, decreasing": Arm(lambda: ProgressiveLayerDropping(**_PLD, direction="decreasing", theta=0.3)),
        "SBLD": Arm(lambda: SensitivityLayerDropping(**_SBLD)),
        "SBLD, depth allocation": Arm(lambda: SensitivityLayerDropping(**_SBLD, allocation="depth")),
        "SBLD, uniform allocation": Arm(lambda: SensitivityLayerDropping(**_SBLD, allocation="uniform")),
    },
)


if __name__ == "__main__":
    COMPARISON.main(__doc__)
