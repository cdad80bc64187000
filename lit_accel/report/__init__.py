"""``lit-accel report``: what methods saved against dense training, from the ledgers of finished runs."""

from lit_accel.report.build import Report, report
from lit_accel.report.command import command
from lit_accel.report.console import print_report
from lit_accel.report.runs import ReportError

__all__ = ["Report", "ReportError", "command", "print_report", "report"]
