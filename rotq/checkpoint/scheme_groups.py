"""A group of layers of ``quantization_config``: which, stored how, and what their inputs become."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rotq.errors import RotqError
from rotq.formats.activations import ActivationGrid
from rotq.formats.float_inputs import FloatInputs, float_inputs
from rotq.formats.floats import FloatGrid, float_grid
from rotq.formats.integer import Grid, PlainGrid
from rotq.formats.trellis import Trellis

FLOATS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "fp8": "float-quantized",
    "fp8_block": "float-quantized",
}
"""Formats of a group whose weights are floats."""

PLAIN = "int-quantized"
"""Format of a group whose weights are int8, as they are."""

TRELLIS, CODE = "trellis", "mul1"
"""Type of weights that are paths, and what gives their states levels."""


FIELDS: dict[str, dict[str, Any]] = {
    kind: {"num_bits": bits, "strategy": strategy, "symmetric": True, "type": "float", **group}
    for kind, bits, strategy, group in (
        ("nvfp4", 4, "tensor_group", {"group_size": 16}),
        ("mxfp4", 4, "group", {"group_size": 32}),
        ("fp8", 8, "channel", {"group_size": None}),
        ("fp8_block", 8, "block", {"group_size": None, "block_structure": [128, 128]}),
    )
}
"""What compressed-tensors says of weights in each of them."""

INPUT_FIELDS = {
    **FIELDS,
    "fp8": {**FIELDS["fp8"], "strategy": "token"},
    "fp8_block": {**FIELDS["fp8"], "strategy": "group", "group_size": 128},
}
"""The same of what layers read, but for ``dynamic``."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that are quantized alike."""

    targets: tuple[str, ...]
    grid: Grid
    input_grid: ActivationGrid | None
    """What their inputs are rounded to at run time; None leaves them."""


def read_group(name: str, group: Mapping[str, Any], format: str | None) -> Group:
    grid = _read_grid(name, group, format)
    inputs, where = group.get("input_activations"), f"{name}.input_activations"
    return Group(
        targets=read_targets(f"{name}.targets", group.get("targets")),
        grid=grid,
        input_grid=(
            _read_floats(where, inputs, grid)
            if isinstance(grid, FloatGrid)
            else read_dynamic(where, inputs)
        ),
    )


def _read_floats(name: str, value: Any, grid: FloatGrid) -> FloatInputs | None:
    """The floats that inputs are rounded to: those of the weights, with scales found per group."""
    args = mapping(name, value)
    if not args:
        return None
    wanted = INPUT_FIELDS[grid.kind]
    found = {key: args.get(key) for key in wanted}
    dynamic = args.get("dynamic")
    if found != wanted or dynamic != ("local" if grid.has_global_scale else True):
        raise RotqError(f"{name} is not {grid.kind} with scales found at run time, as the weights")
    return float_inputs(grid.kind)


def read_dynamic(name: str, value: Any) -> ActivationGrid | None:
    """A grid of activations; only integers with scales found per token are run here."""
    args = mapping(name, value)
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
    weights = mapping(f"{name}.weights", group.get("weights"))
    if group.get("output_activations"):
        raise RotqError(f"{name} quantizes the outputs of layers, which rotq cannot run")
    stored = group.get("format") or format
    if stored == TRELLIS:
        return _read_trellis(name, weights)
    if stored is not None and stored in FLOATS.values():
        return _read_float(name, stored, weights)
    if stored not in ("pack-quantized", PLAIN) or weights.get("type") != "int":
        raise RotqError(
            f"{name} is stored as {stored}, {weights.get('type')}; rotq reads packed int, plain "
            "int8, nvfp4, mxfp4, and fp8 per channel and block"
        )
    strategy, actorder = weights.get("strategy"), weights.get("actorder")
    if strategy not in ("group", "channel"):
        raise RotqError(f"{name} has scales per {strategy}; rotq reads per group and per channel")
    if actorder not in (None, "weight", "static", False):
        raise RotqError(f"{name} stores its columns in another order (actorder {actorder})")
    kind = PlainGrid if stored == PLAIN else Grid
    if stored == PLAIN and (weights.get("num_bits"), weights.get("symmetric")) != (8, True):
        raise RotqError(f"{name} is stored as {PLAIN}, which rotq reads symmetric and of 8 bits")
    try:
        return kind(
            bits=weights["num_bits"],
            group_size=weights["group_size"] if strategy == "group" else -1,
            symmetric=weights["symmetric"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RotqError(f"{name} of quantization_config is not valid: {error}") from error


def _read_float(name: str, stored: str, weights: Mapping[str, Any]) -> FloatGrid:
    for kind in (kind for kind, format in FLOATS.items() if format == stored):
        if all(weights.get(key) == value for key, value in FIELDS[kind].items()):
            return float_grid(kind)
    raise RotqError(f"{name} is stored as {stored}, but its weights are not: {dict(weights)}")


def _read_trellis(name: str, weights: Mapping[str, Any]) -> Trellis:
    found = (weights.get("type"), weights.get("code"))
    if found != (TRELLIS, CODE):
        raise RotqError(f"{name} is stored as {found[0]}, code {found[1]}; rotq reads {CODE}")
    try:
        return Trellis(
            bits=weights["num_bits"],
            group_size=weights["group_size"] if weights["strategy"] == "group" else -1,
            state_bits=weights["state_bits"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RotqError(f"{name} of quantization_config is not valid: {error}") from error


def read_targets(name: str, targets: object) -> tuple[str, ...]:
    """Names and patterns of layers; those that no layer can be compared with are refused."""
    if not isinstance(targets, list | tuple) or not all(isinstance(t, str) for t in targets):
        raise RotqError(f"{name} of quantization_config is not a list of names")
    for target in targets:
        try:
            re.compile(target[3:] if target.startswith("re:") else "")
        except (re.error, OverflowError, RecursionError) as error:
            raise RotqError(f"{name} of quantization_config: {target!r}: {error}") from None
    return tuple(targets)


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """A part of the config that has parts; empty where there is none."""
    if not isinstance(value or {}, dict):
        raise RotqError(f"{name} of quantization_config is not a mapping")
    return value or {}
