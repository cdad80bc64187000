"""The block list of sensitivity-based layer dropping: which blocks are too sensitive to be dropped.

That there is such a list is known of SBLD (Zeng et al., AAAI 2023); its size and its rule are in none of the public
sources that we could read. Share, hysteresis and what is always a member are a reconstruction.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_NUM_UPDATES_TO_LEAVE = 2


class BlockList:
    """Blocks that are not dropped: the most sensitive ones, the first, the last, and those that a user names.

    Measurements of neighbouring ranks change places from one time to the next, so a block enters at once but leaves
    only after two updates in a row without being among the most sensitive. Between the two the list may be longer
    than its share.

    Args:
        num_blocks: Number of blocks of the model.
        units: Indices of the blocks that may be dropped at all. The first and the last of them are always members.
        share: Share of ``units`` that is protected for its sensitivity, in [0, 1); rounded up to whole blocks.
        pinned: Indices of further blocks that are always members.

    Raises:
        ValueError: If ``share`` is outside [0, 1), ``units`` is empty, or an index does not exist.

    Example::

        >>> protected = BlockList(6, units=range(6), share=0.15)
        >>> sorted(protected.update([1.0, 2.0, 9.0, 3.0, 1.0, 1.0]))
        [0, 2, 5]
    """

    def __init__(self, num_blocks: int, units: Sequence[int], share: float, pinned: Collection[int] = ()) -> None:
        if not 0 <= share < 1:
            raise ValueError(
                f"share is {share}; it must be in [0, 1). 0 protects no block for its sensitivity; 1 would leave none "
                "to be dropped."
            )
        if not units:
            raise ValueError("units is empty: no block may be dropped, so there is nothing to protect.")
        for name, indices in (("units", units), ("pinned", pinned)):
            unknown = sorted(index for index in indices if not 0 <= index < num_blocks)
            if unknown:
                raise ValueError(f"{name} names the blocks {unknown}; there are {num_blocks}, 0 to {num_blocks - 1}.")
        self.num_blocks = num_blocks
        """Number of blocks of the model."""
        self._units = sorted(set(units))
        # A product such as 0.28 * 25 lies a rounding error above the whole number that it means.
        self._num_sensitive = math.ceil(share * len(self._units) - 1e-9)
        self._permanent = frozenset({self._units[0], self._units[-1], *pinned})
        # For each block that was among the most sensitive: how many updates in a row it has not been.
        self._num_below: dict[int, int] = {}

    @property
    def members(self) -> frozenset[int]:
        """Indices of the blocks that are not dropped."""
        return self._permanent | self._num_below.keys()

    @property
    def most_sensitive(self) -> frozenset[int]:
        """The members without those that are about to leave: no more than ``share`` and what is always a member."""
        return self._permanent | {unit for unit, count in self._num_below.items() if count == 0}

    def update(self, sensitivities: Sequence[float]) -> frozenset[int]:
        """Take a measurement into account.

        Args:
            sensitivities: One for each block of the model; those that are not ``units`` are not looked at. Of equal
                ones the earlier block counts as more sensitive, so do not pass a measurement that says nothing.

        Returns:
            The new members.

        Raises:
            ValueError: If there is not one for each block, or one of a unit is NaN, which has no rank.
        """
        if len(sensitivities) != self.num_blocks:
            raise ValueError(f"There are {len(sensitivities)} sensitivities for {self.num_blocks} blocks.")
        unranked = [unit for unit in self._units if math.isnan(sensitivities[unit])]
        if unranked:
            raise ValueError(f"The sensitivity of the blocks {unranked} is NaN; robust() makes a measurement fit.")
        ranking = sorted(self._units, key=lambda unit: (-sensitivities[unit], unit))
        num_below = {unit: count + 1 for unit, count in self._num_below.items()}
        num_below |= dict.fromkeys(ranking[: self._num_sensitive], 0)
        self._num_below = {unit: count for unit, count in num_below.items() if count < _NUM_UPDATES_TO_LEAVE}
        return self.members

    def state_dict(self) -> dict[str, Any]:
        """Return what the next updates depend on, as integers and lists of integers."""
        sensitive = sorted(self._num_below)
        return {
            "num_blocks": self.num_blocks,
            "sensitive": sensitive,
            "num_below": [self._num_below[unit] for unit in sensitive],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another list; ``units``, ``share`` and ``pinned`` stay as constructed.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: If it is of a model with another number of blocks.
        """
        if state["num_blocks"] != self.num_blocks:
            raise ValueError(
                f"The stored block list is for {state['num_blocks']} blocks, this model has {self.num_blocks}. Load "
                "the checkpoint into the model that it was written for, or start without its sensitivities."
            )
        self._num_below = dict(zip(state["sensitive"], state["num_below"], strict=True))
