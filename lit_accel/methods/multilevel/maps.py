"""The linear maps between two levels, and their adjoints: how every tensor shrinks and grows along its named axes.

An axis of ``n`` entries that is divided by ``r`` is partitioned into ``n / r`` groups of ``r``. With ``T`` the
membership of entries in groups and ``F`` its transpose with rows divided by ``r`` (multi-level training, arXiv
2404.07999, equations 1 to 3; there ``F`` and ``T`` appear as matrices, here as sums and repeats):

==================  ============  ==============  ===========
operator            output axes   input axes      folded norm
==================  ============  ==============  ===========
``coalesce`` C      mean          sum             times r
``decoalesce`` D    repeat        repeat / r      divided by r
``coalesce_t`` Cᵀ   repeat / r    repeat          times r
``decoalesce_t`` Dᵀ sum           mean            divided by r
==================  ============  ==============  ===========

``C(D(x)) = x`` on every tensor. The adjoints carry gradients, and so optimizer moments, between levels.

Deviations from the authors' released code, each because its map is not exact: a tied embedding keeps scale 1
and the norm before the head carries the factor (there: a factor 2 on the table, which preserves the function
of no pre-norm model), and the value projection is mapped along its own axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_accel.anatomy import Anatomy, AnatomyError, Dim, ParameterLayout, Size

WidthGrouping = Literal["block", "adjacent"]
DepthGrouping = Literal["adjacent", "stack"]
DepthMode = Literal["avg", "ode", "zero"]
Operator = Literal["coalesce", "decoalesce", "coalesce_t", "decoalesce_t"]

# (what happens to output axes, to input axes, to a folded norm), as powers of the factor r.
_SCALE: dict[Operator, tuple[int, int, int]] = {
    "coalesce": (-1, 0, 1),
    "decoalesce": (0, -1, -1),
    "coalesce_t": (-1, 0, 1),
    "decoalesce_t": (0, -1, -1),
}
_CONTRACTS: dict[Operator, bool] = {
    "coalesce": True,
    "decoalesce": False,
    "coalesce_t": False,
    "decoalesce_t": True,
}


@dataclass(frozen=True)
class LevelMap:
    """The map between a level and the next smaller one. Build it with :func:`level_map`.

    Args:
        large: The anatomy of the larger level.
        small: The anatomy of the smaller level.
        width_factors: What each reduced axis is divided by.
        width_grouping: ``block``: entry ``j`` merges with ``j + n/r``, the paper's pattern. ``adjacent``: ``j``
            merges with ``j + 1``.
        depth_grouping: ``adjacent``: blocks ``2i`` and ``2i + 1`` merge, the paper's pattern. ``stack``: block
            ``i`` merges with ``i + L/r``.
        depth_mode: What becomes of the last tensors of residual branches. ``avg``: as all others, averaged and
            copied (the paper). ``ode``: summed, and divided among the copies (small steps of the same flow).
            ``zero``: summed, and put into the first copy alone, which preserves the function.
    """

    large: Anatomy
    small: Anatomy
    width_factors: Mapping[str, int]
    width_grouping: WidthGrouping
    depth_grouping: DepthGrouping
    depth_mode: DepthMode

    def apply(self, state: Mapping[str, Tensor], operator: Operator) -> dict[str, Tensor]:
        """Map tensors by parameter name from one level to the other.

        Args:
            state: Tensors with the shapes of the parameters of the level that the operator starts from; tied ones
                once. Names that are absent (the moments of frozen parameters, say) are absent from the result,
                but of merged blocks all or none must be there.
            operator: See the head of this module.

        Returns:
            New tensors of the other level, of the same dtypes; none shares memory with ``state``.
        """
        contracts = _CONTRACTS[operator]
        target = self.small if contracts else self.large
        mapped = {}
        for name in target.parameters:
            sources = self.sources(name, operator)
            present = [source for source in sources if source in state]
            if not present:
                continue
            if len(present) < len(sources):
                missing = ", ".join(source for source in sources if source not in state)
                raise KeyError(f"{name} is made from {', '.join(sources)}, of which {missing} is not in the state.")
            tensors = [state[source] for source in sources]
            layout = (self.large if contracts else self.small).parameters[sources[0]]
            mapped[name] = self._map_parameter(name, layout, tensors, operator)
        return mapped

    def scale(self, name: str) -> Fraction:
        """Return the factor between an entry of the small level and its copies after a width de-coalesce.

        AdamW on the larger level follows the smaller one's trajectory with learning rates times this factor and
        weight decays divided by it.

        Args:
            name: A parameter of the larger level.
        """
        return self._width_scale(self.large.parameters[name], "decoalesce")

    def _map_parameter(
        self, name: str, layout: ParameterLayout, tensors: Sequence[Tensor], operator: Operator
    ) -> Tensor:
        dtype = tensors[0].dtype
        # Sums in a 16-bit type would round once a term; the result is rounded once instead.
        compute = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
        depth = self._depth(name, tensors, operator, compute)
        if depth is None:
            shape = layout.shape(self.large.size.axes)
            return torch.zeros(shape, dtype=dtype, device=tensors[0].device)
        tensor, scale = depth
        scale *= self._width_scale(layout, operator)
        axes = (self.large if _CONTRACTS[operator] else self.small).size.axes
        for index, dim in enumerate(layout.dims):
            if dim.names & self.width_factors.keys():
                tensor = self._map_dim(tensor, index, dim, axes, contract=_CONTRACTS[operator])
        if scale.numerator != 1:
            tensor = tensor * scale.numerator
        if scale.denominator != 1:
            tensor = tensor / scale.denominator
        return tensor.to(dtype).clone(memory_format=torch.contiguous_format)

    # Width

    def _width_scale(self, layout: ParameterLayout, operator: Operator) -> Fraction:
        output, input_, fold = _SCALE[operator]
        scale = Fraction(1)
        for dim in layout.dims:
            for axis in dim.names & self.width_factors.keys():
                scale *= Fraction(self.width_factors[axis]) ** (input_ if dim.is_input else output)
        if layout.fold is not None and layout.fold in self.width_factors:
            scale *= Fraction(self.width_factors[layout.fold]) ** fold
        return scale

    def _map_dim(self, tensor: Tensor, index: int, dim: Dim, axes: Mapping[str, int], *, contract: bool) -> Tensor:
        parts = tensor.split(dim.chunk_sizes(axes), dim=index)
        mapped = []
        for number, part in enumerate(parts):
            shape = dim.chunk_shape(number, axes)
            if len(shape) > 1:
                part = part.unflatten(index, shape)
            for offset, axis in enumerate(dim.chunks[number]):
                factor = self.width_factors.get(axis, 1) if isinstance(axis, str) else 1
                if factor > 1:
                    change = _sum_groups if contract else _repeat_groups
                    part = change(part, index + offset, factor, self.width_grouping)
            mapped.append(part.flatten(index, index + len(shape) - 1))
        return mapped[0] if len(mapped) == 1 else torch.cat(mapped, dim=index)

    # Depth

    def sources(self, name: str, operator: Operator) -> list[str]:
        """Return the parameters of one level that a parameter of the other is made from.

        Args:
            name: A parameter of the level that the operator leads to.
            operator: See the head of this module.
        """
        contracts = _CONTRACTS[operator]
        target, source = (self.small, self.large) if contracts else (self.large, self.small)
        block, local = target.split_name(name)
        if block is None:
            return [name]
        index = target.parameters[name].block
        assert index is not None
        return [f"{source.blocks[other].path}.{local}" for other in self._related_blocks(index, contracts)]

    def related_blocks(self, *, contracts: bool) -> list[list[int]]:
        """Return for each block of one level those of the other that it is made from.

        Args:
            contracts: Whether the way leads down, to the small level.
        """
        target = self.small if contracts else self.large
        return [self._related_blocks(index, contracts) for index in range(len(target.blocks))]

    def _related_blocks(self, index: int, contracts: bool) -> list[int]:
        """Return the members of a small block's group, or the one small block that a large block belongs to."""
        target, source = (self.small, self.large) if contracts else (self.large, self.small)
        stage = target.blocks[index].stage
        target_start = sum(target.size.depths[:stage])
        source_start = sum(source.size.depths[:stage])
        num_large, num_small = self.large.size.depths[stage], self.small.size.depths[stage]
        factor = num_large // num_small
        if factor == 1:
            return [source_start + index - target_start]
        # Whole units are grouped; within them, blocks meet those of their own kind.
        unit = self.large.depth_unit
        position, kind = divmod(index - target_start, unit)
        num_groups = num_small // unit
        if contracts:
            step = (factor, 1) if self.depth_grouping == "adjacent" else (1, num_groups)
            positions = [position * step[0] + member * step[1] for member in range(factor)]
        else:
            positions = [position // factor if self.depth_grouping == "adjacent" else position % num_groups]
        return [source_start + position * unit + kind for position in positions]

    def _depth(
        self, name: str, tensors: Sequence[Tensor], operator: Operator, compute: torch.dtype
    ) -> tuple[Tensor, Fraction] | None:
        """Merge or copy blocks; return the tensor with a factor still to apply, or None where it is zero."""
        contracts = _CONTRACTS[operator]
        target = self.small if contracts else self.large
        index = target.parameters[name].block
        if index is None:
            return tensors[0].to(compute), Fraction(1)
        stage = target.blocks[index].stage
        num_merged = self.large.size.depths[stage] // self.small.size.depths[stage]
        splits_branch = self.depth_mode != "avg" and target.is_branch_output(name)
        if splits_branch and self.depth_mode == "zero":
            # D keeps the first copy, so its adjoint reads the first alone.
            if operator == "decoalesce_t":
                return tensors[0].to(compute), Fraction(1)
            if operator == "decoalesce" and not self._is_first_of_group(index):
                return None
        merged = tensors[0].to(compute)
        for tensor in tensors[1:]:
            merged = merged + tensor.to(compute)
        # C averages and D copies; for the outputs of split branches C sums and D divides (ode) or selects (zero).
        divides = {
            "coalesce": not splits_branch,
            "coalesce_t": not splits_branch,
            "decoalesce": splits_branch and self.depth_mode == "ode",
            "decoalesce_t": splits_branch and self.depth_mode == "ode",
        }[operator]
        return merged, Fraction(1, num_merged) if divides else Fraction(1)

    def _is_first_of_group(self, large_index: int) -> bool:
        (small_index,) = self._related_blocks(large_index, contracts=False)
        return self._related_blocks(small_index, contracts=True)[0] == large_index


def level_map(
    large: Anatomy,
    *,
    width: int = 2,
    depth: int | Sequence[int] = 2,
    width_grouping: WidthGrouping = "block",
    depth_grouping: DepthGrouping = "adjacent",
    depth_mode: DepthMode = "avg",
) -> LevelMap:
    """Plan how a level shrinks to the next one.

    Args:
        large: The anatomy of the larger level.
        width: What to divide embedding, heads and feed-forward width by; 1 keeps the width. Heads keep their
            ``head_dim``.
        depth: What to divide the number of blocks by: one number, for all stages that it divides, or one a stage;
            1 keeps the depth.
        width_grouping: See :class:`LevelMap`.
        depth_grouping: See :class:`LevelMap`.
        depth_mode: See :class:`LevelMap`.

    Returns:
        The map, with the anatomy of the smaller level.

    Raises:
        AnatomyError: If a size is no multiple of its factor, or ``depth_mode="zero"`` is asked for a post-norm
            model, whose normalisation acts on an empty branch too.
        ValueError: If an argument is none of the allowed values.
    """
    for argument, value, allowed in (
        ("width_grouping", width_grouping, WidthGrouping),
        ("depth_grouping", depth_grouping, DepthGrouping),
        ("depth_mode", depth_mode, DepthMode),
    ):
        if value not in get_args(allowed):
            raise ValueError(f"{argument} is {value!r}; allowed are {', '.join(map(repr, get_args(allowed)))}.")
    factors = [width, *([depth] if isinstance(depth, int) else depth)]
    if any(factor < 1 for factor in factors):
        raise ValueError(f"width and depth factors must be at least 1; width is {width}, depth is {depth}.")
    size = large.reduced(width, depth)
    if depth_mode == "zero" and size.depths != large.size.depths:
        post_norm = [block.path for block in large.blocks if block.residual == "post_norm"]
        if post_norm:
            raise AnatomyError(
                f'depth_mode "zero" preserves the function only where an empty branch changes nothing, but '
                f"{post_norm[0]} of this {large.family} model is normalised after the addition. "
                'Use "avg" or "ode", or depth factor 1.'
            )
    return LevelMap(
        large=large,
        small=large.at(size),
        width_factors=large.width_factors(width),
        width_grouping=width_grouping,
        depth_grouping=depth_grouping,
        depth_mode=depth_mode,
    )


def grown_size(small: Anatomy, factors: Sequence[tuple[int, int | Sequence[int]]]) -> Size:
    """Return the size of the full model that a small one is a level of.

    Args:
        small: The anatomy of the small model.
        factors: Width and depth factor of each level down to it, from the largest.

    Raises:
        AnatomyError: If no model of the family has the small one as this level.
    """
    anatomy = small
    for width, depth in reversed(factors):
        # Of alternatives the first grows; it is the one that a reduction would divide.
        grown = {alternatives[0] for alternatives in small.width_axes}
        axes = {axis: size * (width if axis in grown else 1) for axis, size in anatomy.size.axes.items()}
        depths = anatomy.size.depths
        stage_factors = [depth] * len(depths) if isinstance(depth, int) else depth
        if len(stage_factors) != len(depths):
            raise AnatomyError(f"There are {len(depths)} stages, but the depth factors are {list(stage_factors)}.")
        larger = anatomy.at(Size(axes, tuple(n * f for n, f in zip(depths, stage_factors, strict=True))))
        if larger.reduced(width, depth) != anatomy.size:
            raise AnatomyError(
                f"This {small.family} model of {depths} blocks is not what a larger one becomes with width factor "
                f"{width} and depth factor {depth}. Choose other factors, or a starting model of whole units."
            )
        anatomy = larger
    return anatomy.size


def _sum_groups(tensor: Tensor, dim: int, factor: int, grouping: WidthGrouping) -> Tensor:
    num_groups = tensor.shape[dim] // factor
    if grouping == "block":
        return tensor.unflatten(dim, (factor, num_groups)).sum(dim)
    return tensor.unflatten(dim, (num_groups, factor)).sum(dim + 1)


def _repeat_groups(tensor: Tensor, dim: int, factor: int, grouping: WidthGrouping) -> Tensor:
    new_dim = dim if grouping == "block" else dim + 1
    shape = list(tensor.unsqueeze(new_dim).shape)
    shape[new_dim] = factor
    return tensor.unsqueeze(new_dim).expand(shape).flatten(dim, dim + 1)
