"""Figures and settings of a job in a few words, each for one line of a table.

Sizes in MB and GB are 10^6 and 10^9 bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

ROTATIONS = ("residual", "value", "attention", "down", "inputs")
"""Keys of the recipe's section and of the report's."""


def recipe_line(recipe: dict[str, Any]) -> str:
    """A recipe in a few words."""
    weights, rotation = recipe["weights"], recipe["rotation"]
    group = weights["group_size"]
    turned = [name for name in ROTATIONS if rotation.get(name, "none") != "none"]
    average = weights.get("average_bits", 0)
    sizes = [f"{weights['bits']} bits", "per channel" if group == -1 else f"group {group}"]
    parts = [
        *([f"{average:g} bits on average"] if average else sizes),
        "symmetric" if weights["symmetric"] else "asymmetric",
        *(
            f"{label}{recipe[key]['bits']}"
            for label, key in (("A", "activations"), ("KV", "kv_cache"))
            if recipe.get(key, {}).get("bits", 16) != 16
        ),
        recipe["solver"]["method"],
        *(["trellis"] if recipe["solver"].get("rounder") == "trellis" else []),
        *(
            f"{name} {weights[name]} bits"
            for name in ("embedding", "head")
            if weights.get(name, 16) != 16
        ),
        *(["rotated " + "+".join(turned)] if turned else []),
    ]
    return f"{recipe['name']}: {', '.join(parts)}"


def quantization_line(config: dict[str, Any] | None) -> str:
    """The quantization_config of a checkpoint in a few words."""
    if config is None:
        return "none"
    parts = [str(config.get("quant_method")), str(config.get("format", ""))]
    groups = config.get("config_groups") or {}
    kinds = sorted({f"{group['weights']['num_bits']} bits" for group in groups.values()})
    if "bits" in config:  # of EXL3, on average
        kinds.append(f"{config['bits']} bits")
    ignored = config.get("ignore") or []
    kept = f"{len(ignored)} modules kept" if ignored else ""
    return ", ".join(part for part in (*parts, *kinds, kept) if part)


def runtime_line(config: dict[str, Any]) -> str:
    """What a quantization_config asks of the runtime besides packed weights; empty for nothing."""
    groups = (config.get("config_groups") or {}).values()
    inputs = {_rounding(group.get("input_activations"), "token") for group in groups} - {""}
    attention = config.get("attention") or {}
    heads = _rounding(attention.get("kv_cache"), "head and token")
    online = config.get("online") or {}
    blocks = f" in blocks of {online['block_size']}" if "block_size" in online else ""
    turned = [
        f"{kind}{blocks} before {len(targets)} targets"
        for kind, targets in online.items()
        if kind not in ("block_size", "residual")
    ]
    parts = [
        *(f"inputs {rounding}" for rounding in sorted(inputs)),
        *([f"keys and values {heads}"] if heads else []),
        *([f"{attention['rotation']} on queries and keys"] if attention.get("rotation") else []),
        *turned,
        *(["hadamard on the residual stream between the blocks"] if "residual" in online else []),
    ]
    return "; ".join(parts)


def _rounding(args: dict[str, Any] | None, per: str) -> str:
    if not args:
        return ""
    kind = "symmetric" if args["symmetric"] else "asymmetric"
    return f"{args['num_bits']} bits {kind} per {per}"


def rotation_line(rotation: dict[str, Any]) -> str:
    """What was rotated, and how well the function was preserved."""
    built = [f"{name} {rotation[name]}" for name in ROTATIONS if name in rotation]
    difference = rotation.get("largest_relative_difference")
    if not built:
        return "none"
    kept = "" if difference is None else f"; logits kept to {difference:.1e}"
    return ", ".join(built) + kept


def transform_line(transform: dict[str, Any]) -> str:
    """How the rotations were found: losses and angles."""
    parts = [str(transform["method"])]
    for name in ("layers", "model", "optrot"):
        if name in transform:
            phase = transform[name]
            before, after = phase["loss_first_quarter"], phase["loss_last_quarter"]
            parts.append(f"{phase['steps']} steps, loss {before:.3g} to {after:.3g}")
    if "residual_angle" in transform:
        parts.append(f"R1 turned by {transform['residual_angle']:.3f} rad")
    return ", ".join(parts)


def flatness_line(flatness: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """max/rms of each kind of site, median over blocks, before and after the rotations."""
    kinds: dict[str, list[dict[str, dict[str, float | None]]]] = {}
    for name, change in flatness.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(change)
    parts = []
    for kind, changes in kinds.items():
        before, after = (
            statistics.median(change[when]["max_over_rms"] or 0.0 for change in changes)
            for when in ("before", "after")
        )
        parts.append(f"{kind} {before:.1f} to {after:.1f}")
    return ", ".join(parts)


def larger_line(num_bytes: int, source_bytes: int, *, is_packed: bool) -> str | None:
    """What is said of a checkpoint that is larger than the quantized file that it was made of.

    Args:
        source_bytes: Of that file; 0 where it was none.
        is_packed: The embedding is.
    """
    if not 0 < source_bytes < num_bytes:
        return None
    advice = (
        "" if is_packed else "; weights.embedding=6 with output.format=rotq packs the embedding"
    )
    return (
        f"the weights take {size(num_bytes)}, more than the {size(source_bytes)} of the quantized "
        f"file that they were made of{advice}"
    )


def outer_line(outer: Sequence[dict[str, Any]]) -> str:
    """Embedding and head, as a report has them."""
    return ", ".join(
        f"{layer['name']} {layer['bits_per_weight']:.2f} bits, relative error "
        f"{layer['relative_error']:.2%}"
        for layer in outer
    )


def size(num_bytes: float) -> str:
    """Bytes in MB or GB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Minutes and seconds, as 3:07 min."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
