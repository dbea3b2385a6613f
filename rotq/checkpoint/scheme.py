"""Which layers of a checkpoint are quantized, and how: ``quantization_config`` read and written.

The fields are those of compressed-tensors 0.20 (``pack-quantized``); the rotq format has the same
ones, and two for what heads and inputs go through at run time.

    targets            "Linear" (every linear layer), "re:..." (matched from the start of the name),
                       or a full module name; full names win over patterns, patterns over "Linear"
    ignore             the same, taken out
    input_activations  what the layers' inputs are rounded to: dynamic, per token
    online             kind of rotation (hadamard, butterfly) to the targets whose input is rotated,
                       before it is rounded
    attention          rotation of queries and keys, and kv_cache: what keys and values are rounded
                       to, dynamic, per head and token
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rotq.errors import RotqError
from rotq.formats.activations import ActivationGrid
from rotq.formats.integer import Grid
from rotq.layers.online_heads import UNTOUCHED, OnlineHeads
from rotq.layers.online_linear import ROTATIONS

CT_VERSION = "0.20.0"
ROTQ_VERSION = 3
"""Newest version of the rotq format; a checkpoint says the oldest that has what it needs."""
METHODS = ("compressed-tensors", "rotq")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that are quantized alike."""

    targets: tuple[str, ...]
    grid: Grid
    input_grid: ActivationGrid | None
    """What their inputs are rounded to at run time; None leaves them."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The reading side: grids and online rotation by layer name, and what attention does."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    online: Mapping[str, tuple[str, ...]]
    """Kind of rotation to the targets it is applied before."""
    heads: OnlineHeads = UNTOUCHED
    """What every attention does at run time."""

    def grid(self, name: str) -> Grid | None:
        """The grid of the linear layer ``name``; None where it is not quantized."""
        group = self.group(name)
        return None if group is None else group.grid

    def group(self, name: str) -> Group | None:
        """The group of the linear layer ``name``; None where it is not quantized."""
        if any(_rank(target, name) is not None for target in self.ignore):
            return None
        ranked = [
            (rank, number)
            for number, group in enumerate(self.groups)
            for target in group.targets
            if (rank := _rank(target, name)) is not None
        ]
        return self.groups[min(ranked)[1]] if ranked else None

    def rotation(self, name: str) -> str | None:
        """How the input of ``name`` is rotated at run time; None where it is not."""
        for kind, targets in self.online.items():
            if any(_rank(target, name) is not None for target in targets):
                return kind
        return None


def read_scheme(config: Mapping[str, Any]) -> Scheme:
    """Read a ``quantization_config``.

    Raises:
        RotqError: another method, or something that rotq cannot run: activations with stored
            scales, caches quantized by compressed-tensors, float weights, columns in another
            order, online transforms of compressed-tensors.
    """
    method = config.get("quant_method")
    if method not in METHODS:
        raise RotqError(f"quantized with {method}; rotq reads {' and '.join(METHODS)}")
    if method == "rotq" and config.get("version") not in range(1, ROTQ_VERSION + 1):
        raise RotqError(f"rotq format {config.get('version')}; this rotq reads 1 to {ROTQ_VERSION}")
    _refuse_transforms(config)
    if config.get("kv_cache_scheme"):
        raise RotqError("the checkpoint quantizes the KV cache, which rotq cannot run")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise RotqError("quantization_config has no config_groups")
    for kind in config.get("online") or {}:
        if kind not in ROTATIONS:
            raise RotqError(f"unknown online rotation {kind}; known: {', '.join(ROTATIONS)}")
    return Scheme(
        groups=tuple(
            _read_group(name, group, config.get("format")) for name, group in groups.items()
        ),
        ignore=tuple(config.get("ignore") or ()),
        online={kind: tuple(targets) for kind, targets in (config.get("online") or {}).items()},
        heads=_read_heads(config.get("attention") or {}),
    )


def quantization_config(
    layers: Mapping[str, Grid],
    kept: Sequence[str],
    format: str,
    online: Mapping[str, str] | None = None,
    *,
    inputs: ActivationGrid | None = None,
    heads: OnlineHeads = UNTOUCHED,
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Args:
        layers: Full name of each quantized linear layer to its grid.
        kept: Full names of the linear layers left dense; every linear layer of the model is
            in ``layers`` or here.
        format: ``compressed-tensors`` or ``rotq``.
        online: Full name of a layer to the kind of rotation of its input; only for ``rotq``.
        inputs: What the inputs of ``layers`` are rounded to at run time.
        heads: What every attention does at run time; only for ``rotq``.

    Returns:
        One config group where all grids are equal, with the target ``Linear``; else a group per
        grid. A target is a pattern over block and expert numbers where the group has all layers
        that the pattern matches, and a full name elsewhere. ``dequantize`` is set where all
        grids are equal and asymmetric: transformers 5.23 with compressed-tensors 0.20 refuses
        packed zero points unless it makes the weights dense while loading. In that mode it takes
        the first group for every layer, so that different asymmetric grids are not readable by
        it at all (``transformers_obstacle``).

    Raises:
        ValueError: no layers, unknown format, ``online`` or ``heads`` in a format that cannot
            express it, or ``inputs`` where transformers would drop them: it leaves them out where
            it makes weights dense while loading.
    """
    if format not in METHODS or not layers:
        raise ValueError(f"format must be one of {METHODS} and layers not empty, got {format!r}")
    if (online or heads != UNTOUCHED) and format != "rotq":
        raise ValueError(f"online rotations and rounded heads cannot be expressed in {format}")
    if inputs is not None and format != "rotq" and not all(g.symmetric for g in layers.values()):
        raise ValueError(f"{format}: rounded inputs are dropped where weights have zero points")
    by_grid: dict[Grid, list[str]] = {}
    for name, grid in layers.items():
        by_grid.setdefault(grid, []).append(name)
    everything = [*layers, *kept]
    targets = [_targets(names, everything) for names in by_grid.values()]
    if len(by_grid) == 1:
        targets = [["Linear"]]
    config: dict[str, Any] = {
        "config_groups": {
            f"group_{number}": _group(grid, group, inputs)
            for number, (grid, group) in enumerate(zip(by_grid, targets, strict=True))
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "quant_method": format,
        "quantization_status": "compressed",
    }
    if format == "rotq":
        config["online"] = _online(online or {}, everything)
        if heads != UNTOUCHED:
            config["attention"] = _attention(heads)
        newest = 3 if "butterfly" in config["online"] else 2 if heads != UNTOUCHED else 1
        return {**config, "version": newest}
    unused: dict[str, Any] = {
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    config |= {**unused, "version": CT_VERSION}
    if len(by_grid) == 1 and not next(iter(by_grid)).symmetric:
        config["dequantize"] = True
    return config


def transformers_obstacle(config: Mapping[str, Any], *, has_experts: bool) -> str | None:
    """Why transformers 5.23 with compressed-tensors 0.20 cannot load this; None where it can.

    Args:
        config: From ``quantization_config``.
        has_experts: Experts, stored one by one, are among the quantized layers.
    """
    groups = config["config_groups"].values()
    symmetric = all(group["weights"]["symmetric"] for group in groups)
    if config["quant_method"] == "rotq":
        return None
    if has_experts and (len(groups) > 1 or not symmetric):
        return "it fuses experts, and then reads neither zero points nor several grids"
    if len(groups) > 1 and not symmetric:
        return "it does not read zero points where there are several grids"
    return None


def _online(online: Mapping[str, str], everything: Iterable[str]) -> dict[str, list[str]]:
    by_kind: dict[str, list[str]] = {}
    for name, kind in online.items():
        by_kind.setdefault(kind, []).append(name)
    return {kind: _targets(names, everything) for kind, names in sorted(by_kind.items())}


def _attention(heads: OnlineHeads) -> dict[str, Any]:
    return {
        "rotation": "hadamard" if heads.rotated else None,
        "kv_cache": _dynamic(heads.grid),
    }


def _dynamic(grid: ActivationGrid | None) -> dict[str, Any] | None:
    if grid is None:
        return None
    return {
        "dynamic": True,
        "group_size": None,
        "num_bits": grid.bits,
        "strategy": "token",
        "symmetric": grid.symmetric,
        "type": "int",
    }


def _group(grid: Grid, targets: list[str], inputs: ActivationGrid | None) -> dict[str, Any]:
    weights = {
        "dynamic": False,
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "num_bits": grid.bits,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "symmetric": grid.symmetric,
        "type": "int",
    }
    return {
        "format": "pack-quantized",
        "input_activations": _dynamic(inputs),
        "output_activations": None,
        "targets": targets,
        "weights": weights,
    }


def _targets(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    wanted = set(names)
    classes: dict[str, list[str]] = {}
    for name in everything:
        classes.setdefault(_pattern(name), []).append(name)
    targets = []
    for pattern, members in classes.items():
        inside = [name for name in members if name in wanted]
        whole = len(inside) == len(members) > 1
        targets += [pattern] if whole else inside
    return targets


def _pattern(name: str) -> str:
    """``re:model\\.layers\\.\\d+\\.mlp\\.down_proj$`` for any block's ``down_proj``."""
    parts = (r"\d+" if part.isdecimal() else re.escape(part) for part in name.split("."))
    return "re:" + r"\.".join(parts) + "$"


def _rank(target: str, name: str) -> int | None:
    """0 for the full name, 1 for a pattern, 2 for the class; None where it does not match."""
    if target == name:
        return 0
    if target.startswith("re:"):
        return 1 if re.match(target[3:], name) else None
    return 2 if target == "Linear" else None


def _read_heads(attention: Mapping[str, Any]) -> OnlineHeads:
    rotation = attention.get("rotation")
    if rotation not in (None, "hadamard"):
        raise RotqError(f"unknown rotation of heads {rotation}; known: hadamard")
    grid = _read_dynamic("attention.kv_cache", attention.get("kv_cache"))
    return OnlineHeads(rotated=rotation is not None, grid=grid)


def _read_group(name: str, group: Mapping[str, Any], format: str | None) -> Group:
    return Group(
        targets=tuple(group["targets"]),
        grid=_read_grid(name, group, format),
        input_grid=_read_dynamic(f"{name}.input_activations", group.get("input_activations")),
    )


def _read_dynamic(name: str, args: Mapping[str, Any] | None) -> ActivationGrid | None:
    """A grid of activations; only integers with scales found per token are run here."""
    if not args:
        return None
    found = (args.get("type", "int"), args.get("dynamic"), args.get("strategy"))
    if found != ("int", True, "token"):
        raise RotqError(
            f"{name} is {found[0]}, dynamic {found[1]}, with scales per {found[2]}; "
            "rotq runs dynamic int per token"
        )
    try:
        return ActivationGrid(bits=args["num_bits"], symmetric=args["symmetric"])
    except (KeyError, TypeError, ValueError) as error:
        raise RotqError(f"{name} of quantization_config is not valid: {error}") from error


def _read_grid(name: str, group: Mapping[str, Any], format: str | None) -> Grid:
    weights = group.get("weights") or {}
    if group.get("output_activations"):
        raise RotqError(f"{name} quantizes the outputs of layers, which rotq cannot run")
    stored = group.get("format") or format
    if stored != "pack-quantized" or weights.get("type") != "int":
        raise RotqError(
            f"{name} is stored as {stored}, {weights.get('type')}; rotq reads packed int"
        )
    strategy, actorder = weights.get("strategy"), weights.get("actorder")
    if strategy not in ("group", "channel"):
        raise RotqError(f"{name} has scales per {strategy}; rotq reads per group and per channel")
    if actorder not in (None, "weight", "static", False):
        raise RotqError(f"{name} stores its columns in another order (actorder {actorder})")
    try:
        return Grid(
            bits=weights["num_bits"],
            group_size=weights["group_size"] if strategy == "group" else -1,
            symmetric=weights["symmetric"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RotqError(f"{name} of quantization_config is not valid: {error}") from error


def _refuse_transforms(config: Mapping[str, Any]) -> None:
    groups = (config.get("transform_config") or {}).get("config_groups") or {}
    for name, transform in groups.items():
        places = {str(apply.get("location")) for apply in transform.get("apply", ())}
        online = places - {"weight_input", "weight_output"}
        if online:
            raise RotqError(
                f"the transform {name} of the checkpoint works at run time "
                f"({', '.join(sorted(online))}), which rotq cannot run"
            )
