"""What went through the blocks, counted exactly."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, astuple, dataclass

from lit_accel.anatomy import Anatomy


@dataclass
class TokenCount:
    """Tokens over a run, by all ranks together.

    Args:
        tokens: Tokens of the sequences.
        layer_tokens: Tokens that blocks ran on, summed over the blocks.
        dense_layer_tokens: The same if no block had dropped any.
        kept: Tokens that dropping blocks ran on.
        sequences: Sequences that dropping blocks were called with, once for each such block.
    """

    tokens: int = 0
    layer_tokens: int = 0
    dense_layer_tokens: int = 0
    kept: int = 0
    sequences: int = 0

    @property
    def effective_tokens(self) -> float:
        """Tokens of a dense run with as many layer tokens."""
        return self.tokens * self.layer_tokens / self.dense_layer_tokens if self.dense_layer_tokens else 0.0

    @property
    def kept_tokens(self) -> float:
        """Tokens of a sequence that a dropping block ran on, on average."""
        return self.kept / self.sequences if self.sequences else 0.0

    def plus(self, amounts: Sequence[int]) -> TokenCount:
        """Return the count with other amounts added, in the order of the fields."""
        return TokenCount(*(mine + other for mine, other in zip(self.amounts(), amounts, strict=True)))

    def minus(self, earlier: TokenCount) -> TokenCount:
        """Return what was counted since an earlier count."""
        return self.plus([-amount for amount in earlier.amounts()])

    def amounts(self) -> list[int]:
        """Return the fields."""
        return list(astuple(self))

    def to_state(self) -> dict[str, int]:
        """Return the fields by name."""
        return asdict(self)


class TokenBooks:
    """Counts what goes through the blocks, call by call of the model.

    Reports of blocks outside of a call are recomputations in the backward pass, and count no second time.
    """

    def __init__(self) -> None:
        self.total = TokenCount()
        """What was counted so far, as of the last time that ranks were added up."""
        self.logged = TokenCount()
        """The total when it was last logged."""
        self.uncollected = TokenCount()
        """What this rank has counted since then."""
        self._call: tuple[Anatomy, Collection[int], int, int] | None = None
        self.begin_batch()

    def begin_batch(self) -> None:
        """Forget what the last batch was like."""
        self.longest = 0
        """Tokens of the longest sequence that was trained on in this batch."""
        self.was_partial = False
        """Whether a block did not run on all tokens in it."""

    def begin_call(self, anatomy: Anatomy, blocks: Collection[int], num_sequences: int, num_tokens: int) -> None:
        """Count a call of the model that every block sees whole, as long as none reports otherwise.

        Args:
            anatomy: The model.
            blocks: Indices of the blocks that drop tokens.
            num_sequences: Sequences of the call.
            num_tokens: Tokens of each.
        """
        self._call = (anatomy, blocks, num_sequences, num_tokens)
        self.longest = max(self.longest, num_tokens)
        tokens = [anatomy.places[block.place](num_sequences, num_tokens) for block in anatomy.blocks]
        of_dropping = sum(tokens[index] for index in blocks)
        self._count(num_sequences * num_tokens, sum(tokens), sum(tokens), of_dropping, num_sequences * len(blocks))

    def count_part(self, index: int, num_kept: int) -> None:
        """Take back what a block of the present call leaves out.

        Args:
            index: The block.
            num_kept: On how many tokens of each sequence it runs; 0 if it is skipped.
        """
        if self._call is None:
            return
        self.was_partial = True
        anatomy, blocks, num_sequences, num_tokens = self._call
        left_out = anatomy.places[anatomy.blocks[index].place](num_sequences, num_tokens) - num_sequences * num_kept
        if index in blocks:
            # A block that another method skips was not called with any sequence.
            self._count(0, -left_out, 0, -left_out, 0 if num_kept else -num_sequences)
        else:
            self._count(0, -left_out, 0, 0, 0)

    def end_call(self) -> None:
        """Close the present call."""
        self._call = None

    def _count(self, *amounts: int) -> None:
        self.uncollected = self.uncollected.plus(amounts)
