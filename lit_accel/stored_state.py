"""What a checkpoint says of a run that goes on: whether it can be read, and what has changed since."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer


def primitives(state: Any) -> Any:
    """Return a state for a checkpoint in which numbers of NumPy are Python's.

    A setting may be one, as from a sweep with ``numpy.linspace``, and ``torch.load(weights_only=True)`` reads none.

    Args:
        state: Dictionaries, lists and tuples of anything.
    """
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, dict):
        return {primitives(key): primitives(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(primitives(value) for value in state)
    return state


def require_readable(stored: Any, present: Mapping[str, Any], what: str) -> None:
    """Check the outline of a state from a checkpoint, before any of it is taken up.

    Args:
        stored: The state from the checkpoint.
        present: The same as this version writes it; its ``"version"`` is the newest that can be read.
        what: Whose state it is, for messages.

    Raises:
        MisconfigurationException: If a newer version wrote it, or it has lost parts.
    """
    version = stored.get("version") if isinstance(stored, Mapping) else None
    if isinstance(version, bool) or not isinstance(version, int):
        raise MisconfigurationException(
            f"The state of {what} in the checkpoint is damaged: it has no version. Resume from another checkpoint."
        )
    if version > present["version"]:
        raise MisconfigurationException(
            f"The state of {what} in the checkpoint has format {version}; this version of lit-accel reads up to "
            f"{present['version']}. Update lit-accel."
        )
    # What is a container here may have been nothing there yet.
    lost = [
        name
        for name, value in present.items()
        if name not in stored
        or (isinstance(value, (dict, list)) and not isinstance(stored[name], (type(value), NoneType)))
    ]
    if lost:
        reason = "is damaged" if version == present["version"] else f"has format {version}, which lacks what is needed"
        raise MisconfigurationException(
            f"The state of {what} in the checkpoint {reason}: {', '.join(map(repr, lost))} should be there and "
            "cannot be read. Resume from another checkpoint."
        )


def compare_rules(
    rules: Mapping[str, Any], stored: Mapping[str, Any], what: str, *, fixed: Collection[str] = (), why: str = ""
) -> None:
    """Say which rules have changed since a checkpoint was written, and refuse those that cannot.

    Args:
        rules: The rules of this run.
        stored: Those of the checkpoint; empty if there is none.
        what: Of what they are, for messages.
        fixed: Names of those that what the checkpoint holds depends on.
        why: What would be wrong with others.

    Raises:
        MisconfigurationException: If one of those has changed.
    """
    changed = [name for name, value in stored.items() if name in rules and _listed(value) != _listed(rules[name])]
    was = {name: f"{name} {stored[name]} (now {rules[name]})" for name in changed}
    if wrong := [was[name] for name in changed if name in fixed]:
        raise MisconfigurationException(
            f"The checkpoint was trained with other rules of {what}: {', '.join(wrong)}. {why} Resume with what it was "
            "trained with."
        )
    if changed:
        rank_zero_warn(
            f"The checkpoint was trained with other rules of {what}: {', '.join(was.values())}. Those of now hold."
        )


def _listed(value: Any) -> Any:
    """Return a value with lists for its tuples: the same settings come as either, from Python and from YAML."""
    return [_listed(entry) for entry in value] if isinstance(value, (list, tuple)) else value


# What configure_optimizers chose and a checkpoint replaces; not the learning rate, which is one of the present step.
_CHOSEN = (
    *("initial_lr", "weight_decay", "betas", "eps", "momentum", "nesterov", "amsgrad"),
    *("base_momentum", "max_momentum"),
)


def chosen_options(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    """Return what each group of each optimizer was configured with.

    Args:
        optimizers: The optimizers.
    """
    return [_chosen(group) for optimizer in optimizers for group in optimizer.param_groups]


def _chosen(group: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: group[name] for name in _CHOSEN if name in group}
    # OneCycleLR and CyclicLR set the momentum, or the first beta, at each step; they were given its two ends.
    if "base_momentum" in group:
        chosen.pop("momentum", None)
        if "betas" in chosen:
            chosen["betas[1]"] = chosen.pop("betas")[1]
    return chosen


def say_what_is_ignored(given: Sequence[Mapping[str, Any]], restored: Sequence[Mapping[str, Any]]) -> None:
    """Warn of options of this run's optimizers in whose place a checkpoint has put others: Lightning says nothing.

    Args:
        given: Of this run, as :func:`chosen_options` returns them.
        restored: The same after the checkpoint's state was taken up.
    """
    changed = {
        f"{name} {group[name]} (the checkpoint has {old[name]})": None
        for group, old in zip(given, restored, strict=False)
        for name in group
        if name in old and old[name] != group[name]
    }
    if changed:
        rank_zero_warn(
            f"Settings of the optimizer are ignored, since a checkpoint brings its own: {', '.join(changed)}. To train "
            "on with those of now, load the weights alone (load_from_checkpoint) and call fit without ckpt_path."
        )
