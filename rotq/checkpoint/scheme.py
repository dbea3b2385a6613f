"""Which layers of a checkpoint are quantized, and how: ``quantization_config`` as it is read.

The fields are those of compressed-tensors 0.20 (``pack-quantized``); the rotq format has the same
ones, two for what heads and inputs go through at run time, and paths through a trellis.

    targets            "Linear" (every linear layer), "re:..." (matched from the start of the name),
                       or a full module name; full names win over patterns, patterns over "Linear"
    ignore             the same, taken out
    input_activations  what the layers' inputs are rounded to: dynamic, integers per token, or the
                       floats that the weights have
    online             hadamard, to the targets whose input is rotated by it, before it is rounded,
                       and block_size, to the features of its diagonal blocks, where it has them;
                       residual, to the kind of R1 where it is applied in front of the first block
                       and taken back behind the last
    format             of a group: pack-quantized for integers, int-quantized for those that are
                       int8 and not packed, nvfp4-pack-quantized and mxfp4-pack-quantized for floats
                       of 4 bits, float-quantized for E4M3
    weights            of type "trellis": the paths of rotq_kernels.trellis.code, in a group of the
                       format "trellis", with code mul1 and state_bits
    attention          rotation of queries and keys, and kv_cache: what keys and values are rounded
                       to, dynamic, per head and token
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rotq.checkpoint.scheme_groups import Group, mapping, read_dynamic, read_group, read_targets
from rotq.errors import RotqError
from rotq.formats.integer import Grid
from rotq.layers.online_heads import UNTOUCHED, OnlineHeads
from rotq.patterns import PatternTooSlow, search
from rotq.rotations.hadamard import core_order

ROTQ_VERSION = 8
"""Newest version of the rotq format; a checkpoint says the oldest that has what it needs: 8 for
weights that are floats, 7 for weights on a trellis, 6 for R1 at run time, 5 for a packed embedding
or head, 4 for R4 in blocks, 2 for what attention does. 3 was for R4 as a butterfly, but
``save_pretrained`` said 3 of any checkpoint; those without are read."""

METHODS = ("compressed-tensors", "rotq")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Grids and online rotations by layer name, and what attention does."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    rotated: tuple[str, ...]
    """Targets whose input is rotated."""
    block_size: int | None = None
    """Features that are rotated together; None for all that a layer reads."""
    turns_residual: bool = False
    """R1 is applied in front of the first block, and taken back behind the last."""
    heads: OnlineHeads = UNTOUCHED
    """What every attention does at run time."""

    def grid(self, name: str, prefix: str = "") -> Grid | None:
        """The grid of the linear layer ``name``, as for ``group``; None where not quantized."""
        group = self.group(name, prefix)
        return None if group is None else group.grid

    def group(self, name: str, prefix: str = "") -> Group | None:
        """The group of the linear layer ``name``; None where it is not quantized.

        Args:
            prefix: Of the model below a head: a model without one leaves it out of its names, and
                the scheme may be of a model of either kind.
        """
        if _best(self.ignore, name, prefix) is not None:
            return None
        ranked = [
            (rank, number)
            for number, group in enumerate(self.groups)
            if (rank := _best(group.targets, name, prefix)) is not None
        ]
        return self.groups[min(ranked)[1]] if ranked else None

    def names(self, name: str, prefix: str = "") -> bool:
        """Whether a target means this layer by its name, and not by its class alone."""
        ranks = [_best(group.targets, name, prefix) for group in self.groups]
        return any(rank is not None and rank < CLASS for rank in ranks)

    def is_rotated(self, name: str, prefix: str = "") -> bool:
        """The input of ``name`` is rotated at run time."""
        return _best(self.rotated, name, prefix) is not None

    def rotation_size(self, name: str, features: int, prefix: str = "") -> int | None:
        """Features that are rotated together of those that ``name`` reads; None rotates none.

        Raises:
            RotqError: there is no such Hadamard matrix, or blocks of it do not divide them.
        """
        if not self.is_rotated(name, prefix):
            return None
        size = self.block_size or features
        try:
            core_order(size)
        except ValueError as error:
            raise RotqError(f"{name}: {error}") from None
        if features % size:
            raise RotqError(f"{name}: rotated blocks of {size} do not divide {features} features")
        return size

    def check_patterns(self, names: Sequence[str]) -> None:
        """Refuse a pattern among the targets that would never end on a model's layers.

        Raises:
            RotqError: names it.
        """
        targets = [*self.ignore, *(target for group in self.groups for target in group.targets)]
        targets += self.rotated
        patterns = [target[3:] for target in targets if target.startswith("re:")]
        try:
            if patterns:
                search(patterns, names)
        except PatternTooSlow as error:
            raise RotqError(f"a target of quantization_config: {error}") from None


def read_scheme(config: Mapping[str, Any]) -> Scheme:
    """Read a ``quantization_config``.

    Raises:
        RotqError: another method, or something that rotq cannot run: activations with stored
            scales, caches quantized by compressed-tensors, float weights, columns in another
            order, online transforms of compressed-tensors.
    """
    method = config.get("quant_method")
    if method not in METHODS:
        raise RotqError(f"quantized with {method}; rotq reads {', '.join(METHODS)} and exl3")
    if method == "rotq" and config.get("version") not in range(1, ROTQ_VERSION + 1):
        raise RotqError(f"rotq format {config.get('version')}; this rotq reads 1 to {ROTQ_VERSION}")
    _refuse_transforms(config)
    if config.get("kv_cache_scheme"):
        raise RotqError("the checkpoint quantizes the KV cache, which rotq cannot run")
    groups = mapping("config_groups", config.get("config_groups"))
    if not groups:
        raise RotqError("quantization_config has no config_groups")
    online = mapping("online", config.get("online"))
    rotated, block_size = _read_online(online)
    return Scheme(
        groups=tuple(
            read_group(name, mapping(name, group), config.get("format"))
            for name, group in groups.items()
        ),
        ignore=read_targets("ignore", config.get("ignore") or ()),
        rotated=rotated,
        block_size=block_size,
        turns_residual="residual" in online,
        heads=_read_heads(mapping("attention", config.get("attention"))),
    )


CLASS = 2
"""Rank of a target that is the class of the layer."""


def _best(targets: Iterable[str], name: str, prefix: str) -> int | None:
    """The best rank among targets, of the name with the prefix and without it."""
    bare = name.removeprefix(f"{prefix}.")
    names = {name, bare, f"{prefix}.{bare}"} if prefix else {name}
    ranks = [_rank(target, each) for target in targets for each in names]
    return min((rank for rank in ranks if rank is not None), default=None)


def _rank(target: str, name: str) -> int | None:
    """0 for the full name, 1 for a pattern, 2 for the class; None where it does not match."""
    if target == name:
        return 0
    if target.startswith("re:"):
        return 1 if re.match(target[3:], name) else None
    return CLASS if target == "Linear" else None


def _read_online(online: Mapping[str, Any]) -> tuple[tuple[str, ...], int | None]:
    """The targets whose input is rotated, and in blocks of which size."""
    if "butterfly" in online:
        raise RotqError(
            "the checkpoint (rotq format 3) holds a learned fast rotation, a butterfly, which rotq "
            "no longer has; commit 687066b is the last that reads it"
        )
    for kind in online:
        if kind not in ("hadamard", "block_size", "residual"):
            raise RotqError(f"unknown online rotation {kind}; known: hadamard, residual")
    if online.get("residual", "hadamard") != "hadamard":
        raise RotqError(f"unknown online.residual {online['residual']}; known: hadamard")
    size = online.get("block_size")
    if size is not None and (type(size) is not int or size < 1):
        raise RotqError(f"online.block_size of quantization_config is not a size: {size!r}")
    return read_targets("online.hadamard", online.get("hadamard", ())), size


def _read_heads(attention: Mapping[str, Any]) -> OnlineHeads:
    rotation = attention.get("rotation")
    if rotation not in (None, "hadamard"):
        raise RotqError(f"unknown rotation of heads {rotation}; known: hadamard")
    grid = read_dynamic("attention.kv_cache", attention.get("kv_cache"))
    return OnlineHeads(rotated=rotation is not None, grid=grid)


def _refuse_transforms(config: Mapping[str, Any]) -> None:
    transforms = mapping("transform_config", config.get("transform_config"))
    groups = mapping("transform_config.config_groups", transforms.get("config_groups"))
    for name, value in groups.items():
        applied = mapping(name, value).get("apply") or ()
        if not isinstance(applied, list | tuple):
            raise RotqError(f"{name}.apply of quantization_config is not a list")
        places = {str(mapping(f"{name}.apply", apply).get("location")) for apply in applied}
        online = places - {"weight_input", "weight_output"}
        if online:
            raise RotqError(
                f"the transform {name} of the checkpoint works at run time "
                f"({', '.join(sorted(online))}), which rotq cannot run"
            )
