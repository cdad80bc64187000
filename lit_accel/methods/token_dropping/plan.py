"""What a schedule comes to over a run: layer tokens and FLOPs, exactly and before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from lit_accel.anatomy import Anatomy
from lit_accel.compute.flops import training_flops
from lit_accel.methods.token_dropping.schedule import TokenSchedule


def kept_by_block(
    anatomy: Anatomy, blocks: Collection[int], schedule: TokenSchedule, step: int, num_tokens: int, num_prefix: int = 0
) -> dict[int, int]:
    """Return how many tokens of a sequence each block runs on that does not run on all of them.

    Args:
        anatomy: The model.
        blocks: Indices of the blocks that drop tokens.
        schedule: How many tokens are kept.
        step: Completed optimizer steps.
        num_tokens: Tokens of a sequence.
        num_prefix: The first tokens, which are always kept.
    """
    kept = {}
    for index in blocks:
        attention = anatomy.blocks[index].attention
        num_attending = anatomy.places[attention.place](1, num_tokens)
        if attention.tile is None:
            num_kept = max(schedule.kept_tokens(step, num_attending), num_prefix)
        else:
            num_kept = schedule.kept_windows(step, num_attending // attention.tile) * attention.tile
        # Windows may be padded, and then some of them may hold more than there are tokens.
        if num_kept < anatomy.places[anatomy.blocks[index].place](1, num_tokens):
            kept[index] = num_kept
    return kept


def layer_tokens(anatomy: Anatomy, num_sequences: int, num_tokens: int, kept: dict[int, int]) -> int:
    """Count the tokens that blocks run on, summed over the blocks.

    Args:
        anatomy: The model.
        num_sequences: Sequences of the batch.
        num_tokens: Tokens of each.
        kept: What :func:`kept_by_block` returned; empty for all of them.
    """
    return sum(
        num_sequences * kept[index] if index in kept else anatomy.places[block.place](num_sequences, num_tokens)
        for index, block in enumerate(anatomy.blocks)
    )


@dataclass(frozen=True)
class TokenPlan:
    """A run, for sequences of one length.

    Args:
        anatomy: The model.
        blocks: Indices of the blocks that drop tokens.
        schedule: How many tokens are kept.
        num_steps: Optimizer steps of the run.
        num_tokens: Tokens of a sequence.
        num_prefix: The first tokens, which are always kept.
        may_drop: Whether tokens may be dropped in an optimizer step. Default: in each.
        clock: Where the schedule is in an optimizer step. Default: at that step.
    """

    anatomy: Anatomy
    blocks: tuple[int, ...]
    schedule: TokenSchedule
    num_steps: int
    num_tokens: int
    num_prefix: int = 0
    may_drop: Callable[[int], bool] | None = None
    clock: Callable[[int], int] | None = None

    def saved_flops(self, num_sequences: int = 1, activation_checkpointing: bool = False) -> float:
        """Return which share of the FLOPs of a dense run is saved, heads and embeddings included.

        Args:
            num_sequences: Sequences of a batch. It matters where something is paid once a batch, as SwinV2's table of
                relative positions is.
            activation_checkpointing: Whether blocks compute their forward pass once more in the backward pass.
        """

        def cost(kept: dict[int, int]) -> int:
            return training_flops(
                self.anatomy,
                num_sequences,
                self.num_tokens,
                activation_checkpointing=activation_checkpointing,
                kept=kept,
            ).total

        spent = sum(num * cost(self.kept(step)) for step, num in Counter(self._alike).items())
        return 1 - spent / (cost({}) * self.num_steps)

    def progress(self) -> list[float]:
        """Return how far the run is before each step and at its end, in dense steps of as many layer tokens.

        Returns:
            ``num_steps + 1`` numbers. Without dropping they are the steps themselves, exactly.
        """
        dense = layer_tokens(self.anatomy, 1, self.num_tokens, {})
        alike = self._alike
        spent = {step: layer_tokens(self.anatomy, 1, self.num_tokens, self.kept(step)) for step in set(alike)}
        return [total / dense for total in accumulate((spent[step] for step in alike), initial=0)]

    def num_graphs(self) -> int:
        """Return how many graphs blocks make that are compiled for each number of tokens by itself."""
        shapes: dict[tuple[int, ...], set[int]] = {}
        kept_at = [self.kept(step) for step in set(self._alike)]
        for index, block in enumerate(self.anatomy.blocks):
            num_tokens = self.anatomy.places[block.place](1, self.num_tokens)
            # Plain and shifted blocks are two kinds where there is more than one window.
            is_split = block.attention.tile is not None and num_tokens > block.attention.tile
            kind = (block.stage, index % self.anatomy.depth_unit if is_split else 0)
            shapes.setdefault(kind, {num_tokens})
            shapes[kind] |= {kept[index] for kept in kept_at if index in kept}
        return sum(map(len, shapes.values()))

    def kept(self, step: int) -> dict[int, int]:
        """Return how many tokens each block runs on that does not run on all of them; one and the same for steps alike.

        Args:
            step: Completed optimizer steps.
        """
        key = self._key(step)
        if key not in self._made:
            self._made[key] = (
                kept_by_block(
                    self.anatomy, self.blocks, self.schedule, self._now(step), self.num_tokens, self.num_prefix
                )
                if key
                else {}
            )
        return self._made[key]

    def _key(self, step: int) -> tuple[int, ...]:
        """Return what is the same for steps alike: runs have up to millions of steps, but few lengths.

        Empty where every block runs on every token.
        """
        if self.may_drop is not None and not self.may_drop(step):
            return ()
        schedule, now = self.schedule, self._now(step)
        return tuple(
            schedule.kept_tokens(now, num) if tile is None else schedule.kept_windows(now, num // tile)
            for num, tile in self._extents
        )

    def _now(self, step: int) -> int:
        return step if self.clock is None else self.clock(step)

    @cached_property
    def _made(self) -> dict[tuple[int, ...], dict[int, int]]:
        return {}

    @cached_property
    def _extents(self) -> list[tuple[int, int | None]]:
        """Tokens and tiles of the attention of the blocks that drop, each kind once."""
        attentions = [self.anatomy.blocks[index].attention for index in self.blocks]
        places = self.anatomy.places
        return list(dict.fromkeys((places[each.place](1, self.num_tokens), each.tile) for each in attentions))

    @cached_property
    def _alike(self) -> list[int]:
        """For each step the first one that keeps as much."""
        first: dict[tuple[int, ...], int] = {}
        return [first.setdefault(self._key(step), step) for step in range(self.num_steps)]
