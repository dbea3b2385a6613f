"""``quantization_config`` as it is written; ``scheme`` has the fields and reads them back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from rotq.checkpoint.scheme import METHODS
from rotq.checkpoint.scheme_groups import CODE, FIELDS, FLOATS, INPUT_FIELDS, PLAIN, TRELLIS
from rotq.formats.activations import ActivationGrid
from rotq.formats.float_inputs import FloatInputs
from rotq.formats.floats import FloatGrid
from rotq.formats.integer import Grid, PlainGrid
from rotq.formats.trellis import Trellis
from rotq.layers.online_heads import UNTOUCHED, OnlineHeads

CT_VERSION = "0.20.0"


def quantization_config(
    layers: Mapping[str, Grid],
    kept: Sequence[str],
    format: str,
    rotated: Collection[str] = (),
    *,
    block_size: int | None = None,
    turns_residual: bool = False,
    outer: Mapping[str, Grid] | None = None,
    inputs: ActivationGrid | None = None,
    heads: OnlineHeads = UNTOUCHED,
    prefix: str = "",
    stored_name: Callable[[str], str] | None = None,
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Args:
        layers: Full name of each quantized linear layer to its grid.
        kept: Full names of the linear layers left dense; every linear layer of the model is
            in ``layers`` or here.
        format: ``compressed-tensors`` or ``rotq``.
        rotated: Full names of the layers whose input is rotated; only for ``rotq``.
        block_size: Features that are rotated together; None for all that a layer reads.
        turns_residual: R1 is applied at run time; only for ``rotq``.
        outer: The same of the embedding and of a head with a weight of its own, where they are
            packed; what the head reads is never rounded.
        inputs: What the inputs of ``layers`` are rounded to at run time.
        heads: What every attention does at run time; only for ``rotq``.
        prefix: Of the model below its head. Names are matched with it and without, so that a model
            without a head, or with another one, finds its layers.
        stored_name: Of a tensor, in the files (``Source.stored_name``). Layers whose weights have
            another name there than in transformers' model are targets by both: vLLM's modules are
            called as in the files.

    Returns:
        A config group per grid. Its targets are the layers' names, never their class, which would
        take in the head that somebody puts on the model: patterns over block and expert numbers
        where the group has all layers that the pattern matches, and single names elsewhere.
        ``dequantize`` is set where all
        grids are equal and asymmetric: transformers 5.23 with compressed-tensors 0.20 refuses
        packed zero points unless it makes the weights dense while loading. In that mode it takes
        the first group for every layer, so that different asymmetric grids are not readable by
        it at all (``transformers_obstacle``).

    Raises:
        ValueError: no layers, unknown format, ``rotated`` or ``heads`` in a format that cannot
            express it, a trellis in another than ``rotq``, or ``inputs`` where transformers would
            drop them: it leaves them out where it makes weights dense while loading.
    """
    if format not in METHODS or not layers:
        raise ValueError(f"format must be one of {METHODS} and layers not empty, got {format!r}")
    if (rotated or turns_residual or heads != UNTOUCHED) and format != "rotq":
        raise ValueError(f"online rotations and rounded heads cannot be expressed in {format}")
    if inputs is not None and format != "rotq" and not all(g.symmetric for g in layers.values()):
        raise ValueError(f"{format}: rounded inputs are dropped where weights have zero points")
    if format != "rotq" and any(isinstance(grid, Trellis) for grid in layers.values()):
        raise ValueError(f"paths through a trellis cannot be expressed in {format}")
    outer = outer or {}
    both = _both_names(stored_name)
    layers, outer = (
        {name: grid for known, grid in part.items() for name in both(known)}
        for part in (layers, outer)
    )
    rotated = [name for known in rotated for name in both(known)]
    everything = [*layers, *outer, *(name for known in kept for name in both(known))]
    config: dict[str, Any] = {
        "config_groups": _groups([(layers, inputs), (outer, None)], everything, prefix),
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "quant_method": format,
        "quantization_status": "compressed",
    }
    if format == "rotq":
        fields = _rotq_fields(_targets(rotated, everything, prefix), block_size, heads)
        if outer:
            fields["version"] = 5
        if turns_residual:
            fields["online"]["residual"] = "hadamard"
            fields["version"] = 6
        if any(isinstance(grid, FloatGrid) for grid in layers.values()):
            fields["version"] = 8
        if any(isinstance(grid, Trellis) for grid in layers.values()):
            fields |= {"format": TRELLIS, "version": 7}
        return config | fields
    (stored,) = {group["format"] for group in config["config_groups"].values()}
    config["format"] = stored
    return config | _compressed_tensors_fields({*layers.values(), *outer.values()})


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


def _both_names(stored_name: Callable[[str], str] | None) -> Callable[[str], tuple[str, ...]]:
    """From a layer's name to that and the one its tensors have in the files, if it is another."""

    def both(name: str) -> tuple[str, ...]:
        if stored_name is None:
            return (name,)
        stored = stored_name(f"{name}.weight").removesuffix(".weight")
        return tuple(dict.fromkeys((name, stored)))

    return both


def _rotq_fields(rotated: list[str], block_size: int | None, heads: OnlineHeads) -> dict[str, Any]:
    fields: dict[str, Any] = {"online": {"hadamard": rotated} if rotated else {}, "version": 1}
    if heads != UNTOUCHED:
        fields |= {"attention": _attention(heads), "version": 2}
    if rotated and block_size is not None:
        fields["online"]["block_size"] = block_size
        fields["version"] = 4
    return fields


def _compressed_tensors_fields(grids: set[Grid]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": CT_VERSION,
    }
    if len(grids) == 1 and not next(iter(grids)).symmetric:
        fields["dequantize"] = True
    return fields


def _attention(heads: OnlineHeads) -> dict[str, Any]:
    return {
        "rotation": "hadamard" if heads.rotated else None,
        "kv_cache": _dynamic(heads.grid),
    }


def _dynamic(grid: ActivationGrid | None) -> dict[str, Any] | None:
    if grid is None:
        return None
    if isinstance(grid, FloatInputs):
        dynamic = "local" if grid.has_global_scale else True
        fields = {**INPUT_FIELDS[grid.kind], **_float_scales(grid.grid), "dynamic": dynamic}
        return fields | ({"observer": "static_minmax"} if grid.has_global_scale else {})
    return {
        "dynamic": True,
        "group_size": None,
        "num_bits": grid.bits,
        "strategy": "token",
        "symmetric": grid.symmetric,
        "type": "int",
    }


def _groups(
    parts: Sequence[tuple[Mapping[str, Grid], ActivationGrid | None]],
    everything: Sequence[str],
    prefix: str,
) -> dict[str, dict[str, Any]]:
    """A group for each grid of each part: layers by grid, and what their inputs are rounded to."""
    groups = []
    for layers, inputs in parts:
        by_grid: dict[Grid, list[str]] = {}
        for name, grid in layers.items():
            by_grid.setdefault(grid, []).append(name)
        for grid, names in by_grid.items():
            groups.append(_group(grid, _targets(names, everything, prefix), inputs))
    return {f"group_{number}": group for number, group in enumerate(groups)}


def _group(grid: Grid, targets: list[str], inputs: ActivationGrid | None) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "dynamic": False,
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "num_bits": grid.bits,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "symmetric": grid.symmetric,
        "type": "int",
    }
    stored = PLAIN if isinstance(grid, PlainGrid) else "pack-quantized"
    if isinstance(grid, FloatGrid):
        stored = FLOATS[grid.kind]
        weights = {**FIELDS[grid.kind], **_float_scales(grid), "dynamic": False}
    if isinstance(grid, Trellis):
        stored = TRELLIS
        weights |= {"type": TRELLIS, "code": CODE, "state_bits": grid.state_bits}
    return {
        "format": stored,
        "input_activations": _dynamic(inputs),
        "output_activations": None,
        "targets": targets,
        "weights": weights,
    }


def _float_scales(grid: FloatGrid) -> dict[str, Any]:
    """How compressed-tensors names the dtypes of scales; a power of two is the byte of it."""
    if grid.scale_dtype is None:
        return {}
    dtype = "torch.float8_e4m3fn" if grid.has_global_scale else "torch.uint8"
    return {"scale_dtype": dtype, "zp_dtype": dtype}


def _targets(names: Iterable[str], everything: Iterable[str], prefix: str) -> list[str]:
    wanted = set(names)
    classes: dict[str, list[str]] = {}
    for name in everything:
        classes.setdefault(_pattern(name, prefix, numbers=False), []).append(name)
    targets = []
    for pattern, members in classes.items():
        inside = [name for name in members if name in wanted]
        whole = len(inside) == len(members) > 1
        targets += [pattern] if whole else [_single(name, prefix) for name in inside]
    return targets


def _single(name: str, prefix: str) -> str:
    """The full name, or a pattern of it where it has the prefix."""
    inside = bool(prefix) and name.startswith(f"{prefix}.")
    return _pattern(name, prefix, numbers=True) if inside else name


def _pattern(name: str, prefix: str, *, numbers: bool) -> str:
    """``re:(model\\.)?layers\\.\\d+\\.mlp\\.down_proj$`` for any block's ``down_proj``.

    Args:
        numbers: Keep those that the name has.
    """
    inside = bool(prefix) and name.startswith(f"{prefix}.")
    parts = name.removeprefix(f"{prefix}.").split(".") if inside else name.split(".")
    escaped = (r"\d+" if part.isdecimal() and not numbers else re.escape(part) for part in parts)
    optional = rf"({re.escape(prefix)}\.)?" if inside else ""
    return "re:" + optional + r"\.".join(escaped) + "$"
