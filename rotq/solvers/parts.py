"""Rows of a weight that do not know of each other are solved side by side, and by all processes.

Shape suffixes: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    solved: Callable[..., Part], matrices: Sequence[Tensor], rows: int, at_once: int, ranks: Ranks
) -> list[Part]:
    """Runs of ``rows`` do not know of each other: parts of equal size, on a CPU side by side.

    Each process does some, and is given all.

    Args:
        solved: Is given the same rows of each matrix.
        matrices: (N, K), the weight first.
        at_once: Rows of a part, at most.
    """
    device, num_rows = matrices[0].device, len(matrices[0])
    count = ceil(num_rows / at_once)
    count = min(ranks.size * ceil(count / ranks.size), num_rows // rows)
    runs = (some_NK.unflatten(0, (-1, rows)).tensor_split(count) for some_NK in matrices)
    parts = ranks.own([[run.flatten(0, 1) for run in part] for part in zip(*runs, strict=True)])

    def solved_part(part: list[Tensor]) -> Part:
        return solved(*part)

    on_cpu = device.type == "cpu"
    done = side_by_side(solved_part, parts) if on_cpu else list(map(solved_part, parts))
    if ranks.size == 1:
        return done
    sent = [part.to(torch.device("cpu")) for part in done]
    return [part.to(device) for some in ranks.gathered(sent) for part in some]
