"""Launches the kernel that turns keys or values into codes."""

import torch
from torch import Tensor

from rotq_kernels.kv.encode.arguments import WRITTEN, SideArguments, side_arguments
from rotq_kernels.kv.format import KVConstants, KVPages, gap_of
from rotq_kernels.launching import launch, next_power_of_two, require_triton

READ = (
    *("position_BT", "slot_BT", "matrix_HDD", "mean_HD", "levels_HL", "thresholds_HL", "base_H"),
    *("unit_H", "inv_freq_R", "sketch_DD", "gamma_base_H", "metric_HDD"),
)
"""Of ``SideArguments``, in the order of the kernel's pointers."""


def encode_kv_triton(
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    position_BT: Tensor,
    slot_BT: Tensor,
    constants: KVConstants,
    pages: KVPages,
) -> None:
    """``encode_kv`` by the kernel, unchecked. On CPU tensors this needs TRITON_INTERPRET=1."""
    for side in side_arguments(k_BHTD, v_BHTD, position_BT, slot_BT, constants, pages):
        encode_side_triton(side)


def encode_side_triton(given: SideArguments) -> None:
    """Launch the kernel for keys or values. On CPU tensors this needs TRITON_INTERPRET=1."""
    require_triton()
    from rotq_kernels.kv.encode.kernel import encode_kernel

    x_BHTD, R = given.x_BHTD, 0 if given.inv_freq_R is None else given.inv_freq_R.shape[0]
    if x_BHTD.stride(-1) != 1:
        x_BHTD = x_BHTD.contiguous()
    B, H, T, D = x_BHTD.shape
    shape = tile_sizes(D, B * T, given.search)
    launch(
        encode_kernel,
        (-(-B * T // shape["BLOCK_N"]), H),
        x_BHTD,
        *(_contiguous(getattr(given, name)) for name in READ),
        given.codes_PHSW,
        given.norm_PHS,
        given.sign_PHSC,
        given.gamma_PHS,
        *x_BHTD.stride()[:3],
        given.rotary_scale,
        T,
        B * T,
        *(gap_of(getattr(given, name)) for name in WRITTEN),
        D=D,
        R=R,
        BITS=given.bits,
        PAGE=given.codes_PHSW.shape[2],
        NORM=_norm(given.norm_PHS),
        GAIN=given.gain,
        RESIDUAL=_residual(given),
        SEARCH=given.search,
        PRECISION="ieee",
        enable_fp_fusion=False,
        **shape,
        on=x_BHTD,
    )


def tile_sizes(head_dim: int, num_tokens: int, search: int = 0) -> dict[str, int]:
    """Tokens and columns of A at a time, and warps.

    More tokens, or more warps, save few instructions and spill on one target or another; a search
    over wide heads spills without more warps.
    """
    block_d = max(32, next_power_of_two(head_dim))
    return {
        "BLOCK_N": 32 if num_tokens > 256 and block_d <= 64 else 16,
        "BLOCK_D": block_d,
        "BLOCK_K": 32 if block_d <= 128 else 16,
        "num_warps": 8 if search and block_d > 128 else 4,
    }


def _norm(norm_PHS: Tensor | None) -> str:
    if norm_PHS is None:
        return "none"
    return "log8" if norm_PHS.dtype == torch.uint8 else "float16"


def _residual(given: SideArguments) -> str:
    if given.sign_PHSC is None:
        return "none"
    return "sign" if given.sketch_DD is None else "qjl"


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
