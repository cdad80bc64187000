"""What a command reads and is told, checked before anything is built: configuration files, a checkpoint, a Trainer."""

from __future__ import annotations

import inspect
import os
import pickle
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import yaml
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_accel.arguments import did_you_mean, is_number
from lit_accel.command_messages import class_at, parameters_of

# What Lightning takes as it is, to fail in training or never to notice.
_LEAST = {
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}
# Names of checkpoints, which Lightning looks for itself.
_KEYWORDS = ("best", "last", "hpc", "registry")


def config_files(arguments: Sequence[str]) -> Iterator[str]:
    """Yield what is given as ``--config``.

    Args:
        arguments: Those of the command.
    """
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument in ("-c", "--config"):
            yield following
        elif argument.startswith("--config="):
            yield argument.removeprefix("--config=")


def check_order(arguments: Sequence[str], subcommands: Collection[str]) -> None:
    """Check that no recipe is given before the subcommand, where only a file of subcommands' sections belongs.

    Args:
        arguments: What was given on the command line.
        subcommands: Their names.

    Raises:
        ValueError: If one is.
    """
    if arguments and not arguments[0].startswith("-") and arguments[0] not in subcommands:
        # One that is misspelt: the parser says so.
        return
    called = next((place for place, argument in enumerate(arguments) if argument in subcommands), len(arguments))
    for given in config_files(arguments[:called]):
        path = Path(given).expanduser()
        keys = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        if isinstance(keys, dict) and not set(keys) & set(subcommands):
            command = arguments[called] if called < len(arguments) else "fit"
            raise ValueError(f"--config comes after the subcommand: lit-accel {command} --config {given}")


def check_config_file(given: str) -> None:
    """Check that a configuration file is there, is YAML and holds a mapping in which no key comes twice.

    Args:
        given: What was given as ``--config``: a path; or a configuration itself, or an address, which are not read.

    Raises:
        ValueError: If not.
    """
    path = Path(given).expanduser()
    if not given or "\n" in given or given.lstrip().startswith("{") or "://" in given:
        return
    if not path.exists():
        raise ValueError(f"There is no file {given}, given as --config.{_near(path)}")
    if path.is_dir():
        raise ValueError(f"{given}, given as --config, is a folder. Give one YAML file of it, or several --config.")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{given} is no text, and so no YAML file ({error}). Give a configuration file.") from error
    except OSError as error:
        raise ValueError(f"{given} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{given} is no valid YAML{_place(error)}") from error
    if root is None:
        raise ValueError(f"{given} is empty. A configuration is a mapping, with keys such as trainer, model and data.")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise ValueError(
            f"{given} holds {kind}. A configuration is a mapping, with keys such as trainer, model and data."
        )
    for key, value in root.value:
        if key.value in ("trainer", "model", "data") and isinstance(value, yaml.SequenceNode):
            raise ValueError(f"{given} has a list as {key.value}. It must be a mapping, of arguments and their values.")
    if twice := next(_repeated(root, ""), None):
        raise ValueError(
            f"{given} has the key {twice[0]} twice, the second time in line {twice[1]}. Leave one of them."
        )


def _near(path: Path) -> str:
    """Ask after the nearest file of the folder that a path names."""
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    return did_you_mean(str(path), [str(file) for file in path.parent.iterdir()])


def _place(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:
        return f": {' '.join(str(error).split())}"
    if problem and "'\\t'" in problem:
        problem = "a tab, where YAML allows only blanks; indent with two of them"
    return f", in line {mark.line + 1}, column {mark.column + 1}: {problem}."


def _repeated(node: yaml.Node, where: str) -> Iterator[tuple[str, int]]:
    """Yield each key that a mapping has twice, with its line."""
    children: Iterable[tuple[str, yaml.Node]] = ()
    if isinstance(node, yaml.MappingNode):
        seen = Counter[str]()
        for key, _ in node.value:
            name = f"{where}{key.value}"
            seen[name] += 1
            if seen[name] == 2 and key.value != "<<":
                yield name, key.start_mark.line + 1
        children = [(f"{where}{key.value}.", child) for key, child in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(where, child) for child in node.value]
    for name, child in children:
        yield from _repeated(child, name)


def check_checkpoint(given: Any, *, is_resumed: bool) -> Mapping[str, Any] | None:
    """Check that a file can be what a run goes on from, and return what is in it.

    Args:
        given: What was given as ``--ckpt_path``.
        is_resumed: Whether training goes on, which needs more than weights.

    Returns:
        Its content; ``None`` where there is no file to look into: none was given, a folder, or an address.

    Raises:
        MisconfigurationException: If it cannot.
    """
    if not given or str(given).partition(":")[0] in _KEYWORDS or "://" in str(given):
        return None
    path = Path(given).expanduser()
    if not path.exists():
        raise MisconfigurationException(f"There is no checkpoint {given}, given as --ckpt_path.{_near(path)}")
    if path.is_dir():
        # The last two are DeepSpeed's.
        if not any((path / name).exists() for name in (".metadata", "checkpoint", "latest")):
            raise MisconfigurationException(
                f"{given}, given as --ckpt_path, is a folder and no checkpoint of several processes. Give the file in "
                "it, such as checkpoints/last.ckpt."
            )
        return None
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise MisconfigurationException(
            f"{given} can be read, and is no checkpoint of Lightning: it has no state_dict. Give a .ckpt file that a "
            "Trainer wrote; weights alone are loaded in Python, with load_state_dict."
        )
    if is_resumed and ("optimizer_states" not in checkpoint or "loops" not in checkpoint):
        raise MisconfigurationException(
            f"{given} holds weights only, without optimizer and position in the run, so training cannot go on from it. "
            "Give a checkpoint that was saved with save_weights_only=False; this one can be validated."
        )
    return checkpoint


def _read(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise MisconfigurationException(
            f"{path} is empty: writing it was cut off. Give an earlier checkpoint of the run."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        with path.open("rb") as file:
            begins_as_one = file.read(2) == b"PK"
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise MisconfigurationException(
                f"{path} holds objects of classes that torch does not load from a file, since loading them can run "
                "code. Give a checkpoint of tensors and plain values, such as those of lit-accel's tasks."
            ) from error
        if begins_as_one:
            raise MisconfigurationException(
                f"{path} is a damaged checkpoint: its end is missing, as where a disk was full or a process was "
                "killed while it wrote. Give an earlier checkpoint of the run."
            ) from error
        raise MisconfigurationException(
            f"{path} is no checkpoint: torch.load cannot read it. Give a .ckpt file that a Trainer wrote."
        ) from error


def check_same_model(checkpoint: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Check that a configuration asks for the model of a checkpoint, whose own settings would hold in silence.

    Args:
        checkpoint: The content of the checkpoint.
        model: What the configuration says of the model: its class and arguments.

    Raises:
        MisconfigurationException: If it asks for another one.
    """
    stored = checkpoint.get("hyper_parameters") or {}
    kinds = [str(path).rpartition(".")[2] for path in (stored.get("_class_path"), model.get("class_path"))]
    if stored.get("_class_path") and kinds[0] != kinds[1]:
        raise MisconfigurationException(
            f"The checkpoint is of a {kinds[0]}, and the configuration has a {kinds[1]}. Give the configuration that "
            "it was trained with; it lies in the folder of its run."
        )
    given = dict(model.get("init_args") or {})
    defaults = _defaults(str(model.get("class_path")))
    for name in stored.keys() & given.keys():
        value, was = _written(given[name]), stored[name]
        if value is None or list(_flat(value)) == list(_flat(was)):
            continue
        if value == _written(defaults.get(name)):
            # Nobody knows whether it was given.
            rank_zero_warn(
                f"model.{name} is {value!r}, its default, and the checkpoint was trained with {was!r}, which holds. "
                "Give the configuration that it was trained with, which lies in the folder of its run."
            )
        else:
            raise MisconfigurationException(
                f"model.{name} is {value!r}, and the checkpoint was trained with {was!r}, which would hold. Give the "
                "configuration that it was trained with, or start a new run without --ckpt_path."
            )


def _defaults(class_path: str) -> dict[str, Any]:
    """Return the default of each argument of a class."""
    return {name: parameter.default for name, parameter in parameters_of(class_at(class_path)).items()}


def _written(value: Any) -> Any:
    """Return a value as a checkpoint has it, which holds what a configuration file would."""
    if isinstance(value, Mapping):
        return {name: _written(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(entry) for entry in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return f"{value.__module__}.{value.__qualname__}" if inspect.isroutine(value) or inspect.isclass(value) else value


def _flat(value: Any) -> Iterator[Any]:
    """Yield what is in a value, whether it came as a list or as a tuple."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield name
            yield from _flat(value[name])
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _flat(entry)
    else:
        yield value


def check_trainer(config: Mapping[str, Any]) -> None:
    """Check what a Trainer is made from, where Lightning would speak of something else.

    Args:
        config: Its arguments, with callbacks that are made.

    Raises:
        MisconfigurationException: If it cannot be made from them.
    """
    strategy = config.get("strategy")
    if isinstance(strategy, str) and strategy != "auto" and strategy not in StrategyRegistry:
        raise MisconfigurationException(
            f"trainer.strategy is {strategy!r}, which is no strategy.{did_you_mean(strategy, StrategyRegistry)} There "
            f"are auto, {', '.join(sorted(StrategyRegistry))}."
        )
    accelerator = config.get("accelerator")
    if isinstance(accelerator, str) and accelerator in (*AcceleratorRegistry, "gpu"):
        kinds = ("cuda", "mps") if accelerator == "gpu" else (accelerator,)
        if not any(AcceleratorRegistry[kind]["accelerator"].is_available() for kind in kinds):
            raise MisconfigurationException(
                f"trainer.accelerator is {accelerator!r}, and torch finds none on this machine. Set it to auto, which "
                "takes what there is, or to cpu."
            )
    for name, least in _LEAST.items():
        value = config.get(name)
        if value is not None and not (is_number(value) and value >= least):
            raise MisconfigurationException(f"trainer.{name} is {value!r}; it is a number, at least {least}.")
    stateful = [c for c in config.get("callbacks") or () if is_overridden("state_dict", instance=c, parent=L.Callback)]
    for key, number in Counter(callback.state_key for callback in stateful).items():
        if number > 1:
            name = type(next(callback for callback in stateful if callback.state_key == key)).__name__
            raise MisconfigurationException(
                f"trainer.callbacks has {number} callbacks {name}, with the same settings or of a kind of which a run "
                "has one. If the recipe has one already, change its settings there, or begin with a recipe that has "
                "none."
            )


def require_end(config: Mapping[str, Any]) -> None:
    """Check that a run ends: Lightning's own default is a thousand epochs.

    Args:
        config: The Trainer's arguments.

    Raises:
        MisconfigurationException: If nobody has said when it does, or it does before its first step.
    """
    if config.get("limit_train_batches") == 0:
        raise MisconfigurationException(
            "trainer.limit_train_batches is 0: nothing would be trained. Give a number of batches, or a share of them."
        )
    if config.get("max_steps") == 0 or config.get("max_epochs") == 0:
        raise MisconfigurationException(
            "A run of 0 steps trains nothing. Give --trainer.max_steps the number of optimizer steps; to look at a "
            "model without training use `lit-accel validate`, to know what a run costs `lit-accel plan`."
        )
    ends = config.get("max_steps", -1) != -1 or config.get("max_epochs") is not None or config.get("max_time")
    if not ends and not config.get("fast_dev_run"):
        raise MisconfigurationException(
            "How long is the run? Give --trainer.max_steps, the number of optimizer steps, or --trainer.max_epochs. "
            "Without either Lightning would train for 1,000 epochs; --trainer.max_epochs -1 is a run without an end."
        )
