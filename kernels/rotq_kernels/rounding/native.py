"""Loops over the columns of a weight, and over candidates for its scales, compiled by numba.

A column's error goes to the columns after it. Plain PyTorch does that with half a dozen small
operations for each column, and reads and writes the columns after it once each time; here a strip
of rows stays in the first cache until a whole block of columns is done. Products and sums are
those of PyTorch's operators one by one, so that codes are the same.

For scales the lanes of a register are candidates: what a candidate makes of one group's columns is
multiplied with the group's Hessian where it lies.

The interpreter's lock is not held. Needs numba, which ``pip install rotq[native]`` brings.

Shape suffixes: N out features, B columns of one block, G groups, g columns of a
group, C candidates.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotq_kernels.launching import is_native

NATIVE_FROM = 1 << 16
"""Numbers of a weight from which on it is worth compiling."""


def rounds_natively(weight_NK: Tensor) -> bool:
    """Whether native code for a weight is there, and worth the seconds that compiling takes."""
    is_plain = weight_NK.device.type == "cpu" and weight_NK.dtype == torch.float32
    return is_plain and weight_NK.numel() >= NATIVE_FROM and is_native()


def searches_natively(w_NGg: Tensor) -> bool:
    """The same for ``best_candidates``, which takes columns by fours."""
    return w_NGg.shape[-1] % 4 == 0 and rounds_natively(w_NGg)


def round_block(
    w_BN: Tensor,
    factor_BB: Tensor,
    scale_BN: Tensor,
    zero_BN: Tensor,
    bounds_2N: Tensor,
    q_BN: Tensor,
) -> Tensor:
    """GPTQ's loop over one block of columns: codes, and errors (B, N) over the factor's diagonal.

    All fp32 on the CPU.

    Args:
        w_BN: Columns in the order they are rounded; not modified.
        factor_BB: Of the inverse Hessian, upper, these columns.
        scale_BN, zero_BN: Of each column's group.
        bounds_2N: Least and largest code of each row.
        q_BN: Gets the codes.
    """
    error_BN = torch.empty(w_BN.shape)
    given = (w_BN, factor_BB, scale_BN, zero_BN, bounds_2N, q_BN, error_BN)
    _loops().round_all(*(tensor.numpy() for tensor in given))
    return error_BN


def refine_block(
    gradient_BN: Tensor,
    hessian_BB: Tensor,
    scale_BN: Tensor,
    step_BN: Tensor,
    bounds: tuple[int, int],
    q_BN: Tensor,
) -> Tensor:
    """One sweep over a block of columns: each takes its best code. Returns what changed, (B, N).

    All fp32 on the CPU.

    Args:
        gradient_BN: (W^ - T) H of these columns; not modified.
        hessian_BB: Of these columns.
        scale_BN, step_BN: Of each column's group, and its inverse.
        bounds: Least and largest code.
        q_BN: Codes; modified.
    """
    change_BN = torch.empty(q_BN.shape)
    given = (gradient_BN, hessian_BB, scale_BN, step_BN)
    arrays = [tensor.numpy() for tensor in given]
    low, high = (np.float32(bound) for bound in bounds)
    _loops().refine_all(*arrays, low, high, q_BN.numpy(), change_BN.numpy())
    return change_BN


def best_candidates(
    w_NGg: Tensor,
    scale_CNG: Tensor,
    zero_CNG: Tensor,
    block_Ggg: Tensor,
    bounds: tuple[int, int],
) -> Tensor:
    """int64 (N, G): the first candidate with the least e H_gg e^T.

    Args:
        w_NGg: fp32 on the CPU; not modified.
        scale_CNG, zero_CNG: fp32.
        block_Ggg: fp32, symmetric.
        bounds: Least and largest code.
    """
    C, (_, _, g) = len(scale_CNG), w_NGg.shape
    best_NG = torch.empty(w_NGg.shape[:2], dtype=torch.int64)
    scale_NGC, zero_NGC = (each.movedim(0, -1).contiguous() for each in (scale_CNG, zero_CNG))
    low, high = (np.float32(bound) for bound in bounds)
    # of a symmetric form, each pair once
    lower_Ggg = block_Ggg.tril() + block_Ggg.tril(-1)
    given = (w_NGg.contiguous(), scale_NGC, zero_NGC, lower_Ggg)
    arrays = [tensor.numpy() for tensor in given]
    run = _loops().candidate_search(C, g)
    run(*arrays, low, high, best_NG.numpy())
    return best_NG


def unpacked_levels(packed_NW: Tensor, zero_NG: Tensor | None, bits: int, shape: Any) -> Tensor:
    """fp32 (N, G, g): codes of a packed weight less their zero points.

    Args:
        packed_NW: int32 on the CPU, as ``layout.pack`` makes it; contiguous.
        zero_NG: int8; None for zeros.
        shape: (N, G, g); g is a multiple of 8.
    """
    level_NGg = torch.empty(shape)
    zero_NG = torch.zeros(shape[:2], dtype=torch.int8) if zero_NG is None else zero_NG
    stream = packed_NW.view(torch.uint8).numpy()
    run = _loops().unpacking(bits)
    run(stream, zero_NG.contiguous().numpy(), level_NGg.flatten(1).numpy(), shape[2])
    return level_NGg


def _loops() -> Any:
    from rotq_kernels.rounding import loops  # imports numba, which is optional

    return loops
