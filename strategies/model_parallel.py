"""Sharded training (FSDP2) with a model that can change its size."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lit_accel.anatomy import find_transformer
from lit_accel.checkpoints import local_path, replaced_folder, whole_folder
from lit_accel.resizing import OptimizerState, rebuild_recorded_size, recorded_size, replace_transformer
from lit_accel.strategies.resizing import ResizeEvent, ResizeMixin, group_options, restore_options
from lit_accel.strategies.sharding import (
    copy_structure,
    equalize,
    gather,
    refuse_sharded,
    shard,
    shard_like,
    unit_paths,
    whole_tensor,
)

_METADATA = "meta.pt"
_GROUP_OPTIONS = "lit_accel_group_options"
_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")


class ResizableModelParallelStrategy(ResizeMixin, ModelParallelStrategy):
    """Fully sharded data parallel training (FSDP2), one process a device; registered as ``resizable_model_parallel``.

    Weights, gradients and optimizer state are divided among the processes; each block's weights are gathered when it
    is their turn. The strategy shards the model itself, by its anatomy: the LightningModule needs no
    ``configure_model``, and one that applies ``fully_shard`` is refused. All ranks begin with rank 0's weights.

    A resize gathers the whole transformer in the CPU memory of every process, with its moments where they are
    carried over, maps it there and shards the result. After ``fit`` the model stays sharded:
    :meth:`gather_transformer` returns a plain copy, and checkpoints with ``save_distributed_checkpoint=False`` are
    those of an ordinary run.

    Args:
        data_parallel_size: The number of processes; ``"auto"`` takes all.
        tensor_parallel_size: Must be 1: a matrix is not divided within a layer.
        *args: Further arguments of :class:`~lightning.pytorch.strategies.ModelParallelStrategy`.
        **kwargs: The same by name, such as ``save_distributed_checkpoint``.

    Raises:
        MisconfigurationException: If ``tensor_parallel_size`` is not 1.

    Example::

        Trainer(strategy="resizable_model_parallel", devices=8)
    """

    strategy_name = "resizable_model_parallel"

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if tensor_parallel_size != 1:
            raise MisconfigurationException(
                f"tensor_parallel_size is {tensor_parallel_size!r}; resizable_model_parallel shards over the "
                "data-parallel processes alone. Leave tensor_parallel_size out, or set it to 1."
            )
        super().__init__(data_parallel_size, tensor_parallel_size, *args, **kwargs)
        self._units: list[nn.Module] = []
        self._structure: nn.Module | None = None

    # Sharding

    def setup_environment(self) -> None:
        """Start the process group and the device mesh.

        Raises:
            MisconfigurationException: If the precision is one that sharded parameters do not work with.
        """
        # Lightning checks this for strategies that are given as objects, not for those given by name.
        if self.precision_plugin.precision not in _PRECISIONS:
            raise MisconfigurationException(
                f"resizable_model_parallel does not support precision={self.precision_plugin.precision!r}; use one of "
                f"{', '.join(_PRECISIONS)}."
            )
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Shard what is not sharded yet, and make the optimizers."""
        assert self.lightning_module is not None
        # What a resize has left behind goes before anything new comes.
        self.optimizers, self.lr_scheduler_configs = [], []
        present = set(self.lightning_module.modules())
        if any(unit not in present for unit in self._units):
            self._units = [unit for unit in self._units if unit in present]
            self._structure = None
            # A sharded module and its state refer to each other. What refers to a compiled one goes first, so twice.
            gc.collect()
            gc.collect()
        # What inference mode has gathered could not be trained afterwards. Lightning knows that of FSDPStrategy alone.
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        # The setup of ModelParallelStrategy insists on a configure_model that shards; the general one does the rest.
        super(ModelParallelStrategy, self).setup(trainer)
        self.barrier("setup")

    def model_to_device(self) -> None:
        """Shard the model, which brings it to the devices unit by unit, and then whatever is not sharded."""
        module = self.lightning_module
        assert module is not None
        _reshard(module)
        paths = unit_paths(module)
        new = [path for path in paths if module.get_submodule(path) not in self._units]
        for path in new:
            refuse_sharded(module.get_submodule(path))
        path, transformer = find_transformer(module)
        if path in new:
            self._structure = copy_structure(transformer)
        shard(module, new, self.device_mesh["data_parallel"], self.root_device)
        self._units = [module.get_submodule(path) for path in paths]
        equalize((p for p in module.parameters() if not isinstance(p, DTensor)), self.root_device)
        equalize(module.buffers(), self.root_device)
        super().model_to_device()

    def gather_transformer(self) -> nn.Module:
        """Return a plain copy of the transformer, with all its weights, on the CPU; call it on all ranks.

        Raises:
            MisconfigurationException: If the model is not sharded yet.
        """
        if self.lightning_module is None or self._structure is None:
            raise MisconfigurationException(
                "The model is sharded once training or evaluation has begun: there is nothing to gather yet."
            )
        transformer = find_transformer(self.lightning_module)[1]
        _reshard(transformer)
        return gather(transformer, self._structure)

    # Resizing

    def resize(
        self, rebuild: Callable[[], None], carry: Callable[[OptimizerState], OptimizerState] | None = None
    ) -> ResizeEvent:
        """Change the model in mid-training; see :meth:`ResizeMixin.resize`.

        ``rebuild`` finds the transformer whole, on the CPU, and leaves its successor there; other children of the
        LightningModule stay sharded. ``carry`` receives and returns whole tensors on the CPU. If ``rebuild`` fails,
        the sharded transformer is back in its place.
        """
        module = self.lightning_module

        def rebuild_whole() -> None:
            assert module is not None
            path, sharded = find_transformer(module)
            replace_transformer(module, path, self.gather_transformer())
            try:
                rebuild()
            except BaseException:
                replace_transformer(module, path, sharded)
                raise

        if module is not None:
            _reshard(module)
        return super().resize(rebuild_whole, carry)

    def whole(self, value: Any) -> Any:
        """Gather an entry of an optimizer's state."""
        return whole_tensor(value)

    def placed(self, value: Any, parameter: nn.Parameter) -> Any:
        """Shard an entry of a parameter's state as the parameter is."""
        return shard_like(value, parameter) if isinstance(value, Tensor) else value

    # Checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint, with all options of the parameter groups.

        A distributed checkpoint restores only those options that new optimizers have by themselves, which is not
        enough for what schedulers and methods keep there.
        """
        if not self._save_distributed_checkpoint or storage_options is not None:
            super().save_checkpoint(checkpoint, local_path(filepath), storage_options)
            return
        if "optimizer_states" in checkpoint:
            checkpoint[_GROUP_OPTIONS] = [group_options(optimizer) for optimizer in self.optimizers]
        path = self.broadcast(local_path(filepath))
        with replaced_folder(path, is_writer=self.is_global_zero, barrier=self.barrier) as folder:
            super().save_checkpoint(checkpoint, folder)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Bring the model to the size that a checkpoint was written at, and load it; all ranks need its files."""
        module = self.lightning_module
        assert module is not None
        path = whole_folder(self.broadcast(local_path(checkpoint_path)))
        metadata_path = path / _METADATA if path.is_dir() else path
        # What is no checkpoint is for Lightning to complain of.
        if metadata_path.is_file():
            metadata = torch.load(metadata_path, mmap=True, map_location="cpu", weights_only=weights_only)
            if recorded_size(module, metadata) is not None:
                replace_transformer(module, find_transformer(module)[0], self.gather_transformer())
                rebuild_recorded_size(module, metadata)
                self.setup(module.trainer)
        checkpoint = super().load_checkpoint(path, weights_only)
        if self.optimizers:
            restore_options(_recorded_options(checkpoint), self.optimizers)
        return checkpoint


def _reshard(module: nn.Module) -> None:
    """Free gathered weights: after an evaluation some are left, in the place of the sharded parameters."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def _recorded_options(checkpoint: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    if _GROUP_OPTIONS in checkpoint:
        return checkpoint[_GROUP_OPTIONS]
    groups = [state["param_groups"] for state in checkpoint.get("optimizer_states", [])]
    return [
        [{key: value for key, value in group.items() if key not in ("params", "param_names")} for group in state]
        for state in groups
    ]
