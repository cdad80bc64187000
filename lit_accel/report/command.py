"""``lit-accel report``: the command line."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from lit_accel.command_messages import readable
from lit_accel.report.build import report
from lit_accel.report.console import print_report
from lit_accel.report.runs import ReportError


def command(args: list[str] | None = None) -> int:
    """Run ``lit-accel report RUN [RUN ...]``.

    Args:
        args: Arguments as on the command line, after ``report``; ``None`` takes those of the process.

    Returns:
        The exit status: 0; after an error, which is one line on stderr, 1, and 2 if the arguments cannot be read.
    """
    parser = ArgumentParser(
        prog="lit-accel report",
        description="Say what methods saved against dense training, from the ledgers of finished runs.",
        exit_on_error=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=str,
        metavar="RUN",
        help="a ledger, a run's folder or a folder above runs; LABEL=RUN names its arm, by default its folder does",
    )
    parser.add_argument("--metric", type=str, default="val/loss", help="a monitored loss: lower is better")
    parser.add_argument(
        "--dense",
        action="append",
        type=str,
        metavar="LABEL",
        help="an arm of the dense frontier, given once for each; by default those that saved and added nothing",
    )
    parser.add_argument("--output", type=str, default=".", help="folder of report.html and report.png")
    try:
        given = parser.parse_args(args)
        made = report(given.runs, given.metric, given.dense, given.output)
    except ArgumentError as error:
        known = [option.lstrip("-") for option in parser._option_string_actions]
        is_empty = "required: runs" in str(error)
        said = "No run was given: give at least one folder of a run." if is_empty else readable(str(error), known)
        print(f"lit-accel report: {said} See `lit-accel report --help`.", file=sys.stderr)
        return 2
    except ReportError as error:
        print(f"lit-accel report: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print_report(made, Console())
    return 0
