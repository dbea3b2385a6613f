"""Tensors of a model that are made of several stored ones, or cut out of one."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rotq.checkpoint.foreign import library_errors

if TYPE_CHECKING:
    from torch import Tensor

    from rotq.models.conversion import Group, Making

_KEPT = 2
"""Groups that are kept while their tensors are asked for one by one: experts have two."""


class MadeTensors:
    """Makes tensors on request, and forgets a group once all that is made of it was given out."""

    def __init__(self, makings: Mapping[str, Making], path: Path) -> None:
        """
        Args:
            makings: All of a checkpoint.
            path: Of it, for messages.
        """
        self._path = path
        self._parts = Counter(making.group for making in makings.values())
        self._made: OrderedDict[Group, dict[str, Tensor]] = OrderedDict()
        self._left: dict[Group, int] = {}

    def tensor(self, name: str, making: Making, load: Callable[[str], Tensor]) -> Tensor:
        """The tensor of that name, in memory of its own.

        Args:
            load: Reads a stored tensor.

        Raises:
            RotqError: transformers' rule does not fit what is stored.
        """
        if making.stored is not None:
            return load(making.stored)
        with library_errors(f"{self._path}: {name} cannot be made of {making.group.stored[0]}"):
            whole = self._results(making.group, load)[making.target]
            tensor = whole.clone() if making.cut is None else making.cut(whole).clone()
        self._give_out(making.group)
        return tensor.contiguous()

    def _results(self, group: Group, load: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if group not in self._made:
            stored = {name: load(name) for name in group.stored}
            self._made[group] = stored if group.make is None else group.make(stored)
            self._left[group] = self._parts[group]
            while len(self._made) > _KEPT:
                del self._left[self._made.popitem(last=False)[0]]
        return self._made[group]

    def _give_out(self, group: Group) -> None:
        self._left[group] -= 1
        if not self._left[group]:
            del self._made[group], self._left[group]
