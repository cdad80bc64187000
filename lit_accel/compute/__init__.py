"""What a step costs: closed-form FLOPs, the callback that adds them up, and reports over its tables."""

from lit_accel.compute.flops import Flops, forward_flops, training_flops
from lit_accel.compute.ledger import ComputeLedger
from lit_accel.compute.report import plot_report, saving_at_equal_loss
from lit_accel.compute.table import read_ledger

__all__ = [
    "ComputeLedger",
    "Flops",
    "forward_flops",
    "plot_report",
    "read_ledger",
    "saving_at_equal_loss",
    "training_flops",
]
