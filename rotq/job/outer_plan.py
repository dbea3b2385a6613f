"""Which grids embedding and head get, and who reads them packed.

What reads compressed-tensors (``pack-quantized``) at the time of writing: transformers 5.23 with
compressed-tensors 0.20 initializes the weight of every embedding, of which a packed one has none,
and reads a packed head as any linear layer, so beside others on symmetric grids. vLLM 0.32 looks up
symmetric embeddings of 2, 4 and 8 bits, but shares none with a head. The rotq format has no such
limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from rotq.formats.integer import Grid
from rotq.job.layer_grids import fitted_grid
from rotq.layers.quant_embedding import embedding_obstacle
from rotq.models.skeleton import Skeleton
from rotq.recipe import Recipe

FEW_ROWS = 64
"""Up to here there is nothing to save: alphabets of proteins."""


@dataclass(frozen=True, kw_only=True)
class OuterPlan:
    """Grids and shapes by full name; what stays dense is left out."""

    grids: Mapping[str, Grid]
    shapes: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...] = ()


def plan_outer(skeleton: Skeleton, recipe: Recipe, *, has_experts: bool) -> OuterPlan:
    """Give embedding and head the grids that the recipe asks for.

    Raises:
        ValueError: one of them cannot be packed or is not there, a tied head is to have other bits
            than the embedding, the group size does not divide, or loaders of the format would not
            read it and the recipe does not say ``dense``.
    """
    weights = recipe.weights
    notes: list[str] = []
    grids: dict[str, Grid] = {}
    for name, bits in _wanted(skeleton, recipe, notes).items():
        rows, columns = _shape(skeleton, name)
        obstacle = _obstacle(recipe, is_head=name == skeleton.adapter.head, has_experts=has_experts)
        if rows <= FEW_ROWS:
            notes.append(f"{name} stays dense: {rows} rows are nothing to save")
        elif obstacle is None:
            grid = Grid(bits=bits, group_size=weights.outer_group_size, symmetric=True)
            grids[name] = fitted_grid(name, columns, grid, weights)
        elif weights.outer_fallback == "dense":
            notes.append(f"{name} stays dense, output.format=rotq packs it: {obstacle}")
        else:
            raise ValueError(
                f"{name} cannot be packed in compressed-tensors: {obstacle}; set "
                "output.format=rotq, or weights.outer_fallback=dense"
            )
    shapes = {name: _shape(skeleton, name) for name in grids}
    return OuterPlan(grids=grids, shapes=shapes, notes=tuple(notes))


def _wanted(skeleton: Skeleton, recipe: Recipe, notes: list[str]) -> dict[str, int]:
    """Bits by full name of what is to be packed.

    Args:
        notes: Gets a line for what no packed layer can stand for, where that may stay dense.
    """
    may_stay = recipe.weights.outer_fallback == "dense"
    adapter, weights, wanted = skeleton.adapter, recipe.weights, {}
    shared = skeleton.tied and not adapter.turns_outer(recipe.rotation, skeleton.config)
    if weights.embedding != 16:
        found = embedding_obstacle(skeleton.model.get_submodule(adapter.embedding))
        if found is None:
            wanted[adapter.embedding] = weights.embedding
        elif may_stay:
            notes.append(f"{adapter.embedding} stays dense: {found}")
        else:
            raise ValueError(f"weights.embedding: {adapter.embedding} cannot be packed: {found}")
    if weights.head == 16 or (shared and weights.head == weights.embedding):
        return wanted
    if shared:
        raise ValueError(
            f"weights.head={weights.head}: {adapter.head} is tied to {adapter.embedding}; "
            f"set weights.embedding={weights.head}, which both share"
        )
    head = skeleton.model.get_submodule(adapter.head) if adapter.head else None
    if not isinstance(head, nn.Linear):
        what = "the model has no head" if head is None else f"{adapter.head} is no linear layer"
        if not may_stay:
            raise ValueError(f"weights.head={weights.head}: {what} that can be packed")
        notes.append(f"no head is packed: {what} that can be")
        return wanted
    return {**wanted, adapter.head: weights.head}


def _shape(skeleton: Skeleton, name: str) -> tuple[int, int]:
    rows, columns = skeleton.model.get_parameter(f"{name}.weight").shape
    return rows, columns


def _obstacle(recipe: Recipe, *, is_head: bool, has_experts: bool) -> str | None:
    """Why loaders of the output do not read it packed; None where they do."""
    if recipe.output.format == "rotq":
        return None
    if not is_head:
        return "transformers looks for the weight of every embedding"
    if has_experts:
        return "transformers fuses experts, and reads no second grid then"
    if not recipe.weights.symmetric:
        return "transformers reads no zero points where there is a second grid"
    return None
