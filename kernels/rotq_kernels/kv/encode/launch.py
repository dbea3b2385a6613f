"""Keys and values into the pages of the KV cache, and back.

For each token and KV head, y = A (x - m), codes, the norm with its gain, residual bits, packed as
``layout.pack_kv`` does; see ``kv_format`` for the maths and ``kv_side`` for the definition.

Shape suffixes: B sequences, T tokens, H KV heads, D head width, P pages, S tokens of a page,
J pages of a sequence, W words of a token.
"""

from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.encode.kernel import encode_kernel, encode_side_triton, tile
from rotq_kernels.kv.encode.reference import (
    dequantize_kv_reference,
    encode_kv_reference,
    encode_side_reference,
    sides,
)
from rotq_kernels.kv.format import TABLE_BITS, KVConstants, KVFormat, KVPages, SideConstants

__all__ = ["dequantize_kv_reference", "encode_kv", "encode_kv_reference", "encode_kv_triton"]


def encode_kv(
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    position_BT: Tensor,
    slot_BT: Tensor,
    transform: KVConstants,
    pages: KVPages,
) -> None:
    """Quantize keys and values into pages, for prefill and for appending alike.

    Args:
        k_BHTD: After RoPE; any float dtype, computed in fp32. A stride of 1 along D saves a copy.
        v_BHTD: As ``k_BHTD``.
        position_BT: Integers, RoPE positions.
        slot_BT: int64, page * page_size + offset; -1 skips the token. Slots must differ.
        transform: Constants of the layer.
        pages: Modified in place.

    Raises:
        ValueError: shapes, formats or dtypes disagree, or ``pages`` are not contiguous.
    """
    _check(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages)
    for side in sides(k_BHTD, v_BHTD, transform, pages):
        _op(position_BT=position_BT, slot_BT=slot_BT, **side)


def encode_kv_triton(
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    position_BT: Tensor,
    slot_BT: Tensor,
    transform: KVConstants,
    pages: KVPages,
) -> None:
    """Launch the kernel for either side. On CPU tensors this needs TRITON_INTERPRET=1."""
    for side in sides(k_BHTD, v_BHTD, transform, pages):
        encode_side_triton(position_BT=position_BT, slot_BT=slot_BT, **side)


_op = torch.library.custom_op(
    "rotq::encode_side",
    encode_side_triton,
    mutates_args=("codes_PHSW", "norm_PHS", "sign_PHSC", "gamma_PHS"),
    device_types="cuda",
)
_op.register_kernel("cpu")(encode_side_reference)
_op.register_fake(lambda *args, **kwargs: None)


def _check(
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    position_BT: Tensor,
    slot_BT: Tensor,
    transform: KVConstants,
    pages: KVPages,
) -> None:
    form = pages.format
    if form != transform.format:
        raise ValueError(f"pages of {form} do not fit a transform of {transform.format}")
    heads = pages.k_codes.shape[1]
    B, H, T, D = k_BHTD.shape
    if v_BHTD.shape != k_BHTD.shape or (heads, form.head_dim) != (H, D):
        raise ValueError(
            f"keys {tuple(k_BHTD.shape)} and values {tuple(v_BHTD.shape)} should both be "
            f"(B, {heads}, T, {form.head_dim})"
        )
    if position_BT.shape != (B, T) or slot_BT.shape != (B, T) or slot_BT.dtype != torch.int64:
        raise ValueError(
            f"positions {tuple(position_BT.shape)} and {slot_BT.dtype} slots "
            f"{tuple(slot_BT.shape)} should be ({B}, {T}), the slots int64"
        )
    if not all(tensor.is_contiguous() for tensor in pages.tensors()):
        raise ValueError("pages must be contiguous")
    _check_side(transform.key, form.k_bits, form, H)
    _check_side(transform.value, form.v_bits, form, H)
    if transform.mean == "rope" and transform.inv_freq_R is None:
        raise ValueError("a RoPE mean needs inv_freq_R")
    if form.residual == "qjl" and (transform.sketch_DD is None or transform.gamma_base_H is None):
        raise ValueError("a qjl residual needs sketch_DD and gamma_base_H")


def _check_side(side: SideConstants, bits: int, form: KVFormat, H: int) -> None:
    D = form.head_dim
    expected = {
        "matrix_HDD": (H, D, D),
        "mean_HD": (H, D),
        "levels_HL": (H, 2**bits if bits <= TABLE_BITS else 0),
        "thresholds_HL": (H, 2**bits - 1),
        "base_H": (H,),
        "unit_H": (H,),
    }
    for name, shape in expected.items():
        found = tuple(getattr(side, name).shape)
        if found != shape:
            raise ValueError(f"{name} of {bits} bits should be {shape}, got {found}")
    if side.search and (
        side.metric_HDD is None
        or side.metric_HDD.shape != (H, D, D)
        or side.gain != "lsq"
        or form.norm == "none"
    ):
        raise ValueError(f"search needs metric_HDD ({H}, {D}, {D}), gain lsq and a stored norm")


def _case(name: str, head_dim: int = 128, tokens: int = 4096, **changes: Any) -> dict[str, Any]:
    shape = tile(head_dim, tokens, changes.get("SEARCH", 0))
    num_warps = shape.pop("num_warps")
    constants: dict[str, Any] = {
        "D": head_dim,
        "R": head_dim // 2,
        "BITS": 3,
        "PAGE": 64,
        "NORM": "log8",
        "GAIN": "lsq",
        "RESIDUAL": "none",
        "SEARCH": 0,
        "PRECISION": "ieee",
        **shape,
        **changes,
    }
    norm = "*fp16" if constants["NORM"] == "float16" else "*u8"
    types = {name: "*fp32" for name in encode_kernel.arg_names if name.endswith("_ptr")}
    types |= {"x_ptr": "*bf16", "levels_ptr": "*i8", "norm_ptr": norm, "gamma_ptr": norm}
    types |= dict.fromkeys(("position_ptr", "slot_ptr"), "*i64")
    types |= dict.fromkeys(("codes_ptr", "sign_ptr"), "*i32")
    types |= dict.fromkeys(("stride_b", "stride_h", "stride_t"), "i64")
    types |= {"rotary_scale": "fp32", "num_positions": "i32", "num_tokens": "i32"}
    # launched with None, or specialized for 1
    fixed: dict[str, Any] = {} if constants["R"] else {"inv_freq_ptr": None}
    if constants["RESIDUAL"] != "qjl":
        fixed |= dict.fromkeys(("sketch_ptr", "gamma_base_ptr", "gamma_ptr"))
    if constants["RESIDUAL"] == "none":
        fixed["sign_ptr"] = None
    if not constants["SEARCH"]:
        fixed["metric_ptr"] = None
    if tokens == 1:
        fixed |= dict.fromkeys(("num_positions", "num_tokens", "stride_t"), 1)
    return {
        "name": name,
        "kernel": encode_kernel,
        "types": {name: kind for name, kind in types.items() if name not in fixed},
        "constants": constants | fixed,
        "num_warps": num_warps,
        "enable_fp_fusion": False,
    }


COMPILE_CASES = [
    _case("keys k3 rope D128"),
    _case("values v3 D128", R=0),
    _case("keys k3 rope sign D128", RESIDUAL="sign"),
    _case("keys k3 rope qjl D128", RESIDUAL="qjl"),
    _case("keys k4 rope fp16 norm D128", BITS=4, NORM="float16"),
    _case("keys k8 D128", BITS=8, R=0),
    _case("values v2 D128", BITS=2, R=0),
    _case("keys k3 rope search D128", SEARCH=4),
    _case("keys k3 rope search D64", 64, SEARCH=4),
    _case("keys k3 rope search D256", 256, SEARCH=4),
    _case("keys k3 rope D64", 64),
    _case("keys k3 rope D64, append", 64, tokens=1),
    _case("keys k3 rope D80", 80),
    _case("keys k3 rope D256", 256),
]
