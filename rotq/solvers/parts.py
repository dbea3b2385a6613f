"""Rows of a weight that do not know of each other are solved side by side, and by all processes.

Shape suffixes: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from rotq.numerics import side_by_side
from rotq.ranks import Ranks

ROWS_IN_CACHE, ROWS_ON_DEVICE = 512, 16384
"""Rows solved at a time: by a CPU's thread, in whose cache few stay; on a GPU, which wants many."""

NUMBERS_AT_ONCE = 1 << 22
"""Of a CPU's rows, at most: wide layers are solved fewer rows at a time."""


class Movable(Protocol):
    """What is found for some rows."""

    def to(self, device: torch.device) -> Self:
        """The same there."""


Part = TypeVar("Part", bound=Movable)


def rows_at_once(features: int) -> int:
    """Rows of a layer that one thread of a CPU solves together."""
    return min(ROWS_IN_CACHE, max(1, NUMBERS_AT_ONCE // features))


def each_part(
    solved: Callable[[Tensor], Part], weight_NK: Tensor, rows: int, at_once: int, ranks: Ranks
) -> list[Part]:
    """Runs of ``rows`` do not know of each other: parts of equal size, on a CPU side by side.

    Each process does some, and is given all.

    Args:
        at_once: Rows of a part, at most.
    """
    on_cpu = weight_NK.device.type == "cpu"
    count = ceil(weight_NK.shape[0] / at_once)
    count = ranks.size * ceil(count / ranks.size)
    runs = weight_NK.unflatten(0, (-1, rows)).tensor_split(min(count, len(weight_NK) // rows))
    parts = ranks.own([part.flatten(0, 1) for part in runs])
    done = side_by_side(solved, parts) if on_cpu else [solved(part_NK) for part_NK in parts]
    if ranks.size == 1:
        return done
    sent = [part.to(torch.device("cpu")) for part in done]
    return [part.to(weight_NK.device) for some in ranks.gathered(sent) for part in some]
