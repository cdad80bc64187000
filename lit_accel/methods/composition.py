"""What holds for all methods of a run together, as a Lightning callback."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.arguments import is_number, is_whole, require_duration, require_one_of
from lit_accel.methods.coordinator import Rules, coordinator_of
from lit_accel.methods.preparation import prepare_run
from lit_accel.methods.requirements import check_rules
from lit_accel.stored_state import primitives, require_readable

_STATE_VERSION = 1


class Composition(L.Callback):
    """Says what must hold where several methods act in one run. Without it they act as each of them is set.

    Args:
        dense_warmup: The start of the run, in which nothing is left out: optimizer steps (int) or a share of the run
            (float).
        dense_tail: The same at its end. Blocks and tokens are simply not dropped there; sizes and units have schedules
            of their own, and one that reaches into these steps is refused.
        drop_levels: At which levels of multi-level training blocks and tokens may be dropped. A small level is cheap
            already: ``[0]`` drops at the full model alone. Default: at all of them.
        schedules: How the schedules of blocks and tokens go beside multi-level training. ``"run"``: once through the
            run, whatever its level. ``"level"``: at each level once, over the steps that the run spends there, as if
            these were the whole run.
        least_cost: A run of several methods that would cost less than this share of the FLOPs of a dense one is
            refused; 0 allows any. This limit also holds without the callback.

    Raises:
        ValueError: If an argument is none of the allowed values.

    Example::

        Trainer(callbacks=[MultiLevelTraining(), RandomLTD(), Composition(dense_tail=0.2, drop_levels=[0])])
    """

    def __init__(
        self,
        dense_warmup: int | float = 0,
        dense_tail: int | float = 0,
        drop_levels: Sequence[int] | None = None,
        schedules: Literal["run", "level"] = "run",
        least_cost: float = 0.3,
    ) -> None:
        require_duration("dense_warmup", dense_warmup)
        require_duration("dense_tail", dense_tail)
        if not is_number(least_cost) or not 0 <= least_cost < 1:
            raise ValueError(f"least_cost is {least_cost!r}; it is a share of the FLOPs of a dense run, in [0, 1).")
        if drop_levels is not None:
            is_list = isinstance(drop_levels, Iterable) and not isinstance(drop_levels, str)
            if not is_list or not all(is_whole(level, 0) for level in drop_levels):
                raise ValueError(f"drop_levels is {drop_levels!r}; it is a list of levels, such as [0].")
            if not drop_levels:
                raise ValueError("drop_levels is empty: nothing would ever be dropped. Leave the methods out instead.")
        require_one_of("schedules", schedules, ("run", "level"))
        levels = None if drop_levels is None else tuple(drop_levels)
        self.rules = Rules(dense_warmup, dense_tail, levels, schedules, least_cost)
        self._loaded_rules: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse whatever could not work, before anything is trained."""
        if stage != "fit":
            return
        others = [callback for callback in trainer.callbacks if isinstance(callback, Composition)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise MisconfigurationException("Two Composition callbacks would contradict each other. Use one of them.")
        prepare_run(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what does not fit the run."""
        coordinator_of(trainer).check_run(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if rules have changed since the checkpoint was written, and compare them across ranks."""
        check_rules(trainer, self._rules(), self._loaded_rules, "composition")
        self._loaded_rules = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the rules."""
        return primitives({"version": _STATE_VERSION, "rules": self._rules()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rules for comparison.

        Raises:
            MisconfigurationException: If a newer version wrote the checkpoint, or it is damaged.
        """
        require_readable(state_dict, self.state_dict(), "composition")
        self._loaded_rules = dict(state_dict["rules"])

    def _rules(self) -> dict[str, Any]:
        levels = self.rules.drop_levels
        return {
            "dense_warmup": self.rules.dense_warmup,
            "dense_tail": self.rules.dense_tail,
            "drop_levels": None if levels is None else list(levels),
            "schedules": self.rules.schedules,
        }
