# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The loops of ``two_sided``, for numba: imported when they are first called.

Shape suffixes: N out features.
"""

import numpy as np

from rotq_kernels.compiled import inlined, kept


@inlined(error_model="numpy")
def _add(w_N, row_N, first, by):
    for m in range(first, len(w_N)):
        w_N[m] += row_N[m] * by


@kept(error_model="numpy")
def round_all(w_N, factor_NN, scale_N, zero_N, bounds_2N, q_N):
    """``round_column``."""
    for n in range(len(w_N)):
        q = np.rint(w_N[n] / scale_N[n] + zero_N[n])
        q = min(max(q, bounds_2N[0, n]), bounds_2N[1, n])
        q_N[n] = q
        _add(w_N, factor_NN[n], n + 1, -(w_N[n] - (q - zero_N[n]) * scale_N[n]))


@kept(error_model="numpy")
def refine_all(gradient_N, hessian_NN, curvature, scale_N, bounds_2N, q_N, change_N):
    """``refine_column``."""
    for n in range(len(q_N)):
        rate = hessian_NN[n, n] * curvature * scale_N[n]
        q = np.rint(q_N[n] - gradient_N[n] / rate)
        q = min(max(q, bounds_2N[0, n]), bounds_2N[1, n])
        change = (q - q_N[n]) * scale_N[n]
        change_N[n] = change
        q_N[n] = q
        if change != 0:
            _add(gradient_N, hessian_NN[n], 0, change * curvature)
