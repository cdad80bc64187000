"""What random-LTD does in which step: pure functions of its settings and of the length of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import lightning.pytorch as L

from lit_accel.anatomy import Anatomy, anatomy_of, find_transformer
from lit_accel.methods.compatibility import RANDOM_LTD
from lit_accel.methods.coordinator import Coordinator
from lit_accel.methods.method import Method, Span
from lit_accel.methods.token_dropping.dropper import Scope
from lit_accel.methods.token_dropping.plan import TokenPlan
from lit_accel.methods.token_dropping.refusals import dropping_blocks
from lit_accel.methods.token_dropping.schedule import Compat, TokenSchedule
from lit_accel.resizing import full_size


class PlannedTokens(Method):
    """Base of :class:`~lit_accel.RandomLTD`: which blocks drop tokens, and how many they keep when."""

    title = RANDOM_LTD
    decides = "tokens"

    start_tokens: int | float
    quantum: int
    pinned: list[int]
    scope: Scope
    max_lengths: int | None
    compat: Compat | None
    num_steps: int | None
    schedule: TokenSchedule | None
    """How many tokens are kept; known once the length of the run is."""
    num_tokens: int | None
    anatomy: Anatomy | None
    _num_prefix: int
    _coordinator: Coordinator

    @property
    def drops(self) -> bool:
        """Whether any token is ever dropped."""
        return self.start_tokens != 1.0 or isinstance(self.start_tokens, int)

    @property
    def is_neutral(self) -> bool:
        """Whether no token is ever dropped."""
        return not self.drops

    @property
    def is_planned(self) -> bool:
        """Whether the schedule is known in optimizer steps."""
        return self.schedule is not None

    def spans(self) -> Sequence[Span]:
        """Return the steps in which tokens may be dropped."""
        assert self.schedule is not None
        if self.num_steps is None:
            return [(0, self.schedule.growth_steps)]
        spans: list[Span] = []
        coordinator = self._coordinator
        for step in range(self.num_steps):
            if not coordinator.may_drop(step) or self.schedule.is_over(coordinator.schedule_step(step)):
                continue
            if spans and spans[-1][1] == step:
                spans[-1] = (spans[-1][0], step + 1)
            else:
                spans.append((step, step + 1))
        return spans

    def plan_tokens(self, anatomy: Anatomy, num_tokens: int) -> Callable[[int], Mapping[int, int]]:
        """Return what says, for an optimizer step, how many tokens a block runs on that does not run on all of them.

        Args:
            anatomy: The model, at any of its sizes.
            num_tokens: Tokens of a sequence.
        """
        assert self.schedule is not None
        blocks = dropping_blocks(anatomy, self.pinned, self.scope)
        plan = TokenPlan(anatomy, blocks, self.schedule, self.num_steps or 0, num_tokens, self._num_prefix)
        return plan.kept

    def _schedule_of(self, growth_steps: int) -> TokenSchedule:
        return TokenSchedule(self.start_tokens, growth_steps, self.quantum, self.max_lengths, self.compat)

    def _known_tokens(self, trainer: L.Trainer) -> int | None:
        """Return the tokens of a sequence, where they are known before the first one is seen."""
        assert self.anatomy is not None
        data = getattr(trainer, "datamodule", None)
        return self.num_tokens or self.anatomy.num_tokens or getattr(data, "block_size", None)

    def _plan_for(self, pl_module: L.LightningModule, num_tokens: int) -> TokenPlan:
        assert self.schedule is not None
        assert self.num_steps is not None
        # Of the full model, also where a run goes on from a small phase.
        anatomy = anatomy_of(find_transformer(pl_module)[1]).at(full_size(pl_module))
        blocks = dropping_blocks(anatomy, self.pinned, self.scope)
        coordinator = self._coordinator
        return TokenPlan(
            anatomy,
            blocks,
            self.schedule,
            self.num_steps,
            num_tokens,
            self._num_prefix,
            may_drop=coordinator.may_drop,
            clock=coordinator.schedule_step,
        )
