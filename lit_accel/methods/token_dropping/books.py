"""What went through the blocks, counted exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass


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
