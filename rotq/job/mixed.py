"""Mixed bits: which layers choose their grid together, from which grids, and what a budget allows.

Layers that read one input are one unit, because engines fuse them (q, k and v; gate and up), and so
are all experts of a block, which run as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from rotq.formats.integer import Grid
from rotq.formats.trellis import Trellis
from rotq.models.experts import UnfusedExperts
from rotq.recipe import Override

BITS = (2, 3, 4)
GROUP_SIZES = (-1, 128, 64, 32)
"""What ``weights.average_bits`` chooses from; groups where they divide a layer's columns, and none
on a trellis."""

Shapes = Mapping[str, tuple[int, int]]
"""Out features, in features by full name of the layer."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Layers that get one grid."""

    layers: tuple[str, ...]
    """Full names."""
    grids: tuple[Grid, ...]
    """To choose from, by rising size."""
    bits: tuple[float, ...]
    """Of all layers together with each of the grids: codes, scales and zero points."""

    @property
    def name(self) -> str:
        """That of its first layer."""
        return self.layers[0]


def choices(smallest: Grid, in_features: int, override: Override | None) -> list[Grid]:
    """Grids that one layer may get; where an override says bits or groups, with no other.

    Args:
        smallest: What the layer would get by the override alone, else the fewest bits.
        in_features: Of the layer.
        override: The one that serves the layer.
    """
    bits = (smallest.bits,) if override is not None and override.bits else BITS
    # finer scales gain nothing where rotations have made rows alike
    sizes = [-1] if isinstance(smallest, Trellis) else _dividing(in_features)
    if override is not None and override.group_size:
        sizes = [smallest.group_size]
    return [replace(smallest, bits=each, group_size=size) for each in bits for size in sizes]


def _dividing(in_features: int) -> list[int]:
    return [
        size
        for size in GROUP_SIZES
        if size == -1 or (size < in_features and in_features % size == 0)
    ]


def together(
    block: nn.Module, prefix: str, sites: Iterable[Sequence[str]]
) -> Iterator[tuple[str, ...]]:
    """Full names of a block's layers that engines run as one.

    Args:
        block: On meta.
        prefix: Its full name.
        sites: Full names of layers that read one input.
    """
    mixtures = [name for name, m in block.named_modules() if isinstance(m, UnfusedExperts)]
    inside = tuple(f"{prefix}.{name}." for name in mixtures)
    experts: list[str] = []
    for site in sites:
        experts += [name for name in site if inside and name.startswith(inside)]
        others = tuple(name for name in site if name not in experts)
        if others:
            yield others
    if experts:
        yield tuple(experts)


def make_units(
    fused: Iterable[Sequence[str]],
    grids: Mapping[str, Sequence[Grid]],
    shapes: Shapes,
    scale_bits: int,
) -> tuple[Unit, ...]:
    """What chooses its grid together.

    Args:
        fused: From ``together``, of all blocks.
        grids: To choose from, of every planned layer. Where overrides leave fused layers different
            bits, or none of a size that all have, they choose apart.
        shapes: Of every planned layer.
        scale_bits: Of a stored scale.
    """
    units = []
    for names in fused:
        kinds: dict[object, list[str]] = {}
        for name in names:
            if name in grids:
                kinds.setdefault(_restriction(grids[name]), []).append(name)
        units += [_unit(layers, grids, shapes, scale_bits) for layers in kinds.values()]
    return tuple(units)


def _restriction(grids: Sequence[Grid]) -> object:
    """Grids that an override has left, alike in layers of any width."""
    sizes = {grid.group_size for grid in grids}
    return frozenset(grid.bits for grid in grids), -1 in sizes or frozenset(sizes)


def _unit(
    layers: Sequence[str], grids: Mapping[str, Sequence[Grid]], shapes: Shapes, scale_bits: int
) -> Unit:
    common = [grid for grid in grids[layers[0]] if all(grid in grids[name] for name in layers)]
    sizes = {grid: _bits(grid, layers, shapes, scale_bits) for grid in common}
    ordered = sorted(common, key=lambda grid: (sizes[grid], grid.bits))
    return Unit(
        layers=tuple(layers), grids=tuple(ordered), bits=tuple(sizes[grid] for grid in ordered)
    )


def _bits(grid: Grid, layers: Iterable[str], shapes: Shapes, scale_bits: int) -> float:
    return sum(
        shapes[name][0] * shapes[name][1] * grid.bits_per_weight(shapes[name][1], scale_bits)
        for name in layers
    )


def limits(units: Iterable[Unit], shapes: Shapes) -> tuple[float, float]:
    """Least and most bits per weight that the units can have together."""
    units = list(units)
    weights = sum(shapes[name][0] * shapes[name][1] for unit in units for name in unit.layers)
    least, most = (sum(unit.bits[end] for unit in units) / weights for end in (0, -1))
    return least, most


def check_budget(average_bits: float, units: Sequence[Unit], shapes: Shapes) -> None:
    """Refuse an average that no choice of the units has.

    Raises:
        ValueError: names the limit, and what the first layer has there.
    """
    allowed = limits(units, shapes)
    if allowed[0] <= average_bits <= allowed[1]:
        return
    end, words = (0, "below") if average_bits < allowed[0] else (-1, "above")
    grid = units[0].grids[end]
    size = "channel" if grid.group_size == -1 else f"{grid.group_size} columns"
    raise ValueError(
        f"weights.average_bits={average_bits:g} is {words} {allowed[end]:.4g}, the "
        f"{('least', 'most')[end]} that the quantized layers can have together "
        f"({units[0].name}: {grid.bits} bits, a scale per {size})"
    )
