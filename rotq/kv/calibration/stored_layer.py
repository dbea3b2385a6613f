"""What a calibration file holds of one layer.

Its tensors are ``<layer>.<side>.<name>``, or ``<layer>.<name>`` for those of no side. What is equal
for all heads is stored once; inverses are not stored but taken again.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from rotq.kv.calibration.layer_constants import stored_inverse
from rotq.ops import KVConstants, KVFormat, SideConstants

_SIDE = ("matrix_HDD", "mean_HD", "levels_HL", "thresholds_HL", "base_H", "unit_H")
_LAYER = ("inv_freq_R", "sketch_DD", "residual_scale_H", "gamma_base_H")


def layer_facts(constants: KVConstants) -> dict[str, Any]:
    """What is no tensor, ready for JSON."""
    return {
        "format": asdict(constants.format),
        "mean": constants.mean,
        "rotary_scale": constants.rotary_scale,
        "heads": constants.key.base_H.numel(),
        "key_gain": constants.key.gain,
        "value_gain": constants.value.gain,
        "key_search": constants.key.search,
        "value_search": constants.value.search,
    }


def layer_tensors(layer: int, constants: KVConstants) -> dict[str, Tensor]:
    """The tensors of a layer by their names in the file."""
    tensors: dict[str, Tensor] = {}
    for side, held in (("key", constants.key), ("value", constants.value)):
        for name in _SIDE:
            tensors[f"{layer}.{side}.{name}"] = _stored_once(getattr(held, name))
        if held.metric_HDD is not None:
            tensors[f"{layer}.{side}.metric_HDD"] = _stored_once(held.metric_HDD)
    for name in _LAYER:
        value = getattr(constants, name)
        if value is not None:
            tensors[f"{layer}.{name}"] = value.clone()
    return tensors


def _stored_once(tensor: Tensor) -> Tensor:
    equal = bool((tensor == tensor[:1]).all())
    return (tensor[:1] if equal else tensor).clone().contiguous()


def restore_layer(layer: str, facts: dict[str, Any], tensors: dict[str, Tensor]) -> KVConstants:
    """Undo ``layer_facts`` and ``layer_tensors``.

    Raises:
        KeyError: a fact or a tensor is missing.
    """
    format = KVFormat(**facts["format"])
    return KVConstants(
        format=format,
        key=_side(layer, "key", facts, tensors),
        value=_side(layer, "value", facts, tensors),
        mean=facts["mean"],
        rotary_scale=facts["rotary_scale"],
        **{name: tensors.get(f"{layer}.{name}") for name in _LAYER},
    )


def _side(
    layer: str, side: str, facts: dict[str, Any], tensors: dict[str, Tensor]
) -> SideConstants:
    held, search = {}, facts[f"{side}_search"]
    for name in (*_SIDE, *(("metric_HDD",) if search else ())):
        tensor = tensors[f"{layer}.{side}.{name}"]
        held[name] = tensor.expand(facts["heads"], *tensor.shape[1:]).contiguous()
    return SideConstants(
        gain=facts[f"{side}_gain"],
        search=search,
        inverse_HDD=stored_inverse(held["matrix_HDD"]),
        **held,
    )
