"""Running blocks of a model on some of their tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lit_accel.anatomy import Block
from lit_accel.draws import generator
from lit_accel.methods.token_dropping.arguments import restrict
from lit_accel.methods.token_dropping.calls import ModelCalls, is_recomputing
from lit_accel.methods.token_dropping.schedule import TokenSchedule
from lit_accel.methods.token_dropping.subsets import put, sample_tokens, take
from lit_accel.routing import BlockCall, BlockRouting, Order, Run, hidden_states_of, with_hidden_states

Scope = Literal["layer", "route", "input"]
"""Which blocks share a draw; see :class:`TokenDropper`."""
# Tells these draws from the others of the same seed.
_TOKENS = 7
_SHARED = -1
_AMBIGUOUS = (
    "In one training step the transformer was called, which drops tokens, and a part of it, such as "
    "model.transformer(...) or forward_features(...), which does not. Activation checkpointing calls a block again, "
    "and whether it ran on every token cannot be seen. Call the transformer itself each time, or do without activation "
    "checkpointing."
)


class TokenDropper:
    """Has blocks of one transformer run on random tokens while it is active; the others pass a block unchanged.

    Evaluation, generation, calls without gradients and calls with a cache are not touched. The same keys give the same
    tokens however often a block is called, so that activation checkpointing recomputes what was computed.

    Args:
        routing: The routing of the transformer's blocks.
        blocks: Indices of the blocks that drop tokens.
        schedule: How many tokens are kept.
        scope: ``"layer"``: a draw for each block, as published. ``"route"``: one for all blocks, so that a token visits
            all of them or none (as in TokenBypass, TREAD). ``"input"``: one before the first block; what is not drawn
            never comes back (as in PatchDropout).
        num_prefix: The first tokens of a sequence, which are always kept.
        seed: Seed of the draws.
        in_parts: Whether tokens are also dropped where something else than the transformer itself is called, such as
            its body without the head; nobody counts them there.
    """

    def __init__(
        self,
        routing: BlockRouting,
        blocks: Collection[int],
        schedule: TokenSchedule,
        scope: Scope = "layer",
        num_prefix: int = 0,
        seed: int = 0,
        in_parts: bool = True,
    ) -> None:
        self.is_active = False
        self.routing = routing
        self.num_restricted = 0
        """How many calls of blocks were restricted since :meth:`set`; recomputed ones may count again."""
        self.was_spared = False
        """Whether a block that was trained saw every token since :meth:`set`, since a part was called."""
        self._in_parts = in_parts
        self._blocks = frozenset(blocks)
        self._schedule = schedule
        self._scope = scope
        self._num_prefix = num_prefix
        self._step = 0
        self._seed = seed
        self._keys: Sequence[int] = ()
        self._draws: dict[tuple[int, ...], Tensor] = {}
        # By the number of tokens that the first block keeps of its input: recomputation may come to an earlier call.
        self._num_before: dict[int, int] = {}
        self._calls = ModelCalls(routing.transformer)
        routing.add(self._handle, Order.SUBSET, self._is_idle)

    def set(self, step: int, keys: Sequence[int]) -> None:
        """Say which tokens are kept from now on.

        Args:
            step: Completed optimizer steps, which decide how many.
            keys: Integers that decide which: other keys give an unrelated draw.
        """
        self._step, self._keys = step, tuple(keys)
        self._draws.clear()
        self._num_before.clear()
        self._calls.end()
        self.num_restricted = 0
        self.was_spared = False

    def close(self) -> None:
        """Leave the model as it was."""
        self.routing.remove(self._handle)
        self._calls.close()
        self._draws.clear()

    def _is_idle(self) -> bool:
        return not self.is_active or not torch.is_grad_enabled() or self._schedule.is_over(self._step)

    def _is_dense(self, call: BlockCall) -> bool:
        """Whether what calls a block now is to see every token."""
        if is_recomputing():
            if self.num_restricted and self.was_spared:
                raise RuntimeError(_AMBIGUOUS)
            # What it saw before: a call of the whole model may have been run without gradients first.
            return self.num_restricted == 0
        if self._calls.has_gradients is not None:
            return not self._calls.has_gradients
        if self._in_parts:
            return False
        # Reentrant checkpointing runs it without gradients, but not on hidden states without them.
        self.was_spared |= torch.is_grad_enabled() or call.hidden_states.requires_grad
        return True

    def _handle(self, call: BlockCall, run: Run) -> Any:
        if not self.is_active or call.index not in self._blocks or self._is_dense(call):
            return run(call)
        block = self.routing.blocks[call.index]
        if block.windows is not None:
            return self._on_windows(call, block, run)
        if self._scope == "input":
            return self._on_input(call, block, run)
        x_btd = call.hidden_states
        num_tokens = x_btd.shape[1]
        num_kept = self._num_kept(num_tokens)
        if num_kept >= num_tokens:
            return run(call)
        kept_bk = self._draw(call.index, x_btd, num_tokens, num_kept)
        taken, rest = take(x_btd, kept_bk)
        output = self._run(call, num_kept, restrict(call, block, taken, kept_bk, num_tokens), run)
        return with_hidden_states(output, put(rest, hidden_states_of(output), kept_bk))

    def _on_input(self, call: BlockCall, block: Block, run: Run) -> Any:
        x_btd = call.hidden_states
        if call.index == 0:
            num_tokens = x_btd.shape[1]
            num_kept = self._num_kept(num_tokens)
            if num_kept >= num_tokens:
                return run(call)
            self._num_before[num_kept] = num_tokens
        else:
            num_kept = x_btd.shape[1]
            if num_kept not in self._num_before:
                # A first block in evaluation mode has left every token there.
                return run(call)
            num_tokens = self._num_before[num_kept]
        kept_bk = self._draw(call.index, x_btd, num_tokens, num_kept)
        if call.index == 0:
            x_btd, _ = take(x_btd, kept_bk)
        return self._run(call, num_kept, restrict(call, block, x_btd, kept_bk, num_tokens), run)

    def _on_windows(self, call: BlockCall, block: Block, run: Run) -> Any:
        windows, x_bhwd = block.windows, call.hidden_states
        assert windows is not None
        height, width = x_bhwd.shape[1:3]
        tokens = windows.tokens(call.module, height, width)
        num_kept = self._schedule.kept_windows(self._step, len(tokens))
        # Padded windows may hold more than there are tokens.
        if num_kept * tokens.shape[1] >= height * width:
            return run(call)
        chosen = self._draw(call.index, x_bhwd, len(tokens), num_kept)
        kept_bk = tokens[chosen].flatten(1)
        x_btd = x_bhwd.flatten(1, 2)
        is_padded = tokens.numel() > height * width
        if is_padded:
            # One more token, zero as the padding is, for all positions that hold none.
            x_btd = torch.cat((x_btd, x_btd.new_zeros(len(x_btd), 1, x_btd.shape[2])), 1)
        taken, rest = take(x_btd, kept_bk)
        stacked = windows.stacked(call.module, taken)
        args, kwargs = (
            ((stacked, *call.args[1:]), call.kwargs)
            if call.args
            else (call.args, {**call.kwargs, call.input_name: stacked})
        )
        with windows.apart(call.module, height, width, chosen):
            output = self._run(call, kept_bk.shape[1], replace(call, args=args, kwargs=kwargs), run)
        y_btd = put(rest, hidden_states_of(output).flatten(1, 2), kept_bk)
        if is_padded:
            y_btd = y_btd[:, :-1]
        return with_hidden_states(output, y_btd.unflatten(1, (height, width)))

    def _run(self, call: BlockCall, num_kept: int, restricted: BlockCall, run: Run) -> Any:
        self.num_restricted += 1
        self.routing.report(call.index, num_kept)
        return run(restricted)

    def _num_kept(self, num_tokens: int) -> int:
        return min(num_tokens, max(self._schedule.kept_tokens(self._step, num_tokens), self._num_prefix))

    def _draw(self, index: int, like: Tensor, num: int, num_kept: int) -> Tensor:
        stream = index if self._scope == "layer" else _SHARED
        key = (stream, len(like), num, num_kept)
        if key not in self._draws:
            self._draws[key] = sample_tokens(
                len(like),
                num,
                num_kept,
                generator=generator(self._seed, _TOKENS, *self._keys, stream, device=like.device),
                num_prefix=self._num_prefix,
            )
        return self._draws[key]
