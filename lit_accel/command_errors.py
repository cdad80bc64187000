"""Which errors of a command are answers to its user, in one message, and which are faults that need a traceback.

An answer is an error of this package's own types, one that this package raises on purpose, or what the parser says.
Anything else, above all an error of a user's own code, keeps its traceback.
"""

from __future__ import annotations

import dis
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel.anatomy import AnatomyError
from lit_accel.command_messages import readable
from lit_accel.planning import PlanError

_OURS = (MisconfigurationException, AnatomyError, PlanError)
# What code raises on purpose; others, such as AssertionError, are faults wherever they come from.
_ANSWERS = (ValueError, TypeError, RuntimeError, ImportError, OSError)
_OF_A_WORKER = re.compile(
    r"Caught (?P<kind>\w+) in DataLoader worker process \d+\.\nOriginal (?P<trace>Traceback.*)", re.DOTALL
)

# Where Lightning checks what a Trainer was given. What it raises elsewhere may speak of a user's own code.
_CHECKS_OF_LIGHTNING = (
    "lightning.pytorch.trainer.connectors",
    "lightning.pytorch.loops.fit_loop",
    "lightning.fabric.utilities.seed",
)


@contextmanager
def answers() -> Iterator[None]:
    """End the process with one message on stderr, and exit code 1, where an error is an answer to its user."""
    try:
        yield
    except Exception as error:
        cause = _without_parser(error)
        message = answer(cause)
        if message is None:
            if cause is error:
                raise
            raise cause from cause.__cause__
        sys.exit(f"lit-accel: {message}")


def answer(error: BaseException) -> str | None:
    """Return what to tell the user; ``None`` if nobody has foreseen this.

    Args:
        error: What was raised.
    """
    if isinstance(error, _OURS):
        return _in_one_paragraph(str(error))
    if not isinstance(error, _ANSWERS):
        return None
    if is_raised_by(error, "torch.nn.modules.module") and "in loading state_dict" in str(error):
        first, *others = [" ".join(line.split()) for line in str(error).splitlines()[1:] if line.strip()]
        more = f" (and {len(others)} more)" if others else ""
        return f"The checkpoint does not fit the model: {first.rstrip('.')}{more}. Give the checkpoint of this model."
    if is_raised_by(error, "jsonargparse"):
        return readable(str(error))
    if (said := _said_by_worker(error)) is not None:
        return _in_one_paragraph(said)
    is_ours = any(is_raised_by(error, package) for package in ("lit_accel", *_CHECKS_OF_LIGHTNING))
    return _in_one_paragraph(str(error)) if is_ours else None


def is_raised_by(error: BaseException, package: str) -> bool:
    """Whether a ``raise`` of a package has raised an error, rather than something that went wrong in it.

    Args:
        error: What was raised.
        package: Name of the package.
    """
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    operation = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]]
    return (module == package or module.startswith(f"{package}.")) and operation == "RAISE_VARARGS"


def fault_at_import(error: BaseException | None, message: str) -> str | None:
    """Return what went wrong in a module while it was imported, and in which line of it.

    Args:
        error: What was raised, perhaps because of that.
        message: What is to be said of it. Other imports may have failed on the way, of which it says nothing.
    """
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        imported = [(frame, line) for frame, line in frames if frame.f_code.co_name == "<module>"]
        if imported and str(error) in message:
            frame, line = imported[-1]
            return f"{type(error).__name__} in line {line} of {frame.f_code.co_filename}: {str(error).rstrip('.')}."
        error = error.__cause__ or error.__context__
    return None


def _said_by_worker(error: BaseException) -> str | None:
    """Return what a ``raise`` of ours has said in a process that loads data, of which torch hands on the traceback."""
    match = _OF_A_WORKER.match(str(error))
    if match is None:
        return None
    frames = re.findall(r'^  File "(.+)", line \d+', match["trace"], re.MULTILINE)
    is_ours = bool(frames) and "lit_accel" in Path(frames[-1]).parts
    said = match["trace"].rpartition(f"\n{match['kind']}: ")[2]
    return said if is_ours else None


def _without_parser(error: Exception) -> BaseException:
    """Return what a class that the parser instantiates has raised, which the parser wraps."""
    cause: BaseException = error
    while is_raised_by(cause, "jsonargparse") and cause.__cause__ is not None:
        cause = cause.__cause__
    return cause


def _in_one_paragraph(message: str) -> str:
    """Join the lines of a message; those that are indented are a list."""
    message = re.sub(r"(?<=[^:;])\n\s+", "; ", message.strip())
    return " ".join(message.split())
