"""A linear layer straight from its packed weight.

    y_mn = sum_k x_mk (q_nk - z_ng) s_ng + b_n,      g = k // (K / G)

q and z are the codes of ``layout.pack``, q packed along K and z along N, as ``weight_packed`` and
``weight_zero_point`` of a checkpoint. No dense weight is made: each tile is unpacked in registers.

Up to GEMV_ROWS rows are multiplied and summed in fp32. More go through the tensor cores, with the
weight rounded to x's dtype after scaling, as the dense layer has it, and fp32 sums; for fp32 x the
products are fp32, without TF32. Where the rows of the weight are too few for the machine, its
columns are shared out too, and the parts summed. From DENSE_ROWS rows on a dense weight is made
after all, of one layer at a time, as writing it costs little beside the product.

Shape suffixes: M rows (tokens), N out features, K in features, G groups of K, W int32 words.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from rotq_kernels.launching import launch, next_power_of_two, require_triton
from rotq_kernels.layout import packed_words, unpack
from rotq_kernels.operators import register

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

CPU_TILE = 1 << 20
"""Elements of a weight that are dense at a time on a CPU."""

GEMV_ROWS = 2
"""Up to here fp32 sums take fewer instructions than tensor cores do (counted, not timed)."""

DENSE_ROWS = 128
"""From here on the weight is made dense once, for the library's product."""

PROGRAMS_PER_SM = 2
"""Of the GEMM, whose columns are shared out until there are so many."""

LEAST_RUN = 512
"""Columns that are worth a program, and a part of the result, of their own."""


def packed_linear(
    x: Tensor,
    weight_packed_NW: Tensor,
    weight_scale_NG: Tensor,
    weight_zero_point_WG: Tensor | None = None,
    bias_N: Tensor | None = None,
    *,
    bits: int,
) -> Tensor:
    """x W^T + b over the last axis of ``x``; differentiable in ``x`` and the bias.

    Args:
        x: fp16, bf16 or fp32 (..., K), any strides.
        weight_packed_NW: int32 (N, packed_words(K, bits)).
        weight_scale_NG: fp16, bf16 or fp32; G divides K.
        weight_zero_point_WG: int32 (packed_words(N, bits), G); None on a symmetric grid.
        bias_N: Any of the dtypes of ``x``.
        bits: 2 to 8.

    Returns:
        (..., N) of x's dtype, contiguous.

    Raises:
        ValueError: a shape, a dtype or ``bits`` does not fit.
    """
    _check(x, weight_packed_NW, weight_scale_NG, weight_zero_point_WG, bias_N, bits)
    y_MN = _op(
        x.reshape(-1, x.shape[-1]),
        weight_packed_NW,
        weight_scale_NG,
        weight_zero_point_WG,
        bias_N,
        bits,
    )
    return y_MN.view(*x.shape[:-1], y_MN.shape[1])


def dequantize_reference(
    weight_packed_NW: Tensor,
    weight_scale_NG: Tensor,
    weight_zero_point_WG: Tensor | None,
    num_columns: int,
    bits: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense weight (N, K), computed in fp32 (fp64 for fp64), then cast to ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    N, G = weight_scale_NG.shape
    q_NGg = unpack(weight_packed_NW, bits, num_columns).to(wide).view(N, G, -1)
    if weight_zero_point_WG is not None:
        q_NGg = q_NGg - unpack(weight_zero_point_WG, bits, N, dim=0).to(wide)[..., None]
    return (q_NGg * weight_scale_NG.to(wide)[..., None]).view(N, num_columns).to(dtype)


def packed_linear_reference(
    x_MK: Tensor,
    weight_packed_NW: Tensor,
    weight_scale_NG: Tensor,
    weight_zero_point_WG: Tensor | None,
    bias_N: Tensor | None,
    bits: int,
) -> Tensor:
    """The definition, in plain PyTorch."""
    weight_NK = dequantize_reference(
        weight_packed_NW, weight_scale_NG, weight_zero_point_WG, x_MK.shape[1], bits, x_MK.dtype
    )
    y_MN = F.linear(x_MK, weight_NK, None if bias_N is None else bias_N.to(x_MK.dtype))
    return y_MN.contiguous()


def packed_linear_cpu(
    x_MK: Tensor,
    weight_packed_NW: Tensor,
    weight_scale_NG: Tensor,
    weight_zero_point_WG: Tensor | None,
    bias_N: Tensor | None,
    bits: int,
) -> Tensor:
    """What CPU tensors run on: some rows of the weight are unpacked at a time, never all."""
    (M, K), N = x_MK.shape, weight_scale_NG.shape[0]
    # whole words of zero points, which are packed along the rows
    step = max(1, CPU_TILE // K // 32) * 32
    y_MN = x_MK.new_empty(M, N)
    for n in range(0, N, step):
        rows = slice(n, min(n + step, N))
        zero_WG = weight_zero_point_WG
        if zero_WG is not None:
            zero_WG = zero_WG[n * bits // 32 : packed_words(rows.stop, bits)]
        y_MN[:, rows] = packed_linear_reference(
            x_MK,
            weight_packed_NW[rows],
            weight_scale_NG[rows],
            zero_WG,
            None if bias_N is None else bias_N[rows],
            bits,
        )
    return y_MN


def packed_linear_triton(
    x_MK: Tensor,
    weight_packed_NW: Tensor,
    weight_scale_NG: Tensor,
    weight_zero_point_WG: Tensor | None,
    bias_N: Tensor | None,
    bits: int,
) -> Tensor:
    """Launch a kernel. On CPU tensors this needs TRITON_INTERPRET=1."""
    require_triton()
    (M, K), N = x_MK.shape, weight_scale_NG.shape[0]
    y_MN = x_MK.new_empty((M, N))
    if not y_MN.numel():
        return y_MN
    weight = _Weight.of(weight_packed_NW, weight_scale_NG, weight_zero_point_WG, K, bits)
    if M >= DENSE_ROWS and x_MK.dtype != torch.float32:
        bias_N = None if bias_N is None else bias_N.to(x_MK.dtype)
        return F.linear(x_MK, _dequantize(weight, x_MK.dtype), bias_N)
    tile = tile_sizes(M, K, x_MK.dtype)
    run = _run_of(x_MK, N, tile)
    if run >= K:
        return _multiply(x_MK, weight, bias_N, y_MN, tile, K)
    part_SMN = x_MK.new_empty((-(-K // run), M, N), dtype=torch.float32)
    _multiply(x_MK, weight, None, part_SMN, tile, run)
    sum_MN = part_SMN.sum(0)
    return (sum_MN if bias_N is None else sum_MN + bias_N).to(x_MK.dtype)


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """A packed weight as kernels read it."""

    words_NW: Tensor
    scale_NG: Tensor
    zero_WG: Tensor | None
    K: int
    bits: int

    @classmethod
    def of(
        cls, words_NW: Tensor, scale_NG: Tensor, zero_WG: Tensor | None, K: int, bits: int
    ) -> Self:
        zero_WG = None if zero_WG is None else zero_WG.contiguous()
        words_NW = _unit_stride(words_NW)
        return cls(
            words_NW=words_NW, scale_NG=scale_NG.contiguous(), zero_WG=zero_WG, K=K, bits=bits
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Words, scales and zero points; an argument that is not read still needs a pointer."""
        zero = self.words_NW if self.zero_WG is None else self.zero_WG
        return self.words_NW, self.scale_NG, zero

    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        has_zero = self.zero_WG is not None
        return {"BITS": self.bits, "HAS_ZERO": has_zero, **_runs(self.K, self.scale_NG.shape[1])}


def _multiply(
    x_MK: Tensor,
    weight: _Weight,
    bias_N: Tensor | None,
    y: Tensor,
    tile: dict[str, int],
    run: int,
) -> Tensor:
    """Products over runs of columns into ``y``, (M, N), or (S, M, N) where there are several."""
    from rotq_kernels.packed_linear_kernels import MAGIC, gemm_kernel, gemv_kernel

    x_MK = _unit_stride(x_MK)
    (M, K), N = x_MK.shape, weight.scale_NG.shape[0]
    is_gemm = M > GEMV_ROWS
    launch(
        gemm_kernel if is_gemm else gemv_kernel,
        (-(-N // tile["BLOCK_N"]), -(-M // tile["BLOCK_M"]), -(-K // run)),
        x_MK,
        *weight.tensors(),
        y if bias_N is None else bias_N.contiguous(),
        y,
        M=M,
        N=N,
        K=K,
        stride_xm=x_MK.stride(0),
        stride_wn=weight.words_NW.stride(0),
        num_groups=weight.scale_NG.shape[1],
        magic=MAGIC,
        **({"blocks": -(-run // tile["BLOCK_K"])} if is_gemm else {}),
        **weight.constants(),
        HAS_BIAS=bias_N is not None,
        **tile,
        on=x_MK,
    )
    return y


def _dequantize(weight: _Weight, dtype: torch.dtype) -> Tensor:
    """(N, K) of ``dtype``, in the kernels' rounding."""
    from rotq_kernels.packed_linear_kernels import MAGIC, dequantize_kernel

    N, K = weight.scale_NG.shape[0], weight.K
    dense_NK = torch.empty((N, K), dtype=dtype, device=weight.words_NW.device)
    launch(
        dequantize_kernel,
        (-(-N // 32), -(-K // 128)),
        *weight.tensors(),
        dense_NK,
        N,
        K,
        weight.words_NW.stride(0),
        weight.scale_NG.shape[1],
        MAGIC,
        **weight.constants(),
        BLOCK_N=32,
        BLOCK_K=128,
        num_warps=4,
        on=dense_NK,
    )
    return dense_NK


def _run_of(x_MK: Tensor, N: int, tile: dict[str, int]) -> int:
    """Columns of the weight that a program of the GEMM takes, so that all SMs have work.

    It does not depend on the number of rows, as long as they are one tile.
    """
    (M, K), block = x_MK.shape, tile["BLOCK_K"]
    if M <= GEMV_ROWS or tile["BLOCK_M"] < M:
        return K
    programs = -(-N // tile["BLOCK_N"])
    num_sm = 4
    if x_MK.is_cuda:
        num_sm = torch.cuda.get_device_properties(x_MK.device).multi_processor_count
    splits = max(1, min(PROGRAMS_PER_SM * num_sm // programs, K // LEAST_RUN))
    return -(-K // (splits * block)) * block


def _unit_stride(x_MK: Tensor) -> Tensor:
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()


def _runs(K: int, G: int) -> dict[str, int]:
    """Columns of a group, and of a run that shares a scale."""
    if G == 1:
        # the last run may go beyond K, where x is zero
        return {"GROUP": 1 << 30, "RUN": 32}
    return {"GROUP": K // G, "RUN": math.gcd(K // G, 32)}


def tile_sizes(M: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps: of the GEMV up to GEMV_ROWS rows, else of the GEMM."""
    if M <= GEMV_ROWS:
        block_k = min(1024, max(32, next_power_of_two(K)))
        return {"BLOCK_M": M, "BLOCK_N": 4, "BLOCK_K": block_k, "num_warps": 1}
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4}
    if M <= 64:
        block_m = max(16, next_power_of_two(M))
        return {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8}


def _check(
    x: Tensor,
    weight_packed_NW: Tensor,
    weight_scale_NG: Tensor,
    weight_zero_point_WG: Tensor | None,
    bias_N: Tensor | None,
    bits: int,
) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if x.ndim < 1 or x.dtype not in DTYPES:
        raise ValueError(f"x must be (..., K) in fp16, bf16 or fp32, got {x.ndim}-D {x.dtype}")
    if weight_scale_NG.ndim != 2 or weight_scale_NG.dtype not in DTYPES:
        raise ValueError(f"scales must be a 2-D float, got {tuple(weight_scale_NG.shape)}")
    (N, G), K = weight_scale_NG.shape, x.shape[-1]
    if not G or K % G:
        raise ValueError(f"{G} groups do not divide {K} columns")
    expected = {"weight": (weight_packed_NW, (N, packed_words(K, bits)))}
    if weight_zero_point_WG is not None:
        expected["zero points"] = (weight_zero_point_WG, (packed_words(N, bits), G))
    for name, (tensor, shape) in expected.items():
        if tensor.dtype != torch.int32 or tensor.shape != shape:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name} must be int32 {shape}, got {got}")
    if bias_N is not None and (bias_N.shape != (N,) or bias_N.dtype not in DTYPES):
        raise ValueError(f"bias must be a float ({N},), got {bias_N.dtype} {tuple(bias_N.shape)}")


def _fake(
    x_MK: Tensor,
    weight_packed_NW: Tensor,
    weight_scale_NG: Tensor,
    weight_zero_point_WG: Tensor | None,
    bias_N: Tensor | None,
    bits: int,
) -> Tensor:
    return x_MK.new_empty((x_MK.shape[0], weight_scale_NG.shape[0]))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_MK, weight_packed_NW, weight_scale_NG, weight_zero_point_WG, bias_N, ctx.bits = inputs
    ctx.num_columns, ctx.bias_dtype = x_MK.shape[1], None if bias_N is None else bias_N.dtype
    ctx.save_for_backward(weight_packed_NW, weight_scale_NG, weight_zero_point_WG)


def _backward(
    ctx: Any, grad_MN: Tensor
) -> tuple[Tensor | None, None, None, None, Tensor | None, None]:
    words_NW, scale_NG, zero_WG = ctx.saved_tensors
    grad_MK = grad_N = None
    if ctx.needs_input_grad[0]:
        weight_NK = dequantize_reference(
            words_NW, scale_NG, zero_WG, ctx.num_columns, ctx.bits, grad_MN.dtype
        )
        grad_MK = grad_MN @ weight_NK
    if ctx.needs_input_grad[4]:
        grad_N = grad_MN.sum(0).to(ctx.bias_dtype)
    return grad_MK, None, None, None, grad_N, None


_op = register(
    "packed_linear",
    torch.library.infer_schema(packed_linear_triton, mutates_args=()),
    cuda=packed_linear_triton,
    cpu=packed_linear_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_keep_weight,
)
