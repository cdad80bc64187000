"""Mixed sparsity training (MST, arXiv 2408.11746): dynamic sparse training over units, from entries to heads."""

from lit_accel.methods.mixed_sparsity.attention import AttentionPattern
from lit_accel.methods.mixed_sparsity.distribution import densities
from lit_accel.methods.mixed_sparsity.dynamics import DynamicSparsity
from lit_accel.methods.mixed_sparsity.schedule import DEFAULT_STAGES, SparsitySchedule
from lit_accel.methods.mixed_sparsity.sparse_model import SparseModel
from lit_accel.methods.mixed_sparsity.targets import Shares, Targets
from lit_accel.methods.mixed_sparsity.topology import Change, highest, planned_change, updated
from lit_accel.methods.mixed_sparsity.units import AxisUnits, MatrixUnits, UnitsError, UnitSpace, spaces_of
from lit_accel.methods.mixed_sparsity.views import grouped_linear

__all__ = [
    "DEFAULT_STAGES",
    "AttentionPattern",
    "AxisUnits",
    "Change",
    "DynamicSparsity",
    "MatrixUnits",
    "Shares",
    "SparseModel",
    "SparsitySchedule",
    "Targets",
    "UnitSpace",
    "UnitsError",
    "densities",
    "grouped_linear",
    "highest",
    "planned_change",
    "spaces_of",
    "updated",
]
