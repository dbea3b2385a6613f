# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The loops of ``native_search``, for numba: imported when they are first called.

A NaN stays one, and gains nothing.

Shape suffixes: B sequences, T tokens, H KV heads, D head width, L levels, E thresholds.
"""

import numpy as np

from rotq_kernels.compiled import SUMS, inlined, kept

f = np.float32
ZERO, TWO, TINY = f(0.0), f(2.0), np.finfo(f).tiny


@inlined(fastmath=SUMS, error_model="numpy")
def _weigh(x_D, metric_DD, out_D):
    out_D[:] = ZERO
    for d in range(len(x_D)):
        for e in range(len(x_D)):
            out_D[e] += x_D[d] * metric_DD[d, e]


@inlined(fastmath=SUMS, error_model="numpy")
def _ratio(y_D, along_D, level_D):
    """<y, along> / <level, along>, not negative."""
    product, energy = ZERO, ZERO
    for d in range(len(y_D)):
        product += y_D[d] * along_D[d]
        energy += level_D[d] * along_D[d]
    return max(product / energy, ZERO)


@inlined(fastmath=SUMS, error_model="numpy")
def _suit(level_D, g_D, damped_D, unit, threshold_E, value_L, wanted_D, other_D):
    """The level that suits each element best while all others stay."""
    for d in range(len(level_D)):
        wanted_D[d] = (level_D[d] - g_D[d] / damped_D[d]) * unit
        other_D[d] = value_L[0]
    for e in range(len(threshold_E)):
        threshold, rise = threshold_E[e], value_L[e + 1] - value_L[e]
        for d in range(len(level_D)):
            other_D[d] += rise if wanted_D[d] > threshold else ZERO


@inlined(fastmath=SUMS, error_model="numpy")
def _best_move(level_D, other_D, scale, g_D, metric_DD, change_D):
    for d in range(len(level_D)):
        delta = scale * (other_D[d] - level_D[d])
        change_D[d] = delta * (TWO * g_D[d] + metric_DD[d, d] * delta)
    best, least = -1, ZERO
    for d in range(len(level_D)):
        if change_D[d] < least:
            best, least = d, change_D[d]
    return best


@inlined(fastmath=SUMS, error_model="numpy")
def _search_row(y_D, metric_DD, unit, threshold_E, value_L, steps, code_D, room):
    level_D, g_D, damped_D, wanted_D, other_D, change_D = room
    for d in range(len(y_D)):
        level_D[d] = value_L[code_D[d]]
    scale = _ratio(y_D, level_D, level_D)
    for d in range(len(y_D)):
        wanted_D[d] = scale * level_D[d] - y_D[d]
        damped_D[d] = max(scale, TINY) * metric_DD[d, d]
    _weigh(wanted_D, metric_DD, g_D)
    for _ in range(steps):
        _suit(level_D, g_D, damped_D, unit, threshold_E, value_L, wanted_D, other_D)
        d = _best_move(level_D, other_D, scale, g_D, metric_DD, change_D)
        if d < 0:
            break
        code = 0
        for threshold in threshold_E:
            code += wanted_D[d] > threshold
        code_D[d] = code
        delta = scale * (other_D[d] - level_D[d])
        level_D[d] = other_D[d]
        for e in range(len(y_D)):
            g_D[e] += delta * metric_DD[d, e]
    _weigh(level_D, metric_DD, g_D)
    return _ratio(y_D, g_D, level_D)


@kept(fastmath=SUMS, error_model="numpy")
def search(units, y_BHTD, metric_HDD, unit_H, threshold_HE, value_HL, steps, code_BHTD, scale_BHT):
    """``search_codes_native``, of a run of heads, counted over all sequences."""
    H, T, D = y_BHTD.shape[1:]
    level_D, g_D, damped_D = np.empty(D, f), np.empty(D, f), np.empty(D, f)
    wanted_D, other_D, change_D = np.empty(D, f), np.empty(D, f), np.empty(D, f)
    room = level_D, g_D, damped_D, wanted_D, other_D, change_D
    for unit in range(units[0], units[1]):
        b, h = unit // H, unit % H
        for t in range(T):
            scale_BHT[b, h, t] = _search_row(
                y_BHTD[b, h, t],
                metric_HDD[h],
                unit_H[h],
                threshold_HE[h],
                value_HL[h],
                steps,
                code_BHTD[b, h, t],
                room,
            )
