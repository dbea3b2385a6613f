"""A linear layer straight from the packed paths of its weight.

    y_mn = sum_k x_mk level(state_nk) s_ng + b_n,      g = k // (K / G)

Symbols are packed along the rows (``layout.pack`` with ``dim`` 0), so that the state of row n of a
ring is a shift and a mask of the ring's stream. On a GPU a
kernel multiplies with the states; CPUs have native code where numba is installed, for a few rows of
inputs without any dense weight. All else is plain PyTorch, on some rings at a time.

Shape suffixes: M rows (tokens), N out features, K in features, G groups of K, W int32 words.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rotq_kernels.launching import is_native, launch, next_power_of_two, require_triton
from rotq_kernels.layout import unpack
from rotq_kernels.operators import register
from rotq_kernels.packed_linear import CPU_TILE, DTYPES, GEMV_ROWS
from rotq_kernels.trellis.code import path_levels, ring_rows

FEW_ROWS = 4
"""Up to here native code multiplies as levels are made; more rows are given dense tiles."""


def trellis_linear(
    x: Tensor,
    weight_packed_WK: Tensor,
    weight_scale_NG: Tensor,
    bias_N: Tensor | None = None,
    *,
    bits: int,
    state_bits: int,
) -> Tensor:
    """x W^T + b over the last axis of ``x``; differentiable in ``x`` and the bias.

    Args:
        x: fp16, bf16 or fp32 (..., K), any strides.
        weight_packed_WK: int32 (packed_words(N, bits), K).
        weight_scale_NG: fp16, bf16 or fp32; G divides K.
        bias_N: Any of the dtypes of ``x``.
        bits: 1 to 8.
        state_bits: L, 8 to 16.

    Returns:
        (..., N) of x's dtype, contiguous.

    Raises:
        ValueError: a dtype or a shape does not fit.
    """
    if x.dtype not in DTYPES or x.shape[-1] != weight_packed_WK.shape[1]:
        columns = weight_packed_WK.shape[1]
        raise ValueError(
            f"x must be (..., {columns}) in fp16, bf16 or fp32, got {tuple(x.shape)} {x.dtype}"
        )
    x_MK = x.reshape(-1, x.shape[-1])
    y_MN = _op(x_MK, weight_packed_WK, weight_scale_NG, bias_N, bits, state_bits)
    return y_MN.view(*x.shape[:-1], y_MN.shape[1])


def packed_levels(
    word_WK: Tensor, num_rows: int, bits: int, state_bits: int, ring: int | None = None
) -> Tensor:
    """fp32 (N, K): what packed paths stand for, before scales.

    Args:
        word_WK: int32, of whole rings.
        num_rows: N.
        ring: Rows of each; None: as ``ring_rows`` has it for N.
    """
    ring = ring or ring_rows(num_rows)
    if word_WK.device.type == "cpu" and is_native():
        from rotq_kernels.trellis.native_linear import levels_native

        return levels_native(word_WK.contiguous(), num_rows, ring, bits, state_bits)
    return path_levels(unpack(word_WK, bits, num_rows, dim=0), bits, state_bits, ring)


def dequantize_paths(
    weight_packed_WK: Tensor,
    weight_scale_NG: Tensor,
    bits: int,
    state_bits: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense weight (N, K), computed in fp32 (fp64 for fp64), then cast to ``dtype``."""
    N, G = weight_scale_NG.shape
    wide = torch.promote_types(dtype, torch.float32)
    level_NK = packed_levels(weight_packed_WK, N, bits, state_bits)
    level_NGg = level_NK.to(wide).unflatten(1, (G, -1))
    return (level_NGg * weight_scale_NG.to(wide)[..., None]).flatten(1).to(dtype)


def trellis_linear_reference(
    x_MK: Tensor,
    weight_packed_WK: Tensor,
    weight_scale_NG: Tensor,
    bias_N: Tensor | None,
    bits: int,
    state_bits: int,
) -> Tensor:
    """In plain PyTorch, on any device: some rings of the weight are dense at a time, never all."""
    (M, K), N = x_MK.shape, weight_scale_NG.shape[0]
    ring = ring_rows(N)
    # rings end with a word each, or there is but one
    step = max(1, CPU_TILE // (K * ring)) * ring
    y_MN = x_MK.new_empty(M, N)
    for n in range(0, N, step):
        rows = slice(n, min(n + step, N))
        words_WK = weight_packed_WK[n * bits // 32 : -(-rows.stop * bits // 32)]
        level_NK = packed_levels(words_WK, rows.stop - n, bits, state_bits, ring)
        scale_NG = weight_scale_NG[rows].float()
        weight_NGg = level_NK.unflatten(1, (scale_NG.shape[1], -1)) * scale_NG[..., None]
        bias = None if bias_N is None else bias_N[rows].to(x_MK.dtype)
        y_MN[:, rows] = F.linear(x_MK, weight_NGg.flatten(1).to(x_MK.dtype), bias)
    return y_MN


def trellis_linear_cpu(
    x_MK: Tensor,
    weight_packed_WK: Tensor,
    weight_scale_NG: Tensor,
    bias_N: Tensor | None,
    bits: int,
    state_bits: int,
) -> Tensor:
    """What CPU tensors run on; a few rows are multiplied and summed in fp32, as on a GPU."""
    arguments = (x_MK, weight_packed_WK, weight_scale_NG, bias_N, bits, state_bits)
    if len(x_MK) > FEW_ROWS or not is_native():
        return trellis_linear_reference(*arguments)
    from rotq_kernels.trellis.native_linear import product_native

    y_MN = product_native(
        x_MK.float(), weight_packed_WK.contiguous(), weight_scale_NG.float(), bits, state_bits
    )
    return (y_MN if bias_N is None else y_MN.add_(bias_N.float())).to(x_MK.dtype)


def trellis_linear_triton(
    x_MK: Tensor,
    weight_packed_WK: Tensor,
    weight_scale_NG: Tensor,
    bias_N: Tensor | None,
    bits: int,
    state_bits: int,
) -> Tensor:
    """Launch a kernel. On CPU tensors this needs TRITON_INTERPRET=1."""
    require_triton()
    from rotq_kernels.trellis.linear_kernels import gemm_kernel, gemv_kernel

    (M, K), (N, G) = x_MK.shape, weight_scale_NG.shape
    y_MN = x_MK.new_empty((M, N))
    if not y_MN.numel():
        return y_MN
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    kernel, tile = gemv_kernel if M <= GEMV_ROWS else gemm_kernel, _tile(M, x_MK.dtype)
    ring = ring_rows(N)
    launch(
        kernel,
        (-(-N // tile["BLOCK_N"]), -(-M // tile["BLOCK_M"])),
        x_MK,
        weight_packed_WK.contiguous(),
        weight_scale_NG.contiguous(),
        y_MN if bias_N is None else bias_N.contiguous(),
        y_MN,
        M=M,
        N=N,
        K=K,
        stride_xm=x_MK.stride(0),
        num_groups=G,
        ring=ring,
        BITS=bits,
        STATE_BITS=state_bits,
        DOT=x_MK.is_cuda and torch.version.hip is None,
        GROUP=0 if G == 1 else K // G,
        CHUNKED=ring % 32 == 0,
        HAS_BIAS=bias_N is not None,
        **tile,
        on=x_MK,
    )
    return y_MN


def _tile(M: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps: of the GEMV up to GEMV_ROWS rows, else of the GEMM."""
    if M <= GEMV_ROWS:
        return {"BLOCK_M": M, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4}
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4}
    if M <= 64:
        block_m = max(16, next_power_of_two(M))
        return {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8}


def _fake(
    x_MK: Tensor,
    weight_packed_WK: Tensor,
    weight_scale_NG: Tensor,
    bias_N: Tensor | None,
    bits: int,
    state_bits: int,
) -> Tensor:
    return x_MK.new_empty((x_MK.shape[0], weight_scale_NG.shape[0]))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight_packed_WK, weight_scale_NG, bias_N, ctx.bits, ctx.state_bits = inputs
    ctx.bias_dtype = None if bias_N is None else bias_N.dtype
    ctx.save_for_backward(weight_packed_WK, weight_scale_NG)


def _backward(
    ctx: Any, grad_MN: Tensor
) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
    grad_MK = grad_N = None
    if ctx.needs_input_grad[0]:
        words_WK, scale_NG = ctx.saved_tensors
        weight_NK = dequantize_paths(words_WK, scale_NG, ctx.bits, ctx.state_bits, grad_MN.dtype)
        grad_MK = grad_MN @ weight_NK
    if ctx.needs_input_grad[3]:
        grad_N = grad_MN.sum(0).to(ctx.bias_dtype)
    return grad_MK, None, None, grad_N, None, None


_op = register(
    "trellis_linear",
    torch.library.infer_schema(trellis_linear_triton, mutates_args=()),
    cuda=trellis_linear_triton,
    cpu=trellis_linear_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_keep_weight,
)
