"""What a packed cache must equal: a dense cache that gives back what codes stand for.

The oracle keeps every token whole and lets transformers do masks and attention; history between
sinks and recent window is replaced by its decoded codes each time it is read.
"""

from dataclasses import replace
from typing import Any

import torch
from kv_cases import transform_of
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from rotq.kv.calibration.file import KVCalibration
from rotq.kv.calibration.model_hash import hash_config
from rotq.kv.codec import KVCodec
from rotq.kv.presets import preset
from rotq.models.rotary import kv_shapes, rotaries
from rotq.ops import KVConstants, KVFormat


def calibration_of(
    model: Any,
    *,
    name: str = "k3v3",
    mean: str = "rope",
    page_size: int = 16,
    sinks: int = 2,
    recent: int = 0,
    residual: str = "none",
) -> KVCalibration:
    """Random constants of every layer, with the model's RoPE; each layer has its own."""
    spec = replace(
        preset(name),
        mean=mean,
        sinks=sinks,
        recent=recent,
        residual=residual,  # type: ignore[arg-type]
    )
    layers = {}
    for index, (shape, rotary) in enumerate(
        zip(kv_shapes(model.config), rotaries(model.config), strict=True)
    ):
        form = KVFormat(
            head_dim=shape.head_dim,
            k_bits=spec.k_bits,
            v_bits=spec.v_bits,
            residual=residual,  # type: ignore[arg-type]
            page_size=page_size,
        )
        transform = transform_of(form, shape.num_heads, mean=mean, seed=10 * index)
        if mean == "rope":
            assert rotary is not None
            transform.inv_freq_R, transform.rotary_scale = rotary.inv_freq_R, rotary.scale
        layers[index] = transform
    return KVCalibration(spec=spec, layers=layers, model_hash=hash_config(model.config))


def calibration_with(*layers: KVConstants) -> KVCalibration:
    """These constants, of no model."""
    return KVCalibration(spec=preset("k3v3"), layers=dict(enumerate(layers)), model_hash="")


class OracleLayer(DynamicLayer):
    """Keeps tokens whole, gives history back decoded; sequences without padding only."""

    def __init__(self, calibration: KVCalibration, index: int) -> None:
        super().__init__()
        self.codec = KVCodec(calibration.layers[index])
        self.num_sinks, self.num_recent = calibration.sinks, calibration.recent

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        k, v = super().update(key_states, value_states)
        packed = slice(self.num_sinks, max(self.num_sinks, before - self.num_recent))
        if packed.stop <= packed.start:
            return k, v
        position_BT = torch.arange(packed.start, packed.stop).expand(k.shape[0], -1)
        codes = self.codec.encode(k[:, :, packed], v[:, :, packed], position_BT)
        k_hat, v_hat = self.codec.decode(codes, position_BT, k.dtype)
        k, v = k.clone(), v.clone()
        k[:, :, packed], v[:, :, packed] = k_hat, v_hat
        return k, v


def oracle_cache(calibration: KVCalibration) -> Cache:
    """For a model with the calibration's layers, sliding ones included."""
    layers = [OracleLayer(calibration, index) for index in sorted(calibration.layers)]
    return Cache(layers=layers)
