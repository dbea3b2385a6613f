"""Names of a packed checkpoint's tensors: as the file has them, and as the model has them.

A file has the names of its source, which transformers renames while loading. Packed tensors are
renamed as the weight that they stand for would be. Models with another head, or with none, have
other prefixes; transformers adds or strips them, and so does this.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers.core_model_loading import WeightConverter, WeightRenaming

from rotq.errors import RotqError
from rotq.models.conversion import Conversion

PACKED = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
    "input_signs",
    "input_global_scale",
)
"""Last parts of the names that stand for a layer's ``weight``."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a file's tensors become the model's."""

    model: dict[str, str]
    """The model's name of each stored tensor; what the model does not have is left out."""
    ruled: dict[str, str]
    """Of stored tensors that transformers splits or merges: the name by which its rules know it."""
    rules: tuple[WeightConverter, ...]
    """Those."""


def names_of(
    stored: Iterable[str], conversion: Conversion, renames: Iterable[tuple[str, str]] = ()
) -> Names:
    """The names of a file's tensors.

    Args:
        stored: Names in the file.
        conversion: Of the model with its experts unfused.
        renames: The family's own, applied before transformers'.

    Raises:
        RotqError: a packed tensor, or a part of an expert, would have to be converted.
    """
    as_weight = {name: _as_weight(_renamed(name, renames)) for name in stored}
    plain = {weight for name, weight in as_weight.items() if name == weight}
    ours: dict[str, str] = {}
    ruled: dict[str, str] = {}
    rules: list[WeightConverter] = []
    for target, making in conversion.makings(set(as_weight.values())).items():
        group = making.group
        if making.stored is not None:
            ours[making.stored] = target
        elif group.rule is None or not conversion.has(target) or not plain.issuperset(group.stored):
            raise RotqError(
                f"{group.stored[0]} must be converted while loading, which rotq does not do for "
                "packed tensors and experts"
            )
        else:
            ruled |= {name: conversion.renamed(name) for name in group.stored}
            rules += [] if group.rule in rules else [group.rule]
    names = {
        name: _with_leaf(ours[weight], _renamed(name, renames))
        for name, weight in as_weight.items()
        if weight in ours
    }
    return Names(model=names, ruled=ruled, rules=tuple(copy.deepcopy(rules)))


class NameTable(WeightRenaming):
    """Renames what the table has, and nothing else; saving renames back."""

    __slots__ = ("table",)

    def __init__(self, table: Mapping[str, str]) -> None:
        super().__init__(source_patterns=r"^(?!)", target_patterns="")
        self.table = dict(table)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name to load under, or to save under, and what was matched."""
        if source_key not in self.table:
            return source_key, None
        self._was_used = True  # type: ignore[misc]
        return self.table[source_key], source_key

    def reverse_transform(self) -> NameTable:
        """The table for saving."""
        return NameTable({ours: stored for stored, ours in self.table.items()})


def _renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _as_weight(name: str) -> str:
    layer, _, leaf = name.rpartition(".")
    return f"{layer}.weight" if leaf in PACKED else name


def _with_leaf(weight: str, name: str) -> str:
    leaf = name.rpartition(".")[2]
    return f"{weight.removesuffix('weight')}{leaf}" if leaf in PACKED else weight
