"""Keys and values of one layer to codes and back, as pure functions of tensors.

The maths is ``rotq_kernels.kv.format``'s; here it is put together for a whole layer, without
pages: what calibration and evaluation need, and what the packed cache must agree with.

Shape suffixes: B sequences, T tokens, H KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.kv.norm_range import NormReach
from rotq.ops import (
    KVConstants,
    dequantize_residual,
    dequantize_side,
    key_mean,
    quantize_residual,
    quantize_side,
)


@dataclass(frozen=True, kw_only=True)
class KVCodes:
    """Tokens as they are stored, before packing."""

    k_codes_BHTD: Tensor
    """uint8, not packed."""
    k_norm_BHT: Tensor | None
    """uint8 logarithms or fp16; None for ``norm="none"``."""
    k_sign_BHTD: Tensor | None
    """uint8, 1 for +1; None without residual."""
    k_gamma_BHT: Tensor | None
    """The rms of what is left, as norms are stored; for ``residual="qjl"``."""
    v_codes_BHTD: Tensor
    v_norm_BHT: Tensor | None


class KVCodec:
    """Encoder and decoder of one layer.

    Args:
        constants: The layer's constants; tensors on the device of what is encoded.
    """

    def __init__(self, constants: KVConstants) -> None:
        self.constants = constants

    def encode(self, k_BHTD: Tensor, v_BHTD: Tensor, position_BT: Tensor) -> KVCodes:
        """Codes of keys, after RoPE, and values.

        Args:
            k_BHTD: Any float dtype; computed in fp32.
            v_BHTD: As ``k_BHTD``.
            position_BT: RoPE positions, integers.
        """
        form, key, value = self.constants.format, self.constants.key, self.constants.value
        centred_BHTD = k_BHTD.float() - key_mean(self.constants, position_BT)
        k_codes_BHTD, k_norm_BHT = quantize_side(centred_BHTD, key, form.k_bits, form.norm)
        sign_BHTD = gamma_BHT = None
        if form.residual != "none":
            sign_BHTD, gamma_BHT = quantize_residual(
                centred_BHTD, k_codes_BHTD, k_norm_BHT, self.constants
            )
        centred_BHTD = v_BHTD.float() - value.mean_HD[:, None]
        v_codes_BHTD, v_norm_BHT = quantize_side(centred_BHTD, value, form.v_bits, form.norm)
        return KVCodes(
            k_codes_BHTD=k_codes_BHTD,
            k_norm_BHT=k_norm_BHT,
            k_sign_BHTD=sign_BHTD,
            k_gamma_BHT=gamma_BHT,
            v_codes_BHTD=v_codes_BHTD,
            v_norm_BHT=v_norm_BHT,
        )

    def decode(
        self, codes: KVCodes, position_BT: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """What codes stand for: keys at their positions and values, ``dtype`` (B, H, T, D)."""
        form, key, value = self.constants.format, self.constants.key, self.constants.value
        residual_BHTD = None
        if codes.k_sign_BHTD is not None:
            residual_BHTD = dequantize_residual(
                codes.k_sign_BHTD, codes.k_norm_BHT, codes.k_gamma_BHT, self.constants, dtype
            )
        k_BHTD = dequantize_side(
            codes.k_codes_BHTD,
            codes.k_norm_BHT,
            key,
            form.k_bits,
            residual_BHTD=residual_BHTD,
            dtype=dtype,
        )
        v_BHTD = dequantize_side(
            codes.v_codes_BHTD, codes.v_norm_BHT, value, form.v_bits, dtype=dtype
        )
        mean_HD = value.mean_HD[:, None].to(dtype)
        return k_BHTD + key_mean(self.constants, position_BT, dtype), v_BHTD + mean_HD

    def fake_quantize(
        self, k_BHTD: Tensor, v_BHTD: Tensor, position_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as a cache that begins with them gives them back, in their dtypes."""
        reach = NormReach(self.constants)
        reach.settle(k_BHTD, v_BHTD, position_BT)
        codec = KVCodec(reach.constants)
        codes = codec.encode(k_BHTD, v_BHTD, position_BT)
        k_hat_BHTD, v_hat_BHTD = codec.decode(codes, position_BT)
        return k_hat_BHTD.to(k_BHTD.dtype), v_hat_BHTD.to(v_BHTD.dtype)
