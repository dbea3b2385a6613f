"""Rounding columns of a weight one by one where its rows feel each other's errors, by numba.

    round:   w~_n = w_n - sum_{m < n} e_m U_mn / U_mm,   e_m = w~_m - w^_m,   U^T U = H_O^-1
    refine:  q_n <- round(q_n - (H_O E H_I)_nk / (H_O,nn H_I,kk s_n))

The interpreter's lock is not held. Shape suffixes: N out features, B columns of one block.
"""

from typing import Any

import numpy as np
from torch import Tensor


def round_column(
    w_N: Tensor, factor_NN: Tensor, scale_N: Tensor, zero_N: Tensor, bounds_2N: Tensor, q_N: Tensor
) -> None:
    """Codes of one column, each of which sees the errors of those before it. All fp32 on the CPU.

    Args:
        w_N: What is wanted; modified.
        factor_NN: Upper, of the inverse of the rows' Hessian, over its diagonal.
        scale_N, zero_N: Of each row's group.
        bounds_2N: Least and largest code of each row.
        q_N: Gets the codes.
    """
    _loops().round_all(
        *(tensor.numpy() for tensor in (w_N, factor_NN, scale_N, zero_N, bounds_2N, q_N))
    )


def refine_column(
    gradient_N: Tensor,
    hessian_NN: Tensor,
    curvature: float,
    scale_N: Tensor,
    bounds_2N: Tensor,
    q_N: Tensor,
) -> Tensor:
    """One sweep over a column: each code is the best beside the others. All fp32 on the CPU.

    Args:
        gradient_N: Of half the loss at this column; modified.
        hessian_NN: Of the rows.
        curvature: H_kk of the column.
        scale_N: Of each row's group.
        bounds_2N: Least and largest code of each row.
        q_N: Codes; modified.

    Returns:
        What changed of the column's weights, (N).
    """
    change_N = gradient_N.new_empty(gradient_N.shape)
    given = (gradient_N, hessian_NN, np.float32(curvature), scale_N, bounds_2N, q_N, change_N)
    _loops().refine_all(*(each.numpy() if isinstance(each, Tensor) else each for each in given))
    return change_N


def _loops() -> Any:
    from rotq_kernels.rounding import two_sided_loops  # imports numba, which is optional

    return two_sided_loops
