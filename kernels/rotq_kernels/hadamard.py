"""Orthonormal Hadamard transform of rows: any order n = m p, p = 2^a, with a core of order m.

    y_r = (d * x_r) (C kron S) / sqrt(n),     S_ij = (-1)^popcount(i & j),  i, j < p

d: signs, C: (m, m) with entries +-1 and C C^T = m I, [[1]] where n is a power of two. A row is m
runs of p elements. The first kernel transforms runs by butterflies in registers; where m > 1 it
leaves them in fp32 for the second one, which multiplies by the core. Of runs that are too long for
a program, a part goes to the core: C kron S of order 2^i m, and S of order p / 2^i. All sums are
fp32.

Shape suffixes: R rows, K features (n), M order of the core, P length of a run.
"""

import math

import torch

from rotq_kernels.launching import launch, next_power_of_two, require_triton
from rotq_kernels.operators import register

LONGEST_RUN = 8192
"""Elements that one program of the first kernel holds: fp32, in 32 KiB of shared memory."""

_LOG_BLOCK = 5
"""The reference multiplies by Sylvester matrices of at most 2 to this."""


def hadamard(
    x_RK: torch.Tensor, core_MM: torch.Tensor, signs_K: torch.Tensor | None = None
) -> torch.Tensor:
    """Transform each row.

    Args:
        x_RK: fp16, bf16 or fp32; any row stride.
        core_MM: int8, M the order of a Hadamard matrix that divides K into a power of two.
        signs_K: int8, +1 and -1; None for all +1.

    Returns:
        Shape and dtype of ``x_RK``, contiguous.

    Raises:
        ValueError: shapes or dtypes are not these.
    """
    if x_RK.ndim != 2 or x_RK.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"hadamard takes (R, K) floats, got {tuple(x_RK.shape)} {x_RK.dtype}")
    M, K = core_MM.shape[0], x_RK.shape[1]
    P = K // M
    if core_MM.shape != (M, M) or M * P != K or P & (P - 1) or not P:
        raise ValueError(f"a core {tuple(core_MM.shape)} and a power of two do not make {K}")
    if signs_K is not None and signs_K.shape != (K,):
        raise ValueError(f"signs have shape {tuple(signs_K.shape)}, expected ({K},)")
    if core_MM.dtype != torch.int8 or (signs_K is not None and signs_K.dtype != torch.int8):
        raise ValueError("core and signs must be int8")
    return _op(x_RK, core_MM, signs_K)


def hadamard_reference(
    x_RK: torch.Tensor, core_MM: torch.Tensor, signs_K: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition as K (m + p_1 + p_2 + ...) products a row, p = p_1 p_2 ..., in fp32.

    Also for fp64, in fp64. Differentiable in ``x_RK``.
    """
    y = x_RK if x_RK.dtype == torch.float64 else x_RK.float()
    if signs_K is not None:
        y = y * signs_K
    R, K = x_RK.shape
    factors = [factor.to(y) for factor in _factors(core_MM, K)]
    factors[-1] = factors[-1] / math.sqrt(K)
    done, rest = 1, K
    for factor in factors:
        f, rest = len(factor), rest // len(factor)
        y = y.reshape(R * done, f, rest)
        # the last factor has runs of one element: a single product is faster than one per row
        y = factor.T @ y if rest > 1 else y.squeeze(-1) @ factor
        done *= f
    return y.reshape(R, K).to(x_RK.dtype)


def hadamard_cpu(
    x_RK: torch.Tensor, core_MM: torch.Tensor, signs_K: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference with fp32 products that are fp32, whatever precision torch is set to."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return hadamard_reference(x_RK, core_MM, signs_K)
    finally:
        torch.set_float32_matmul_precision(before)


def _factors(core_MM: torch.Tensor, K: int) -> list[torch.Tensor]:
    """int8 matrices whose Kronecker product is the transform."""
    M = core_MM.shape[0]
    log_run = (K // M).bit_length() - 1
    num = -(-log_run // _LOG_BLOCK)
    logs = [(log_run + i) // num for i in range(num)]
    blocks = [_sylvester(log, core_MM.device) for log in logs]
    return [core_MM, *blocks] if M > 1 or not blocks else blocks


def _sylvester(log: int, device: torch.device) -> torch.Tensor:
    i = torch.arange(2**log, device=device)
    both = i[:, None] & i
    odd = torch.zeros_like(both)
    for bit in range(log):
        odd ^= (both >> bit) & 1
    return (1 - 2 * odd).to(torch.int8)


def hadamard_triton(
    x_RK: torch.Tensor, core_MM: torch.Tensor, signs_K: torch.Tensor | None = None
) -> torch.Tensor:
    """Launch the kernels. On CPU tensors this needs TRITON_INTERPRET=1."""
    require_triton()
    from rotq_kernels.hadamard_kernels import sylvester_kernel

    if x_RK.stride(1) != 1:
        x_RK = x_RK.contiguous()
    R, K = x_RK.shape
    core_MM = _with_long_runs(core_MM, K)
    M, P = core_MM.shape[0], K // core_MM.shape[0]
    y_RK = torch.empty((R, K), dtype=x_RK.dtype, device=x_RK.device)
    if not R:
        return y_RK
    z_RK = y_RK if M == 1 else torch.empty((R, K), dtype=torch.float32, device=x_RK.device)
    runs = max(1, min(2048 // P, next_power_of_two(R * M)))
    launch(
        sylvester_kernel,
        (-(-R * M // runs),),
        x_RK,
        x_RK if signs_K is None else signs_K,
        z_RK,
        num_runs=R * M,
        stride_xr=x_RK.stride(0),
        M=M,
        scale=1 / math.sqrt(K) if M == 1 else 1.0,
        HAS_SIGNS=signs_K is not None,
        LOG_P=P.bit_length() - 1,
        P=P,
        RUNS=runs,
        num_warps=4 if P <= 4096 else 16,
        on=x_RK,
    )
    if M > 1:
        _launch_core(z_RK, core_MM, y_RK)
    return y_RK


def _with_long_runs(core_MM: torch.Tensor, K: int) -> torch.Tensor:
    """The core, or what is one with runs of at most LONGEST_RUN."""
    log = (K // core_MM.shape[0] // LONGEST_RUN).bit_length() - 1
    return core_MM if log < 1 else torch.kron(core_MM, _sylvester(log, core_MM.device))


def _launch_core(z_RK: torch.Tensor, core_MM: torch.Tensor, y_RK: torch.Tensor) -> None:
    """Multiply the runs of ``z_RK`` (fp32) by the core into ``y_RK``, and scale them."""
    from rotq_kernels.hadamard_kernels import core_kernel

    (R, K), M = z_RK.shape, core_MM.shape[0]
    blocks = core_blocks(M)
    columns = R * K // M
    grid = (-(-columns // blocks["BLOCK_C"]), -(-M // blocks["BLOCK_M"]))
    core_MM, scale = core_MM.contiguous(), 1 / math.sqrt(K)
    launch(
        core_kernel,
        grid,
        z_RK,
        core_MM,
        y_RK,
        columns,
        M,
        K // M,
        scale,
        **blocks,
        num_warps=4,
        on=z_RK,
    )


def core_blocks(M: int) -> dict[str, int]:
    """Block sizes of the second kernel."""
    return {
        "BLOCK_M": min(64, max(16, next_power_of_two(M))),
        "BLOCK_C": 64,
        "BLOCK_I": 16,
    }


def _fake(
    x_RK: torch.Tensor, core_MM: torch.Tensor, signs_K: torch.Tensor | None = None
) -> torch.Tensor:
    return x_RK.new_empty(x_RK.shape)


_op = register(
    "hadamard",
    torch.library.infer_schema(hadamard_triton, mutates_args=()),
    cuda=hadamard_triton,
    cpu=hadamard_cpu,
    fake=_fake,
)
