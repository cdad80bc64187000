"""A transformer with some of its units off: as a smaller model, or as masks over a whole one.

The whole parameters are the truth. While units are off, those of neurons and heads keep what leads into them and are
zero in what comes out of them: the whole model computes the same as one without them, and a unit that is switched on
again changes nothing at first and yet can learn (were both sides zero, both gradients would be zero for ever). Entries,
N:M groups and tiles that are off are zero.

*Compact* execution takes the units that are on out of the whole parameters, with their optimizer state, and trains
these: dense products of a smaller size. The ``Parameter`` objects stay, so that optimizers, schedulers and everybody
else who holds them need not know. State dicts of model and optimizer are always those of the whole model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_accel.anatomy import Anatomy, describe_as, parse_layout
from lit_accel.methods.mixed_sparsity.units import AxisUnits, MatrixUnits, UnitSpace
from lit_accel.methods.mixed_sparsity.views import AxisView, GroupedForward, TileView, View, is_linear

Execution = Literal["compact", "masked"]
Masks = dict[str, Tensor]
"""Which units are on, by the name of their space; each of shape (groups, units)."""


class SparseModel:
    """Switches units of a transformer on and off.

    Args:
        transformer: The model, whole.
        anatomy: Its anatomy.
        spaces: Its units, by name.
        execution: ``"compact"`` trains a smaller model where units allow it, ``"masked"`` a whole one throughout.
        masks: Which units are on; default: all. The model must agree with them.
    """

    def __init__(
        self,
        transformer: nn.Module,
        anatomy: Anatomy,
        spaces: Mapping[str, UnitSpace],
        execution: Execution = "compact",
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.transformer, self.anatomy, self.spaces, self.execution = transformer, anatomy, dict(spaces), execution
        self.parameters = dict(transformer.named_parameters())
        device = next(iter(self.parameters.values())).device
        self.masks: Masks = {
            name: torch.ones(space.num_groups, space.num_units, dtype=torch.bool, device=device)
            if masks is None
            else masks[name].to(device)
            for name, space in self.spaces.items()
        }
        self.counts = {name: int(mask[0].sum()) for name, mask in self.masks.items()}
        """How many units of a group are on, by the name of their space."""
        self.optimizers: list[Optimizer] = []
        self.is_compact = False
        self.num_reshapings = 0
        """How often parameters have changed their shapes."""
        self._views: dict[str, View] = {}
        self._whole: dict[str, Tensor] = {}
        self._off: dict[str, Tensor] = {}
        self._dormant: dict[str, Tensor] = {}
        self._restorers: list[Callable[[], None]] = []
        self._hooks: list[RemovableHandle] = []
        if masks is not None:
            self._note_masks()

    @property
    def is_dense(self) -> bool:
        """Whether every unit is on."""
        return all(self.counts[name] == space.num_units for name, space in self.spaces.items())

    # The topology

    @torch.no_grad()
    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Switch units on and off; the model must be whole.

        What comes out of dropped units becomes zero, and so does the optimizer's state of dropped and grown ones.

        Args:
            masks: The new masks, of all spaces.
        """
        assert not self.is_compact
        changed = {name: masks[name] & self.masks[name] for name in self.spaces}
        for name, space in self.spaces.items():
            if bool((masks[name] == self.masks[name]).all()):
                continue
            for parameter, clears_weight, stays in self._entries(space, changed[name]):
                tensor = self.parameters[parameter]
                for state in self._moments(tensor):
                    state.masked_fill_(~stays, 0)
                if clears_weight:
                    # What was off is zero already, and what is grown starts there.
                    tensor.masked_fill_(~stays, 0)
        self.masks = {name: mask.clone() for name, mask in masks.items()}
        # As many in each group; on a GPU each of these waits for it.
        self.counts = {name: int(mask[0].sum()) for name, mask in self.masks.items()}
        self._note_masks()

    def _note_masks(self) -> None:
        """Work out which entries of parameters that stay whole are off."""
        self._off, self._dormant = {}, {}
        for name, space in self.spaces.items():
            if self._takes_out(space) or self.counts[name] == space.num_units:
                continue
            for parameter, is_zero, on in self._entries(space, self.masks[name]):
                self._off[parameter] = ~on
                if not is_zero:
                    self._dormant[parameter] = self.parameters[parameter].detach().clone()

    def _entries(self, space: UnitSpace, mask: Tensor) -> Iterable[tuple[str, bool, Tensor]]:
        """Yield each parameter of a space, whether its entries are zero where units are off, and those that are on."""
        if isinstance(space, MatrixUnits):
            yield space.parameter, True, space.entries(mask)
            return
        assert isinstance(space, AxisUnits)
        for carrier in space.carriers:
            tensor = self.parameters[carrier.name]
            dim = carrier.layout.dims[carrier.dim]
            positions = space.positions(carrier, mask[0].nonzero().flatten().cpu()).to(tensor.device)
            on = torch.zeros(dim.size(space.axes), dtype=torch.bool, device=tensor.device)
            on[positions] = True
            shape = [-1 if place == carrier.dim else 1 for place in range(len(carrier.layout.dims))]
            yield carrier.name, carrier.is_output, on.view(shape).expand(carrier.layout.shape(space.axes))

    @torch.no_grad()
    def magnitudes(self) -> dict[str, Tensor]:
        """Score all units by their weights; the model must be whole."""
        return {name: space.magnitude(self.parameters) for name, space in self.spaces.items()}

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor | None]:
        """Score all units by the gradients that the whole model has; ``None`` for a block that was skipped."""
        scores: dict[str, Tensor | None] = {}
        for name, space in self.spaces.items():
            found = {each: self.parameters[each].grad for each in space.names}
            gradients = {each: grad for each, grad in found.items() if grad is not None}
            scores[name] = space.gradient(gradients) if len(gradients) == len(found) else None
        return scores

    # Between backward pass and optimizer step, and after it

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Clear the gradients of entries that are off."""
        for name, off in self._off.items():
            if (grad := self.parameters[name].grad) is not None:
                grad.masked_fill_(off, 0)

    @torch.no_grad()
    def hold_off(self) -> None:
        """Undo what an optimizer, by its weight decay, has done to units that are off and not zero.

        Where weight, gradient and optimizer state are zero, they stay so.
        """
        for name, dormant in self._dormant.items():
            parameter, off = self.parameters[name], self._off[name]
            torch.where(off, dormant, parameter, out=parameter.data)
            for state in self._moments(parameter):
                state.masked_fill_(off, 0)

    # The smaller model

    def _takes_out(self, space: UnitSpace) -> bool:
        return self.execution == "compact" and space.is_separable

    @torch.no_grad()
    def compact(self) -> None:
        """Hold only the units that are on, where they can be taken out; gradients and optimizer state with them."""
        if self.is_compact:
            return
        for name, space in self.spaces.items():
            mask = self.masks[name]
            if not self._takes_out(space) or self.counts[name] == space.num_units:
                continue
            if isinstance(space, AxisUnits):
                for carrier in space.carriers:
                    parameter = self.parameters[carrier.name]
                    self._views[carrier.name] = AxisView(space, carrier, mask, parameter.device)
                self._set_sizes(space, self.counts[name])
            elif isinstance(space, MatrixUnits):
                tiles = TileView(space, mask, self.parameters[space.parameter].device)
                self._views[space.parameter] = tiles
                self._group(space.parameter, tiles)
        if not self._views:
            return
        self.is_compact = True
        self.num_reshapings += 1
        for name, view in self._views.items():
            parameter = self.parameters[name]
            self._whole[name] = parameter.data
            self._replace(parameter, view.gather)
        # It is held in another form than its config and its tables say.
        describe_as(self.transformer, self.anatomy)
        self._hooks.append(self.transformer.register_state_dict_post_hook(_WholeModel(self)))
        self._hooks.append(self.transformer.register_load_state_dict_pre_hook(_TakeModel(self)))
        for optimizer in self.optimizers:
            self._hooks.append(optimizer.register_state_dict_post_hook(_WholeOptimizer(self)))
            self._hooks.append(optimizer.register_load_state_dict_pre_hook(_TakeOptimizer(self)))

    @torch.no_grad()
    def expand(self) -> None:
        """Be the whole model again; what is off has neither gradient nor optimizer state."""
        if not self.is_compact:
            return
        for name, view in self._views.items():
            whole = self._whole[name]
            view.scatter(self.parameters[name].data, whole)

            def spread(tensor: Tensor, view: View = view, whole: Tensor = whole) -> Tensor:
                full = torch.zeros_like(whole, dtype=tensor.dtype)
                view.scatter(tensor, full)
                return full

            self._replace(self.parameters[name], spread, whole)
        for restore in self._restorers:
            restore()
        for hook in self._hooks:
            hook.remove()
        self._restorers, self._hooks, self._views, self._whole = [], [], {}, {}
        describe_as(self.transformer, None)
        self.is_compact = False
        self.num_reshapings += 1

    def _replace(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor], data: Tensor | None = None) -> None:
        states = [
            (state, key, change(value))
            for state in self._states(parameter)
            for key, value in state.items()
            if _is_moment(value, parameter)
        ]
        grad = None if parameter.grad is None else change(parameter.grad)
        data = change(parameter.data) if data is None else data
        parameter.grad = None
        # Autograd remembers the shape of a parameter for as long as anything holds an old graph or DDP its hooks, and
        # forgets it only where the type changes. (Not by way of 64 bits, which Apple's devices have not.)
        parameter.data = data.new_empty(0, dtype=torch.float16 if data.dtype != torch.float16 else torch.float32)
        parameter.data = data
        parameter.grad = grad
        for state, key, value in states:
            state[key] = value

    def _states(self, parameter: nn.Parameter) -> list[dict[str, Any]]:
        return [optimizer.state[parameter] for optimizer in self.optimizers if parameter in optimizer.state]

    def _moments(self, parameter: nn.Parameter) -> list[Tensor]:
        return [v for state in self._states(parameter) for v in state.values() if _is_moment(v, parameter)]

    def _set_sizes(self, space: AxisUnits, num_active: int) -> None:
        """Tell the modules of a block how many heads or neurons they have."""
        axes = {**space.axes, space.axis: num_active}
        block = self.anatomy.blocks[space.block]
        root = self.transformer.get_submodule(block.path)
        for path, layout in block.attributes.items():
            owner, _, attribute = path.rpartition(".")
            (dim,) = parse_layout(layout)
            if space.axis in dim.names:
                self._set(root.get_submodule(owner), attribute, dim.size(axes))
        for carrier in space.carriers:
            if not carrier.layout.is_matrix:
                continue
            module = self.transformer.get_submodule(carrier.name.rpartition(".")[0])
            for attribute in ("in_features", "nx") if carrier.is_output else ("out_features", "nf"):
                self._set(module, attribute, carrier.layout.dims[carrier.dim].size(axes))

    def _set(self, module: nn.Module, attribute: str, value: int) -> None:
        if not hasattr(module, attribute):
            return
        before = getattr(module, attribute)
        setattr(module, attribute, value)
        self._restorers.append(lambda: setattr(module, attribute, before))

    def _group(self, name: str, view: TileView) -> None:
        module = self.transformer.get_submodule(name.rpartition(".")[0])
        assert is_linear(module)
        before = vars(module).get("forward")
        module.forward = GroupedForward(module, view.columns)
        self._restorers.append(
            lambda: delattr(module, "forward") if before is None else setattr(module, "forward", before)
        )

    def whole(self, name: str, tensor: Tensor, fills: bool) -> Tensor:
        """Return a parameter, or something of its present shape, in whole.

        Args:
            name: The parameter.
            tensor: It, or its gradient or an entry of its optimizer state.
            fills: Whether units that are off have their stored weights, and not zero.
        """
        if name not in self._views:
            return tensor
        full = self._whole[name].clone() if fills else torch.zeros_like(self._whole[name], dtype=tensor.dtype)
        self._views[name].scatter(tensor.detach(), full)
        return full

    def take(self, name: str, tensor: Tensor, is_weight: bool) -> Tensor:
        """Return a whole parameter, or something of its shape, in its present form.

        Args:
            name: The parameter.
            tensor: It, or an entry of its optimizer state.
            is_weight: Whether it takes the place of the stored weights.
        """
        if name not in self._views or tensor.shape != self._whole[name].shape:
            return tensor
        if is_weight:
            self._whole[name].copy_(tensor)
        return self._views[name].gather(tensor.to(self._whole[name].device))

    @property
    def compact_names(self) -> tuple[str, ...]:
        """The parameters that are held in a smaller form."""
        return tuple(self._views)


def _is_moment(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


class _WholeModel:
    """A hook that makes a model's state dict that of the whole model; nothing in copies of it.

    Args:
        model: Whose parameters are held in a smaller form.
    """

    def __init__(self, model: SparseModel | None = None) -> None:
        self._model = model

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        if self._model is not None and module is self._model.transformer:
            for name in self._model.compact_names:
                key = f"{prefix}{name}"
                state_dict[key] = self._model.whole(name, state_dict[key], fills=True)

    def __reduce__(self) -> tuple[type[_WholeModel], tuple[()]]:
        return _WholeModel, ()


class _TakeModel:
    """A hook that lets the weights of a whole model be loaded; nothing in copies of the model.

    Args:
        model: Whose parameters are held in a smaller form.
    """

    def __init__(self, model: SparseModel | None = None) -> None:
        self._model = model

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._model is not None and module is self._model.transformer:
            for name in self._model.compact_names:
                if (key := f"{prefix}{name}") in state_dict:
                    state_dict[key] = self._model.take(name, state_dict[key], is_weight=True)

    def __reduce__(self) -> tuple[type[_TakeModel], tuple[()]]:
        return _TakeModel, ()


class _OptimizerHook(ABC):
    """What an optimizer's state dict goes through, entry by entry of compact parameters; nothing in copies.

    Args:
        model: Whose parameters are held in a smaller form.
    """

    def __init__(self, model: SparseModel | None = None) -> None:
        self._model = model

    def __call__(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if self._model is None:
            return state_dict
        names = {id(self._model.parameters[name]): name for name in self._model.compact_names}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = dict(state_dict["state"])
        for index, parameter in enumerate(parameters):
            name = names.get(id(parameter))
            if name is not None and index in states:
                states[index] = {
                    key: self.convert(self._model, name, value) if isinstance(value, Tensor) and value.dim() else value
                    for key, value in states[index].items()
                }
        return {**state_dict, "state": states}

    @abstractmethod
    def convert(self, model: SparseModel, name: str, value: Tensor) -> Tensor:
        """Return an entry of a parameter's state in another form."""

    def __reduce__(self) -> tuple[type[_OptimizerHook], tuple[()]]:
        return type(self), ()


class _WholeOptimizer(_OptimizerHook):
    """Makes an optimizer's state dict that of the whole model."""

    def convert(self, model: SparseModel, name: str, value: Tensor) -> Tensor:
        """Return it in whole."""
        return model.whole(name, value, fills=False) if value.shape == model.parameters[name].shape else value


class _TakeOptimizer(_OptimizerHook):
    """Lets the state of the whole model be loaded."""

    def convert(self, model: SparseModel, name: str, value: Tensor) -> Tensor:
        """Return what belongs to the units that are on."""
        return model.take(name, value, is_weight=False)
