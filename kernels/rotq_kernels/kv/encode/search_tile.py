# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The search of ``search`` on a tile of tokens, for the kernel that encodes.

Shape suffixes: N tokens of a tile, D head width padded to a power of two, C blocks of K
columns.
"""

import triton
import triton.language as tl

from rotq_kernels.kv.encode.tile import quantize

_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def times_metric(x_ND, metric_ptr, D: tl.constexpr, PRECISION: tl.constexpr):
    """x W by blocks of K rows of W: [N, D]."""
    # wide heads would take more shared memory than AMD has
    K: tl.constexpr = 32 if x_ND.shape[1] <= 128 else 16
    C: tl.constexpr = x_ND.shape[1] // K
    d, k = tl.arange(0, x_ND.shape[1]), tl.arange(0, K)
    c = tl.arange(0, C)[None, :, None]
    # [N, D] -> [N, C, K]
    x_NCK = tl.reshape(x_ND, [x_ND.shape[0], C, K])
    product_ND = tl.zeros_like(x_ND)
    # not pipelined: two blocks of a wide head exceed the shared memory of gfx942
    for chunk in tl.range(C, num_stages=1):
        x_NK = tl.sum(tl.where(c == chunk, x_NCK, 0.0), axis=1)
        row = chunk * K + k
        metric_KD = tl.load(
            metric_ptr + row[:, None] * D + d[None, :],
            mask=(row < D)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        # [N, K] @ [K, D] -> [N, D]
        product_ND = tl.dot(x_NK, metric_KD, product_ND, input_precision=PRECISION)
    return product_ND


@triton.jit
def ratio(y_ND, along_ND, level_ND):
    """<y, along> / <level, along>, not negative."""
    found_N = tl.div_rn(tl.sum(y_ND * along_ND, axis=1), tl.sum(level_ND * along_ND, axis=1))
    return tl.maximum(found_N, 0.0)


@triton.jit
def search(
    y_ND,
    code_ND,
    level_ND,
    metric_ptr,
    levels_ptr,
    thresholds_ptr,
    unit,
    D: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Better codes, their levels and their scale; columns beyond D stay zero."""
    d = tl.arange(0, y_ND.shape[1])
    inside = (d < D)[None, :]
    diagonal_D = tl.load(metric_ptr + d * (D + 1), mask=d < D, other=1.0)
    scale_N = ratio(y_ND, level_ND, level_ND)
    g_ND = times_metric(scale_N[:, None] * level_ND - y_ND, metric_ptr, D, PRECISION)
    damped_ND = tl.maximum(scale_N, _TINY)[:, None] * diagonal_D[None, :]
    for _ in range(STEPS):
        target_ND = (level_ND - tl.div_rn(g_ND, damped_ND)) * unit
        other_ND, value_ND = quantize(target_ND, levels_ptr, thresholds_ptr, BITS)
        delta_ND = tl.where(inside, scale_N[:, None] * (value_ND - level_ND), 0.0)
        change_ND = delta_ND * (2.0 * g_ND + diagonal_D[None, :] * delta_ND)
        best_N = tl.argmin(change_ND, axis=1)
        gains_N = tl.min(change_ND, axis=1) < 0
        moves_ND = (d[None, :] == best_N[:, None]) & gains_N[:, None]
        code_ND = tl.where(moves_ND, other_ND, code_ND)
        level_ND = tl.where(moves_ND, value_ND, level_ND)
        step_N = tl.sum(tl.where(moves_ND, delta_ND, 0.0), axis=1)
        metric_ND = tl.load(metric_ptr + best_N[:, None] * D + d[None, :], mask=inside, other=0.0)
        g_ND += step_N[:, None] * metric_ND
    weighted_ND = times_metric(level_ND, metric_ptr, D, PRECISION)
    return code_ND, level_ND, ratio(y_ND, weighted_ND, level_ND)
