"""Which models packed keys and values serve, and with which calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rotq.errors import RotqError
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.calibration.model_hash import hash_config
from rotq.models.rotary import kv_shapes, rotaries


def windows(config: Any) -> list[int]:
    """Tokens that each layer's queries see, themselves included; 0 for all.

    Raises:
        RotqError: a layer that keeps something else than keys and values, or sees them otherwise.
    """
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise RotqError(f"{config.model_type}: no cache of rotq's for chunked attention")
    try:
        layers = DynamicCache(config=config).layers
    except KeyError as kind:  # of a layer that transformers itself has no such cache for
        raise RotqError(f"{config.model_type}: no cache of rotq's for layers of {kind}") from None
    found = []
    for layer in layers:
        if type(layer) is DynamicLayer:
            found.append(0)
        elif type(layer) is DynamicSlidingWindowLayer:
            found.append(int(layer.sliding_window))
        else:
            raise RotqError(f"{config.model_type}: no cache of rotq's for {type(layer).__name__}")
    return found


def check_heads(num_heads: int, width: int, k_BHTD: Tensor, v_BHTD: Tensor) -> None:
    """Refuse keys and values that a layer was not made for.

    Args:
        num_heads: KV heads of the layer.
        width: Of each.
        k_BHTD: What the model gives it.
        v_BHTD: As well.

    Raises:
        RotqError: they are others than the configuration says.
    """
    if {k_BHTD.shape[1::2], v_BHTD.shape[1::2]} != {(num_heads, width)}:
        raise RotqError(
            f"by its configuration a layer has {num_heads} KV heads of width {width}, got keys "
            f"{tuple(k_BHTD.shape)} and values {tuple(v_BHTD.shape)}"
        )


def check_decoder(whole: Any) -> Any:
    """Refuse models that are no causal decoders with plain attention; returns the text's config.

    Raises:
        RotqError: this is one.
    """
    config = whole.get_text_config(decoder=True)
    if whole.is_encoder_decoder or not getattr(config, "is_causal", True):
        raise RotqError(f"{config.model_type}: a packed cache is for causal decoders")
    for name in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, name, None):
            raise RotqError(f"{config.model_type}: packed attention cannot do {name}")
    return config


def check_served(model: Any, calibration: KVCalibration) -> None:
    """Refuse what a packed cache would serve wrongly.

    Raises:
        RotqError: the model is where no kernel reads, or see ``check_calibrated``.
    """
    device = next(model.parameters()).device.type
    if device not in ("cpu", "cuda", "meta"):
        raise RotqError(
            "packed keys and values are read by kernels for CPUs and CUDA; "
            f"the model is on {device}"
        )
    check_calibrated(model.config, calibration)


def check_calibrated(whole: Any, calibration: KVCalibration) -> None:
    """Refuse a configuration whose keys and values are not packed rightly by these constants.

    Args:
        whole: Of a model of transformers, all of its parts.
        calibration: Data-free or fitted.

    Raises:
        RotqError: the model is no causal decoder, its attention does what packed attention does
            not, or the calibration is another model's.
    """
    config = check_decoder(whole)
    if calibration.model_hash != hash_config(whole):
        raise RotqError("the calibration was made for another model; run rotq calibrate-kv")
    if sorted(calibration.layers) != list(range(len(kv_shapes(config)))):
        raise RotqError("the calibration does not hold every layer of the model")
    for index, rotary in enumerate(rotaries(config)):
        inv_freq_R = calibration.layers[index].inv_freq_R
        if inv_freq_R is None:
            continue
        if rotary is None or not torch.allclose(rotary.inv_freq_R, inv_freq_R.cpu(), rtol=1e-6):
            raise RotqError(
                f"{config.model_type}: the calibration removes a mean that turns with RoPE, and "
                f"layer {index} of the model is not known to turn like that"
            )
