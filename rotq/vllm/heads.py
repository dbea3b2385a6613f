"""The constants of the KV heads that one rank holds."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from rotq.errors import RotqError
from rotq.ops import KVConstants

_BY_HEAD = ("residual_scale_H", "gamma_base_H")
"""Of ``KVConstants``; of its sides all tensors are."""


def heads_of_rank(constants: KVConstants, number: int, rank: int, ranks: int) -> KVConstants:
    """Constants of the heads of one rank.

    Ranks hold equal runs of heads in their order; where there are more ranks than heads, runs of
    ranks hold the same head.

    Args:
        constants: Of all heads of a layer.
        number: Heads that the rank holds.
        rank: Which.
        ranks: How many there are.

    Raises:
        RotqError: the heads cannot be split like that.
    """
    total = constants.key.base_H.numel()
    if number != max(1, total // ranks) or (total % ranks and ranks % total):
        raise RotqError(
            f"constants of {total} KV heads do not fit {number} on each of {ranks} ranks"
        )
    if number == total:
        return constants
    first = rank * total // ranks
    heads = slice(first, first + number)
    changed: dict[str, Any] = {
        name: getattr(constants, name)[heads]
        for name in _BY_HEAD
        if getattr(constants, name) is not None
    }
    return replace(
        constants, key=_cut(constants.key, heads), value=_cut(constants.value, heads), **changed
    )


def _cut(side: Any, heads: slice) -> Any:
    held = {item.name: getattr(side, item.name) for item in fields(side)}
    return replace(
        side, **{name: value[heads] for name, value in held.items() if isinstance(value, Tensor)}
    )
