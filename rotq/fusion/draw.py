"""What a recipe's rotation means for a model: kinds and a seed become bases of its sizes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.fusion.layernorm import leave_ones_alone
from rotq.models.adapter import Adapter
from rotq.models.sizes import head_dim, mlp_widths, num_value_heads
from rotq.recipe import Rotation
from rotq.rotations.basis import Basis, Ends
from rotq.rotations.hadamard import core_order, describe, orthogonal, random_signs


def build_basis(rotation: Rotation, adapter: Adapter, config: Any) -> Basis:
    """Draw the bases that ``rotation`` asks for.

    Args:
        rotation: Kinds and seed.
        adapter: Says which rotations the family allows.
        config: transformers' configuration: sizes.

    Raises:
        RotqError: the family does not allow a rotation, or a basis of the wanted kind does not
            exist for a size of this model; names the alternative.
    """
    _check_allowed(rotation, adapter, config)
    description = {}
    residual, value, attention, down = None, None, None, None
    block_size = None if rotation.down_block_size == -1 else rotation.down_block_size
    ends = None
    if rotation.residual != "none":
        residual = _draw("residual", rotation, config.hidden_size, rotation.seed)
        description["residual"] = describe(
            rotation.residual, config.hidden_size, rotation.block_size
        )
        if adapter.layer_norm:
            residual = leave_ones_alone(residual)
            description["residual"] += ", all-ones direction kept"
    if residual is not None and not adapter.turns_outer(rotation, config):
        signs_D = random_signs(config.hidden_size, rotation.seed)
        ends = Ends(signs_D=signs_D, last_block=config.num_hidden_layers - 1)
        description["residual"] += ", at run time in front of the blocks and back behind them"
    if rotation.value != "none":
        layers = range(config.num_hidden_layers)
        value = tuple(_draw_heads(rotation, config, layer) for layer in layers)
        description["value"] = describe(rotation.value, head_dim(config), rotation.block_size)
    if rotation.attention != "none":
        attention = rotation.attention
        description["attention"] = _describe_online("attention", {head_dim(config)})
    if rotation.down != "none":
        down = rotation.down
        description["down"] = _describe_down(block_size, mlp_widths(config))
    if rotation.inputs != "none":
        down, block_size = rotation.inputs, rotation.block_size
        description["inputs"] = _describe_blocks("rotation.block_size", block_size)
    return Basis(
        residual_DD=residual,
        ends=ends,
        value=value,
        attention=attention,
        down=down,
        down_block_size=block_size,
        inputs=rotation.inputs != "none",
        down_seed=derive_seed(rotation.seed, "down"),
        description=description,
    )


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed of its own for each use, below 2^63."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _check_allowed(rotation: Rotation, adapter: Adapter, config: Any) -> None:
    unknown = "its modules are not known"
    for key, obstacle in (
        ("residual", adapter.residual_obstacle(config)),
        ("value", None if adapter.value_rotation else unknown),
        ("attention", None if adapter.attention else unknown),
        ("down", None if adapter.down_rotation else unknown),
        ("inputs", None if adapter.down_rotation else unknown),
    ):
        kind = getattr(rotation, key)
        if kind != "none" and obstacle is not None:
            raise RotqError(
                f"rotation.{key}={kind} is not possible for {adapter.family} models "
                f"({', '.join(adapter.architectures)}): {obstacle}; set rotation.{key}=none"
            )
    _check_ends(rotation, adapter)


def _check_ends(rotation: Rotation, adapter: Adapter) -> None:
    obstacle = adapter.ends_obstacle()
    if rotation.residual_ends == "online" and obstacle is not None:
        raise RotqError(
            f"rotation.residual_ends=online is not possible for {adapter.family} models: "
            f"{obstacle}; set rotation.residual_ends=fused"
        )


def _draw(key: str, rotation: Rotation, n: int, seed: int) -> Tensor:
    kind = getattr(rotation, key)
    try:
        return orthogonal(kind, n, seed, rotation.block_size)
    except ValueError as error:
        raise RotqError(f"rotation.{key}={kind}: {error}") from None


def _draw_heads(rotation: Rotation, config: Any, layer: int) -> Tensor:
    """(H, K, K): a matrix for each value head of a layer."""
    heads = range(num_value_heads(config))
    seeds = [derive_seed(rotation.seed, layer, head) for head in heads]
    size = head_dim(config)
    return torch.stack([_draw("value", rotation, size, seed) for seed in seeds])


def _describe_down(block_size: int | None, widths: set[int]) -> str:
    if block_size is None:
        return _describe_online("down", widths)
    for width in sorted(widths):
        if width % block_size:
            raise RotqError(
                f"rotation.down_block_size={block_size} does not divide the {width} features that "
                "the last linear of an MLP reads; set another, or -1"
            )
    return _describe_blocks("rotation.down_block_size", block_size)


def _describe_blocks(key: str, size: int) -> str:
    try:
        core_order(size)
    except ValueError as error:
        raise RotqError(f"{key}={size}: {error}") from None
    return f"{describe('hadamard', size)} in blocks"


def _describe_online(key: str, sizes: set[int]) -> str:
    try:
        for size in sizes:
            core_order(size)
    except ValueError as error:
        raise RotqError(f"rotation.{key}=hadamard: {error}; set rotation.{key}=none") from None
    return ", ".join(describe("hadamard", size) for size in sorted(sizes))
