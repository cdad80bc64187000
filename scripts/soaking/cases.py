"""What is soaked, as data: methods and pairs that go together, on three families, on one process and on two."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.strategies import DDPStrategy, Strategy

from lit_accel import (
    Level,
    MixedSparsityTraining,
    MultiLevelTraining,
    Phase,
    ProgressiveLayerDropping,
    RandomLTD,
    SensitivityLayerDropping,
)
from lit_accel.methods.compatibility import MST, MULTI_LEVEL, PAIRS, PLD, RANDOM_LTD, SBLD, TITLES
from lit_accel.strategies import ResizableDDPStrategy, ResizableModelParallelStrategy

Family = Literal["gpt2", "bert", "deit"]
How = Literal["single", "ddp", "fsdp", "shards"]

FAMILIES: tuple[Family, ...] = ("gpt2", "bert", "deit")
STEPS = 24
"""Optimizer steps of a run."""
GLOBAL_BATCH = 8
"""Samples of a batch, of all processes together."""

# Down two levels and up again; beside others one level, whose blocks are still enough to drop some.
_DEEP: tuple[tuple[int, int | None], ...] = ((0, 4), (1, 4), (2, 5), (1, 4), (0, None))
_FLAT: tuple[tuple[int, int | None], ...] = ((0, 5), (1, 10), (0, None))
_STAGES: tuple[tuple[int, float], ...] = ((0, 0.0), (4, 0.25), (8, 0.5), (16, 0.25), (21, 0.0))
# The size may change only while all units are on.
_LATE_STAGES: tuple[tuple[int, float], ...] = ((0, 0.0), (16, 0.5), (20, 0.25), (22, 0.0))


@dataclass(frozen=True)
class Case:
    """A run that is to be killed and resumed.

    Args:
        family: The model.
        titles: The methods, by the titles of :mod:`lit_accel.methods.compatibility`.
        how: ``"single"`` is one process; ``"ddp"`` and ``"fsdp"`` (FSDP2) are two; ``"shards"`` is ``"fsdp"`` whose
            checkpoints are folders that both write to.
        dropout: Of the model.
    """

    family: Family
    titles: tuple[str, ...]
    how: How = "single"
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """What it is called in files and on the command line."""
        methods = "+".join(title.lower().replace("-", "") for title in self.titles)
        return "-".join([self.family, methods, self.how, *(["dropout"] if self.dropout else [])])

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return 1 if self.how == "single" else 2

    @property
    def batch_size(self) -> int:
        """Samples of a batch of one process."""
        return GLOBAL_BATCH // self.ranks

    @property
    def phases(self) -> tuple[tuple[int, int | None], ...]:
        """Level and optimizer steps of each phase; empty if the size does not change."""
        if MULTI_LEVEL not in self.titles:
            return ()
        return _DEEP if self.titles == (MULTI_LEVEL,) else _FLAT

    @property
    def resize_steps(self) -> tuple[int, ...]:
        """Steps before which the size changes."""
        lengths = [length for _, length in self.phases if length is not None]
        return tuple(itertools.accumulate(lengths))

    @property
    def last_update(self) -> int:
        """The last step in which units are switched; -1 if none are."""
        return -1 if MST not in self.titles else (_LATE_STAGES if MULTI_LEVEL in self.titles else _STAGES)[-1][0]


def cases(dropout: float = 0.0) -> list[Case]:
    """Return every method and every pair that is not refused, on each family, on one process and on two.

    Args:
        dropout: Of the models.
    """
    pairs = [(pair.first, pair.second) for pair in PAIRS if pair.verdict != "refuse"]
    found = []
    for titles in [*((title,) for title in TITLES), *pairs]:
        for family in FAMILIES:
            hows: list[How] = ["single", "ddp"]
            # Units are taken out of whole parameters, which sharded ones are not; one pair stands for the others.
            if MST not in titles and (len(titles) == 1 or titles == (MULTI_LEVEL, PLD)):
                hows.append("fsdp")
            if titles == (MULTI_LEVEL,):
                hows.append("shards")
            found += [Case(family, titles, how, dropout) for how in hows]
    return found


def methods_of(case: Case) -> list[L.Callback]:
    """Make the callbacks of a case."""
    makers = {
        MULTI_LEVEL: lambda: MultiLevelTraining(
            [Level(), Level(depth=3)] if len(case.phases) == len(_DEEP) else [Level()],
            [Phase(level, length) for level, length in case.phases],
            coarse=0.5,
            fine=0.5,
            optimizer_state="project",
            learning_rate="rewarm",
            num_rewarm_steps=2,
        ),
        # Gentle where norms stand after the addition, as its own warning says.
        PLD: lambda: ProgressiveLayerDropping(theta=0.7 if case.family == "bert" else 0.5, gamma=0.3),
        SBLD: lambda: SensitivityLayerDropping(
            kept=0.75,
            warmup=1,
            ramp=2,
            release=2,
            min_keep=0.1,
            protected=0.0,
            # So short a run affords few measurements.
            max_overhead=1.0,
            measure_every=6,
            num_batches=2,
            estimator="taylor" if case.family == "deit" else "ablate",
        ),
        RANDOM_LTD: lambda: RandomLTD(start_tokens=0.25, growth=20, quantum=1),
        MST: lambda: MixedSparsityTraining(
            stages=list(_LATE_STAGES if MULTI_LEVEL in case.titles else _STAGES),
            update_every=2,
            drop_fraction=0.5,
            quantum=8,
        ),
    }
    return [makers[title]() for title in case.titles]


def strategy_of(case: Case) -> Strategy | str:
    """Make the strategy of a case."""
    resizes, drops = MULTI_LEVEL in case.titles, bool({PLD, SBLD} & set(case.titles))
    if case.how == "single":
        return "resizable" if resizes else "auto"
    if case.how in ("fsdp", "shards"):
        return ResizableModelParallelStrategy(save_distributed_checkpoint=case.how == "shards")
    options: dict[str, Any] = {"find_unused_parameters": True} if drops else {}
    return ResizableDDPStrategy(**options) if resizes else DDPStrategy(**options)
