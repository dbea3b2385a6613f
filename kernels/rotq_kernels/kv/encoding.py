"""Keys and values into the pages of the KV cache.

For each token and KV head, y = A (x - m), codes, the norm with its gain, residual bits, packed as
``layout.pack_kv`` does; see ``kv.format`` for the maths and ``encode.one_side`` for the definition.

Shape suffixes: B sequences, T tokens, H KV heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.encode.arguments import SCHEMA, SideArguments, side_arguments
from rotq_kernels.kv.encode.launch import encode_side_triton
from rotq_kernels.kv.encode.reference import encode_side_reference
from rotq_kernels.kv.format import TABLE_BITS, KVConstants, KVFormat, KVPages, SideConstants
from rotq_kernels.operators import register


def encode_kv(
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    position_BT: Tensor,
    slot_BT: Tensor,
    constants: KVConstants,
    pages: KVPages,
) -> None:
    """Quantize keys and values into pages, for prefill and for appending alike.

    Args:
        k_BHTD: After RoPE; any float dtype, computed in fp32. A stride of 1 along D saves a copy.
        v_BHTD: As ``k_BHTD``.
        position_BT: Integers, RoPE positions.
        slot_BT: int64, page * page_size + offset; -1 skips the token. Slots must differ.
        constants: Constants of the layer.
        pages: Modified in place.

    Raises:
        ValueError: shapes, formats or dtypes disagree, or a page is not contiguous.
    """
    _check(k_BHTD, v_BHTD, position_BT, slot_BT, constants, pages)
    for side in side_arguments(k_BHTD, v_BHTD, position_BT, slot_BT, constants, pages):
        _op(*side.flat())


def _check(
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    position_BT: Tensor,
    slot_BT: Tensor,
    constants: KVConstants,
    pages: KVPages,
) -> None:
    form = pages.format
    if form != constants.format:
        raise ValueError(f"pages of {form} do not fit a transform of {constants.format}")
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
    if not pages.has_whole_pages:
        raise ValueError("each page must be contiguous")
    _check_side(constants.key, form.k_bits, form, H)
    _check_side(constants.value, form.v_bits, form, H)
    if constants.mean == "rope" and constants.inv_freq_R is None:
        raise ValueError("a RoPE mean needs inv_freq_R")
    if form.residual == "qjl" and (constants.sketch_DD is None or constants.gamma_base_H is None):
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


def _on_cuda(*flat: Any) -> None:
    encode_side_triton(SideArguments(*flat))


def _on_cpu(*flat: Any) -> None:
    encode_side_reference(SideArguments(*flat))


_op = register("encode_side", SCHEMA, cuda=_on_cuda, cpu=_on_cpu, fake=lambda *flat: None)
