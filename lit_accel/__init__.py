"""Components for PyTorch Lightning that make transformers cheaper to train, and say honestly by how much."""

from lit_accel import strategies
from lit_accel.batch_seed import BatchSeed
from lit_accel.checkpoints import AtomicCheckpointIO
from lit_accel.compute import ComputeLedger
from lit_accel.methods.composition import Composition
from lit_accel.methods.guard import NonFiniteError, TrainingGuard
from lit_accel.methods.layer_dropping.mixins import ProgressiveLayerDroppingMixin, SensitivityLayerDroppingMixin
from lit_accel.methods.layer_dropping.pld import ProgressiveLayerDropping
from lit_accel.methods.layer_dropping.sbld import SensitivityLayerDropping
from lit_accel.methods.mixed_sparsity.callback import MixedSparsityTraining
from lit_accel.methods.mixed_sparsity.mixin import MixedSparsityMixin
from lit_accel.methods.multilevel.callback import MultiLevelTraining
from lit_accel.methods.multilevel.mixin import MultiLevelMixin
from lit_accel.methods.multilevel.phases import Level, Phase
from lit_accel.methods.token_dropping.callback import RandomLTD
from lit_accel.methods.token_dropping.learning_rate import LayerTokenLR
from lit_accel.methods.token_dropping.mixin import RandomLTDMixin
from lit_accel.resizing import ResizableMixin

__all__ = [
    "AtomicCheckpointIO",
    "BatchSeed",
    "Composition",
    "ComputeLedger",
    "LayerTokenLR",
    "Level",
    "MixedSparsityMixin",
    "MixedSparsityTraining",
    "MultiLevelMixin",
    "MultiLevelTraining",
    "NonFiniteError",
    "Phase",
    "ProgressiveLayerDropping",
    "ProgressiveLayerDroppingMixin",
    "RandomLTD",
    "RandomLTDMixin",
    "ResizableMixin",
    "SensitivityLayerDropping",
    "SensitivityLayerDroppingMixin",
    "TrainingGuard",
    "strategies",
]
