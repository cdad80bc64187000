"""Seeing that the model of another size is what is trained, and not the one that it was put in the place of."""

from __future__ import annotations

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

# Optimizer steps in a row without a gradient, until that is an error: one or two may have been skipped.
_MOST_UNTRAINED = 3


class ReplacedModel:
    """Looks for gradients after a change of size, until there is one.

    A training step that has kept a reference to the former model goes on calling that, and nothing else would tell.
    """

    def __init__(self) -> None:
        self._num_untrained: int | None = None

    @property
    def is_unproven(self) -> bool:
        """Whether it was replaced and has not had a gradient since."""
        return self._num_untrained is not None

    def begin(self) -> None:
        """Note that the model was replaced."""
        self._num_untrained = 0

    def look(self, transformer: nn.Module, path: str, optimizer: Optimizer) -> None:
        """Look at the gradients before an optimizer step.

        Args:
            transformer: The model.
            path: Where the module has it.
            optimizer: What is about to step.

        Raises:
            MisconfigurationException: If none of the model's parameters has had a gradient for some steps.
        """
        if self._num_untrained is None:
            return
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        parameters = [parameter for parameter in transformer.parameters() if id(parameter) in own]
        if not parameters:
            return
        if any(parameter.grad is not None for parameter in parameters):
            self._num_untrained = None
            return
        self._num_untrained += 1
        if self._num_untrained == _MOST_UNTRAINED:
            raise MisconfigurationException(
                f"Since {path} was replaced by a model of another size, none of its parameters has had a gradient: the "
                "training step calls the former one, to which it must have kept a reference (a bound method, a "
                f"partial, a pipeline). Call self.{path} itself."
            )
