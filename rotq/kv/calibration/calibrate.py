"""Choose a layer's constants: without a model's statistics, or from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rotq.kv.calibration.budget import bits_chosen, budgeted, check_average, side_losses
from rotq.kv.calibration.codebook import gaussian_codebook
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.calibration.fit import fit_layer
from rotq.kv.calibration.layer_constants import (
    centred_base,
    hadamard_basis,
    kv_format,
    layer_constants,
    side_constants,
    unbiased_scale,
)
from rotq.kv.calibration.model_hash import hash_config
from rotq.kv.calibration.statistics import LayerStatistics, collect
from rotq.kv.presets import KVSpec
from rotq.models.rotary import KVShape, kv_shapes
from rotq.ops import KVConstants, SideConstants

_TYPICAL_RESIDUAL = 0.2
"""rms of what 3-bit codes leave, in units of rms(y); only centres the range of its norm."""


def calibrate(
    model: Any,
    ids_BT: Tensor,
    spec: KVSpec,
    *,
    source: dict[str, Any] | None = None,
    statistics: list[LayerStatistics] | None = None,
    on_window: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], object] = warnings.warn,
) -> KVCalibration:
    """Constants of every layer of a model under a scheme.

    Args:
        model: A causal language model of transformers.
        ids_BT: int64 token ids of the calibration windows.
        spec: The scheme.
        source: Where the windows come from, for the file.
        statistics: Of the same model, if they were collected before.
        on_window: Called with windows done and windows in all.
        on_note: Called with a line where the windows say too little; see ``evidence``.

    Raises:
        RotqError: see ``statistics.collect`` and ``budget``.
    """
    check_average(model.config, spec)
    if statistics is None:
        statistics = collect(model, ids_BT, sinks=spec.sinks, on_window=on_window)
    layers = {}
    for layer, found in enumerate(statistics):
        format = kv_format(spec, found.shape.head_dim, layer, len(statistics))
        layers[layer] = fit_layer(found.shrunk(), spec, format)
    chosen: dict[str, Any] = {}
    if spec.average_bits is not None:
        losses = side_losses(model, ids_BT, layers, sinks=spec.sinks)
        layers = budgeted(layers, losses, spec.average_bits)
        chosen = {"bits": bits_chosen(layers), "losses": list(losses.values())}
    width = max(found.shape.head_dim for found in statistics)
    evidence = statistics[0].evidence
    note = evidence.note(width) if spec.needs_calibration else ""
    if note:
        on_note(note)
    static = [n for n, constants in layers.items() if constants.mean != spec.mean]
    return KVCalibration(
        spec=spec,
        layers=layers,
        model_hash=hash_config(model.config),
        source={
            **(source or {}),
            "windows": list(ids_BT.shape),
            "static_mean_layers": static,
            "weight": evidence.weight(width),
            "notes": [note] if note else [],
            **chosen,
        },
    )


def data_oblivious(config: Any, spec: KVSpec) -> KVCalibration:
    """Constants that need no statistics: Hadamard basis, normal codebooks, no mean, no metric.

    Args:
        config: transformers' configuration.
        spec: What it asks of statistics is left out; see ``KVSpec.oblivious``.

    Raises:
        ValueError: the scheme does not exist without statistics.
        RotqError: the model has no keys and values that can be packed.
    """
    spec = spec.oblivious()
    shapes = kv_shapes(config)
    layers = {
        layer: _oblivious_layer(spec, shape, layer, len(shapes))
        for layer, shape in enumerate(shapes)
    }
    return KVCalibration(spec=spec, layers=layers, model_hash=hash_config(config))


def _oblivious_layer(spec: KVSpec, shape: KVShape, layer: int, num_layers: int) -> KVConstants:
    format = kv_format(spec, shape.head_dim, layer, num_layers)
    scale_H = gamma_base_H = None
    if spec.residual == "qjl":
        scale_H = torch.full((shape.num_heads,), unbiased_scale(spec, shape.head_dim))
        gamma_base_H = centred_base(torch.full_like(scale_H, _TYPICAL_RESIDUAL), scale_H / scale_H)
    elif spec.residual == "sign":
        scale_H = torch.full((shape.num_heads,), _typical_sign(format.k_bits))
    return layer_constants(
        spec,
        shape,
        format,
        key=_oblivious_side(spec, shape, format.k_bits),
        value=_oblivious_side(spec, shape, format.v_bits),
        rotary=None,
        residual_scale_H=scale_H,
        gamma_base_H=gamma_base_H,
    )


def _oblivious_side(spec: KVSpec, shape: KVShape, bits: int) -> SideConstants:
    book = gaussian_codebook(bits)
    H, D = shape.num_heads, shape.head_dim
    unit_H = torch.full((H,), book.unit)
    return side_constants(
        hadamard_basis(D).expand(H, -1, -1),
        torch.zeros(H, D),
        [book] * H,
        gain=spec.gain,
        base_H=centred_base(torch.ones(H), unit_H),
    )


def _typical_sign(bits: int) -> float:
    """Mean |y - L[q]| of unit normal numbers in units of a level."""
    book = gaussian_codebook(bits)
    grid_N: Tensor = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    density_N = torch.exp(-(grid_N**2) / 2)
    code_N = torch.searchsorted(book.thresholds_E.double(), grid_N)
    levels_L = book.levels_L.double()
    if not levels_L.numel():
        levels_L = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    error_N = (grid_N / book.unit - levels_L[code_N]).abs()
    return float((error_N * density_N).sum() / density_N.sum())
