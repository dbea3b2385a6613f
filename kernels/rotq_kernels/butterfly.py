"""Orthogonal transform of rows with an angle for each pair: any order n = m p, p = 2^a.

A row is m runs of p elements. Stage l of a turns each pair (x_2k, x_2k+1) of a run by its angle t,

    u_k = cos t x_2k + sin t x_2k+1,      v_k = sin t x_2k - cos t x_2k+1

and leaves (u_0 .. u_{p/2-1}, v_0 ..): the lowest bit of the index becomes the highest, so that
after all stages the order is natural. A core of order m then mixes the runs, as in ``hadamard``,
which this is where every angle is pi / 4. All sums are fp32.

Shape suffixes: R rows, K features (n), M order of the core, P length of a run, Q pairs of a run,
A stages.
"""

import math

import torch

from rotq_kernels.hadamard import LONGEST_RUN, core_triton, fp32_products
from rotq_kernels.launching import next_power_of_two, require_triton


def butterfly(
    x_RK: torch.Tensor,
    core_MM: torch.Tensor,
    angles_AMQ: torch.Tensor,
    signs_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Transform each row.

    Args:
        x_RK: fp16, bf16 or fp32; any row stride.
        core_MM: int8, M the order of a Hadamard matrix that divides K into a power of two.
        angles_AMQ: fp32, radians; A = log2 P, Q = P / 2.
        signs_K: int8, +1 and -1; None for all +1.

    Returns:
        Shape and dtype of ``x_RK``, contiguous.

    Raises:
        ValueError: shapes or dtypes are not these.
    """
    if x_RK.ndim != 2 or x_RK.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"butterfly takes (R, K) floats, got {tuple(x_RK.shape)} {x_RK.dtype}")
    M, K = core_MM.shape[0], x_RK.shape[1]
    P = K // M
    if core_MM.shape != (M, M) or M * P != K or P & (P - 1) or P < 2:
        raise ValueError(f"a core {tuple(core_MM.shape)} and a power of two do not make {K}")
    wanted = (P.bit_length() - 1, M, P // 2)
    if angles_AMQ.shape != wanted or angles_AMQ.dtype != torch.float32:
        found = f"{tuple(angles_AMQ.shape)} {angles_AMQ.dtype}"
        raise ValueError(f"angles are {found}, expected {wanted} float32")
    if signs_K is not None and signs_K.shape != (K,):
        raise ValueError(f"signs have shape {tuple(signs_K.shape)}, expected ({K},)")
    if core_MM.dtype != torch.int8 or (signs_K is not None and signs_K.dtype != torch.int8):
        raise ValueError("core and signs must be int8")
    return _op(x_RK, core_MM, angles_AMQ, signs_K)


def butterfly_reference(
    x_RK: torch.Tensor,
    core_MM: torch.Tensor,
    angles_AMQ: torch.Tensor,
    signs_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition in fp32, stage by stage; for fp64 inputs in fp64.

    Differentiable in ``x_RK`` and ``angles_AMQ``.
    """
    y = x_RK if x_RK.dtype == torch.float64 else x_RK.float()
    if signs_K is not None:
        y = y * signs_K
    R, K = x_RK.shape
    M = len(core_MM)
    y_RMP = y.reshape(R, M, K // M)
    for angle_MQ in angles_AMQ.to(y.dtype):
        c_MQ, s_MQ = angle_MQ.cos(), angle_MQ.sin()
        a_RMQ, b_RMQ = y_RMP[..., 0::2], y_RMP[..., 1::2]
        y_RMP = torch.cat((c_MQ * a_RMQ + s_MQ * b_RMQ, s_MQ * a_RMQ - c_MQ * b_RMQ), dim=-1)
    if M > 1:
        y_RMP = (core_MM.T.to(y) / math.sqrt(M)) @ y_RMP
    return y_RMP.reshape(R, K).to(x_RK.dtype)


def butterfly_cpu(
    x_RK: torch.Tensor,
    core_MM: torch.Tensor,
    angles_AMQ: torch.Tensor,
    signs_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference with fp32 products that are fp32, whatever precision torch is set to."""
    with fp32_products():
        return butterfly_reference(x_RK, core_MM, angles_AMQ, signs_K)


def butterfly_triton(
    x_RK: torch.Tensor,
    core_MM: torch.Tensor,
    angles_AMQ: torch.Tensor,
    signs_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernels. On CPU tensors this needs TRITON_INTERPRET=1."""
    require_triton()
    from rotq_kernels.butterfly_kernels import butterfly_kernel

    if x_RK.stride(1) != 1:
        x_RK = x_RK.contiguous()
    (R, K), M = x_RK.shape, core_MM.shape[0]
    P = K // M
    if P > LONGEST_RUN:
        raise ValueError(f"runs of {P} elements; the kernel holds {LONGEST_RUN}")
    y_RK = torch.empty((R, K), dtype=x_RK.dtype, device=x_RK.device)
    if not R:
        return y_RK
    z_RK = y_RK if M == 1 else torch.empty((R, K), dtype=torch.float32, device=x_RK.device)
    runs = max(1, min(2048 // P, next_power_of_two(R * M)))
    butterfly_kernel[(-(-R * M // runs),)](
        x_RK,
        x_RK if signs_K is None else signs_K,
        angles_AMQ.cos().contiguous(),
        angles_AMQ.sin().contiguous(),
        z_RK,
        num_runs=R * M,
        stride_xr=x_RK.stride(0),
        M=M,
        HAS_SIGNS=signs_K is not None,
        LOG_P=P.bit_length() - 1,
        P=P,
        RUNS=runs,
        num_warps=4 if P <= 4096 else 16,
    )
    if M > 1:
        core_triton(z_RK, core_MM, y_RK, 1 / math.sqrt(M))
    return y_RK


_op = torch.library.custom_op(
    "rotq::butterfly", butterfly_triton, mutates_args=(), device_types="cuda"
)
_op.register_kernel("cpu")(butterfly_cpu)


@_op.register_fake
def _(
    x_RK: torch.Tensor,
    core_MM: torch.Tensor,
    angles_AMQ: torch.Tensor,
    signs_K: torch.Tensor | None = None,
) -> torch.Tensor:
    return x_RK.new_empty(x_RK.shape)
