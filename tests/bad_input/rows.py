"""What a row of the table of bad input says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command that cannot work.

    Args:
        name: What is wrong with it.
        args: What is added to ``lit-accel SUBCOMMAND --config BASE``.
        message: A part of what it says.
        base: Which of the configurations that do work it begins with; ``None`` for none.
        subcommand: ``fit`` and so on; ``None`` for none.
        files: What lies in its folder besides, by name.
        code: Its exit code: 2 where the arguments cannot be read, 1 where they cannot work.
    """

    name: str
    args: tuple[str, ...]
    message: str
    base: str | None = "gpt"
    subcommand: str | None = "fit"
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    code: int = 1


@dataclass(frozen=True)
class Call:
    """Python code that cannot work.

    Args:
        name: What is wrong with it.
        make: The code; it is called in an empty folder.
        message: A part of what its exception says.
        error: Kind of the exception.
        raised_by: Whose code raises it.
        why: Why it is not ours, where it is not.
    """

    name: str
    make: Callable[[], Any]
    message: str
    error: type[Exception] = ValueError
    raised_by: str = "lit_accel"
    why: str = ""


_PYTHON = "Python itself refuses the keyword, and names it"


def call(name: str, make: Callable[[], Any], message: str, **kwargs: Any) -> Call:
    """Return a row of Python."""
    return Call(name, make, message, **kwargs)


def keyword(kind: str, make: Callable[[], Any], message: str) -> Call:
    """Return a row of a keyword that there is not."""
    return Call(f"an unknown keyword of {kind}", make, message, error=TypeError, raised_by="tests", why=_PYTHON)


def wrong(name: str, args: str | Iterable[str], message: str, **kwargs: Any) -> Command:
    """Return a row of a command, with one argument or several."""
    return Command(name, (args,) if isinstance(args, str) else tuple(args), message, **kwargs)


def overrides(**fields: Any) -> str:
    """Return the argument with other sizes of the GPT."""
    given = {"n_layer": 4, "n_embd": 16, "n_head": 4, "n_positions": 16, **fields}
    return "--model.overrides={" + ", ".join(f'"{name}": {value}' for name, value in given.items()) + "}"
