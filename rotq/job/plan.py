"""Which layer gets which grid, and what is rounded at run time, from the config alone."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from rotq.checkpoint.exl3_writing import check_exl3
from rotq.checkpoint.export import stored_scale_dtype
from rotq.formats.activations import ActivationGrid
from rotq.formats.float_inputs import float_inputs
from rotq.formats.floats import stored_as
from rotq.formats.integer import Grid, PlainGrid
from rotq.job.layer_grids import check_rows, layer_grid
from rotq.job.mixed import (
    BITS,
    GROUP_SIZES,
    Unit,
    check_budget,
    choices,
    limits,
    make_units,
    together,
)
from rotq.job.outer_plan import plan_outer
from rotq.job.overrides import choose_overrides, idle_overrides
from rotq.layers.online_linear import OnlineLinear
from rotq.models.adapter import Adapter
from rotq.models.attention.online import heads_of, set_heads
from rotq.models.skeleton import Skeleton
from rotq.ops import is_native
from rotq.recipe import Activations, KVCache, Recipe

FOUR_BITS = ("nvfp4", "mxfp4")
"""Formats whose weights transformers makes bfloat16, whatever the model's dtype."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Grids by full layer name, in the order of solving; how scales are stored."""

    grids: Mapping[str, Grid]
    """The smallest that each layer may get, where the job has yet to choose."""
    shapes: Mapping[str, tuple[int, int]]
    """Out features, in features of every planned layer."""
    scale_dtype: torch.dtype
    """Of stored scales: the recipe's, or the model's where the format's loaders need it."""
    dtype: torch.dtype
    """Of the model, as its loaders run it."""
    rest_dtype: torch.dtype
    """In which matrices that stay dense are stored."""
    notes: tuple[str, ...]
    outer: Mapping[str, Grid] = field(default_factory=dict)
    """Grids of embedding and head by full name, where they are packed."""
    inputs: ActivationGrid | None = None
    """What planned layers round their inputs to at run time; None leaves them."""
    kv: ActivationGrid | None = None
    """What keys and values are rounded to at run time; None leaves them."""
    units: tuple[Unit, ...] = ()
    """What chooses a grid under ``weights.average_bits``; empty without."""

    @property
    def scale_bits(self) -> int:
        """Of a stored scale."""
        return self.scale_dtype.itemsize * 8

    @property
    def num_weights(self) -> int:
        """Of all planned layers, without embedding and head."""
        return sum(math.prod(self.shapes[name]) for name in self.grids)

    @property
    def limits(self) -> tuple[float, float] | None:
        """Least and most bits per weight that the units can have; None without a choice."""
        return limits(self.units, self.shapes) if self.units else None

    def choosing(self, grid_of_unit: Sequence[int]) -> "Plan":
        """The plan where each unit has one of its grids, by index."""
        chosen = {
            name: unit.grids[index]
            for unit, index in zip(self.units, grid_of_unit, strict=True)
            for name in unit.layers
        }
        return replace(self, grids={name: chosen[name] for name in self.grids})

    def grid(self, name: str) -> Grid:
        """Of a planned layer, or of embedding or head."""
        return self.grids[name] if name in self.grids else self.outer[name]

    def round_online(self, block: nn.Module, prefix: str, adapter: Adapter) -> None:
        """Let a dense block round at run time what the finished checkpoint will round; in place.

        Args:
            block: Again is harmless.
            prefix: Its full name.
        """
        if self.inputs is not None:
            full = [name for name in self.grids if name.startswith(f"{prefix}.")]
            for name in (name.removeprefix(f"{prefix}.") for name in full):
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear), f"{name} is planned, so it is a linear layer"
                block.set_submodule(name, OnlineLinear.wrap(linear, input_grid=self.inputs))
        if self.kv is not None:
            attention = block.get_submodule(adapter.attention)
            set_heads(attention, replace(heads_of(attention), grid=self.kv))


def activation_grid(section: Activations | KVCache) -> ActivationGrid | None:
    """What the recipe's section rounds to; None where it is off."""
    if section.bits == 16:
        return None
    return ActivationGrid(bits=section.bits, symmetric=section.symmetric)


def input_grid(recipe: Recipe) -> ActivationGrid | None:
    """What the recipe's layers round their inputs to; None where they do not."""
    if recipe.weights.format != "int" and recipe.activations.bits != 16:
        return float_inputs(recipe.weights.format)
    return activation_grid(recipe.activations)


def make_plan(
    skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype, rest_dtype: torch.dtype | None = None
) -> Plan:
    """Give each linear layer of the blocks its grid, and embedding and head theirs.

    Args:
        dtype: Of the model, as its loaders run it.
        rest_dtype: Of matrices that stay dense, as stored; None: ``dtype``.

    Raises:
        ValueError: a group size does not divide a layer's columns and the recipe does not say
            ``auto`` (names the layer and the legal sizes), an override matches no layer, no layer
            is left to quantize, ``average_bits`` is out of what the layers can have, or the output
            format cannot hold the family, what is rounded at run time, or a packed embedding.
    """
    _check_format(skeleton, recipe, dtype)
    weights = recipe.weights
    if recipe.is_mixed:
        weights = replace(weights, bits=BITS[0], group_size=GROUP_SIZES[0])
    rounder = "tiles" if recipe.output.format == "exl3" else recipe.solver.rounder
    grids: dict[str, Grid] = {}
    to_choose: dict[str, list[Grid]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    notes: list[str] = []
    sites = list(_sites(skeleton))
    layers = [name for site in sites for name in site]
    overrides = choose_overrides(
        recipe.weights.overrides, layers, _never_planned(skeleton, set(layers))
    )
    for site in sites:
        for name, linear in site.items():
            override = overrides.get(name)
            grid = layer_grid(name, linear.in_features, weights, override, rounder)
            check_rows(name, linear.out_features, grid)
            if grid is not None:
                grids[name], shapes[name] = grid, (linear.out_features, linear.in_features)
                if recipe.is_mixed:
                    to_choose[name] = choices(grid, linear.in_features, override)
        if len({grids.get(name) for name in site}) > 1:
            notes.append(f"{next(iter(site))} and its siblings have several grids: vLLM fuses them")
    if recipe.solver.two_sided and not is_native():
        raise ValueError("solver.two_sided needs numba: pip install rotq[native]")
    if not grids:
        raise ValueError("nothing to quantize: the recipe keeps every linear layer the model has")
    first = next(iter(grids.values()))
    scale_dtype = stored_as(first) or stored_scale_dtype(
        getattr(torch, recipe.weights.scale_dtype),
        dtype,
        first,
        recipe.output.format,
        has_experts=has_experts(skeleton),
    )
    outer = plan_outer(skeleton, recipe, has_experts=has_experts(skeleton))
    plan = Plan(
        grids=grids if outer.grids else _as_stored(grids, recipe),
        shapes={**shapes, **outer.shapes},
        scale_dtype=scale_dtype,
        dtype=dtype,
        rest_dtype=rest_dtype or dtype,
        outer=outer.grids,
        notes=(
            *notes,
            *outer.notes,
            *idle_overrides(recipe.weights.overrides, overrides),
            *_kept_notes(skeleton),
            *_loader_notes(recipe, dtype, scale_dtype),
            *_search_notes(recipe),
        ),
        inputs=input_grid(recipe),
        kv=activation_grid(recipe.kv_cache),
    )
    if not recipe.is_mixed:
        return plan
    units = make_units(_fused(skeleton), to_choose, shapes, plan.scale_bits)
    check_budget(weights.average_bits, units, shapes)
    return replace(plan, units=units).choosing([0] * len(units))


def _as_stored(grids: dict[str, Grid], recipe: Recipe) -> dict[str, Grid]:
    """Symmetric integers of 8 bits, all of them, are read plain where inputs are rounded."""
    rounded = recipe.output.format != "rotq" and recipe.activations.bits != 16
    fit = all(type(g) is Grid and g.bits == 8 and g.symmetric for g in grids.values())
    if not (rounded and fit):
        return grids
    return {
        name: PlainGrid(bits=8, group_size=grid.group_size, symmetric=True)
        for name, grid in grids.items()
    }


def _fused(skeleton: Skeleton) -> Iterator[tuple[str, ...]]:
    """Layers that engines run as one, by full name."""
    for index, block in enumerate(skeleton.blocks):
        prefix = skeleton.block_name(index)
        sites = skeleton.adapter.sites(block)
        yield from together(
            block, prefix, [[f"{prefix}.{path}" for path in site.linears] for site in sites]
        )


def _check_format(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> None:
    """Refuse what the output's format cannot hold."""
    if recipe.output.format == "rotq":
        return
    if recipe.output.format == "exl3":
        linears = {name: linear for site in _sites(skeleton) for name, linear in site.items()}
        check_exl3(skeleton.config.model_type, linears)
        return
    if skeleton.adapter.transposed:
        family = skeleton.adapter.family
        name = type(skeleton.model).__name__ if skeleton.adapter.is_generic else family
        raise ValueError(
            f"{name}'s layers are Conv1D, for which compressed-tensors has no "
            "name; set output.format=rotq"
        )
    kind = recipe.weights.format
    if kind in FOUR_BITS and dtype != torch.bfloat16:
        raise ValueError(
            f"weights.format={kind}: transformers makes such weights bfloat16 in a model of any "
            f"dtype, and cannot run this one in {_named(dtype)}; set --dtype bfloat16 or "
            "output.format=rotq"
        )
    if kind != "int" and has_experts(skeleton):
        raise ValueError(
            f"weights.format={kind}: experts of compressed-tensors are not written in it; set "
            "output.format=rotq"
        )
    if activation_grid(recipe.activations) is not None and has_experts(skeleton):
        raise ValueError(
            "activations.bits: other loaders of compressed-tensors drop the rounding of what "
            "experts read; set output.format=rotq"
        )


def _sites(skeleton: Skeleton) -> Iterator[dict[str, nn.Linear]]:
    """Linear layers that read the same input, by full name, in the order of solving."""
    for index, block in enumerate(skeleton.blocks):
        for site in skeleton.adapter.sites(block):
            linears = {}
            for path in site.linears:
                linear = block.get_submodule(path)
                assert isinstance(linear, nn.Linear), f"{path} is a linear layer"
                linears[f"{skeleton.block_name(index)}.{path}"] = linear
            yield linears


def _never_planned(skeleton: Skeleton, layers: set[str]) -> list[str]:
    """Full names of all else that has a weight: embeddings, head, norms, routers."""
    modules = skeleton.model.named_modules()
    return [name for name, m in modules if hasattr(m, "weight") and name not in layers]


def _kept_notes(skeleton: Skeleton) -> Iterator[str]:
    """Linear layers that stay dense because they cannot be packed, once for all blocks."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, reason in skeleton.kept.items():
        found.setdefault((re.sub(r"\b\d+\b", "*", name), reason), []).append(name)
    for (pattern, reason), names in found.items():
        yield f"{pattern if len(names) > 1 else names[0]} stays dense: {reason}"


def _loader_notes(recipe: Recipe, dtype: torch.dtype, scale_dtype: torch.dtype) -> Iterator[str]:
    """What other loaders of the output need, or make of it."""
    wanted = getattr(torch, recipe.weights.scale_dtype)
    if recipe.weights.format not in FOUR_BITS and scale_dtype != wanted:
        yield f"scales are stored as {_named(scale_dtype)}: other loaders need them so"
    if recipe.is_mixed and recipe.output.format != "rotq" and not recipe.weights.symmetric:
        yield (
            "transformers without rotq reads several grids only where weights.symmetric=true; rotq "
            "reads these, and vLLM beside it"
        )
    rounded = activation_grid(recipe.activations) is not None
    if rounded and recipe.output.format != "rotq" and dtype != torch.float32:
        yield (
            f"other loaders find the scales of activations in {_named(dtype)}, rotq in float32: "
            "their results differ"
        )


def _search_notes(recipe: Recipe) -> Iterator[str]:
    """What makes a job slow."""
    if is_native():
        return
    if recipe.solver.rounder == "trellis":
        yield (
            "numba is not installed: paths are searched for in plain PyTorch, which on a CPU takes "
            "a hundred times as long; pip install rotq[native]"
        )
    elif recipe.solver.method == "gptq":
        yield (
            "numba is not installed: columns are rounded in plain PyTorch, slower on a CPU; "
            "pip install rotq[native]"
        )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def has_experts(skeleton: Skeleton) -> bool:
    """Whether any block is a mixture of experts."""
    return any(skeleton.adapter.has_experts(block) for block in skeleton.blocks)
