"""The grid of one layer, from the recipe and its sizes."""

from __future__ import annotations

from dataclasses import replace

from rotq.formats.exl3 import TileGrid
from rotq.formats.floats import FloatGrid, float_grid
from rotq.formats.integer import Grid, legal_group_sizes
from rotq.formats.trellis import Trellis
from rotq.recipe import Override, Weights


def layer_grid(
    name: str,
    in_features: int,
    weights: Weights,
    override: Override | None = None,
    rounder: str = "scalar",
) -> Grid | None:
    """The recipe's grid for one layer; None if it is kept.

    Args:
        name, in_features: Of the layer.
        weights: Of the recipe.
        override: The one that serves the layer, see ``choose_overrides``.
        rounder: "scalar", "trellis" for paths, or "tiles" for those of EXL3.

    Raises:
        ValueError: the group size does not divide ``in_features``, and no fallback is allowed.
    """
    bits, group_size = weights.bits, weights.group_size
    if override is not None:
        if override.keep:
            return None
        bits, group_size = override.bits or bits, override.group_size or group_size
    if rounder == "tiles":
        return TileGrid(bits=bits)
    if rounder == "trellis":
        grid: Grid = Trellis(bits=bits, group_size=group_size, state_bits=weights.state_bits)
    elif weights.format != "int":
        grid = float_grid(weights.format)
    else:
        grid = Grid(bits=bits, group_size=group_size, symmetric=weights.symmetric)
    return fitted_grid(name, in_features, grid, weights)


def check_rows(name: str, out_features: int, grid: Grid | None) -> None:
    """Refuse columns that are too short for a path.

    Raises:
        ValueError: names the layer.
    """
    if isinstance(grid, Trellis):
        try:
            grid.ring_rows(out_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; an override with keep leaves it dense") from None


def fitted_grid(name: str, columns: int, grid: Grid, weights: Weights) -> Grid:
    """The grid, with the largest legal group size below its own where the recipe allows it.

    Args:
        name: For the message.

    Raises:
        ValueError: the group size does not divide the columns, and no fallback is allowed.
    """
    size = grid.group_size
    if isinstance(grid, FloatGrid):
        if columns % grid.columns_per_group(grid.group_size):
            raise ValueError(
                f"{name}: groups of {size}, which {grid.kind} has, do not divide {columns} "
                "columns; an override with keep leaves it dense"
            )
        return grid
    if size != -1 and columns % size and weights.group_fallback == "auto":
        smaller = [legal for legal in legal_group_sizes(columns) if legal < size]
        return replace(grid, group_size=max(smaller, default=-1))
    try:
        grid.columns_per_group(columns)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; or set weights.group_fallback=auto") from None
    return grid
