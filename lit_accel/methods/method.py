"""What all methods say about themselves: facts, as class attributes, by which it is decided what goes together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import lightning.pytorch as L

Decision = Literal["size", "units", "layers", "tokens"]
"""What a method decides about an optimizer step: the model's level, the units that are on, the blocks that run, or the
tokens that they run on."""

Span = tuple[int, int]
"""Optimizer steps: the first one, and the first one after."""


class Method(L.Callback, ABC):
    """Base of the callbacks that leave a part of the model out in training.

    Subclasses state their facts as class attributes, and say in which steps they do what. All of it is a pure function
    of the optimizer step once the length of the run is known: so it can be planned, and is the same on all ranks and
    after a resume.
    """

    title: ClassVar[str]
    """How the table of pairs calls it."""
    decides: ClassVar[Decision]
    """What it decides about a step. One run can have one method for each decision."""
    changes_size: ClassVar[bool] = False
    """Whether it replaces the model by one of another size."""
    leaves_parameters_unused: ClassVar[bool] = False
    """Whether some parameters get no gradient in some steps."""
    needs_whole_parameters: ClassVar[bool] = False
    """Whether each process must hold parameters as they are, and not in pieces."""
    chooses_by_gradient: ClassVar[bool] = False
    """Whether it needs the gradients of all blocks in some steps."""
    measures_blocks: ClassVar[bool] = False
    """Whether its decisions depend on measurements of the model, which a plan cannot know."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the Trainer and the module of the last run: the next one brings its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_coordinator", "_start_of")}

    @property
    @abstractmethod
    def is_neutral(self) -> bool:
        """Whether its settings are those with which it does nothing."""

    @property
    @abstractmethod
    def is_planned(self) -> bool:
        """Whether the length of the run is known, and with it what is done in each step."""

    @abstractmethod
    def resolve(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the length of the run, and refuse what does not fit it.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
        """

    def needs_all_blocks(self, step: int) -> bool:
        """Whether the gradients of all blocks are needed in an optimizer step."""
        return False

    def begins_phase(self, step: int) -> bool:
        """Whether the model is another one from this optimizer step on: of another size, or with other units."""
        return False

    def transition(self, step: int) -> str | None:
        """Return what this method changes about the model right before or in an optimizer step, in words."""
        return None

    def decision(self) -> object:
        """Return what it has decided about the present step: numbers and strings that are the same on all ranks."""
        return None
