# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The search of ``search`` on CPUs, compiled by numba: a row at a time, in the first cache.

Plain PyTorch takes some fifteen operations for each of the steps, and all of them read and write
all rows. Here a step is a few vectors of one row. Sums are in fp32, in another order than torch's,
so that of two moves that gain the same to rounding the other may be made; what a row becomes does
not depend on the rows beside it. A level is summed from the differences of levels, which are whole
numbers or halves: no rounding. Where no move gains, none of the later steps would find one.

The interpreter's lock is not held. Needs numba, which ``pip install rotq[native]`` brings.

Shape suffixes: B sequences, T tokens, H KV heads, D head width, L levels, E thresholds.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotq_kernels.launching import is_native

FLAGS = {"reassoc", "contract", "nsz"}
"""Sums may be regrouped; a NaN stays one, and gains nothing."""


def searches_rows_natively(y_BHTD: Tensor) -> bool:
    """Whether there is native code for these rows; it has no gradients."""
    is_plain = y_BHTD.device.type == "cpu" and y_BHTD.dtype == torch.float32
    return is_plain and not y_BHTD.requires_grad and is_native()


def search_codes_native(
    y_BHTD: Tensor,
    codes_BHTD: Tensor,
    metric_HDD: Tensor,
    unit_H: Tensor,
    steps: int,
    thresholds_HE: Tensor,
    values_HL: Tensor,
) -> tuple[Tensor, Tensor]:
    """``search_codes`` with tables in place of functions; all on the CPU.

    Args:
        y_BHTD: fp32.
        codes_BHTD: uint8, nearest ones; not modified.
        metric_HDD: fp32.
        unit_H: fp32.
        steps: See there.
        thresholds_HE: fp32, ascending.
        values_HL: fp32, what each code stands for; E + 1 of them.

    Returns:
        uint8 (B, H, T, D) and fp32 scales (B, H, T), 0 where y is 0.
    """
    codes_BHTD = codes_BHTD.clone(memory_format=torch.contiguous_format)
    scale_BHT = y_BHTD.new_empty(y_BHTD.shape[:-1])
    tables = (metric_HDD, unit_H, thresholds_HE, values_HL)
    _compiled()(
        y_BHTD.contiguous().numpy(),
        *(table.contiguous().numpy() for table in tables),
        steps,
        codes_BHTD.numpy(),
        scale_BHT.numpy(),
    )
    return codes_BHTD, scale_BHT


@functools.cache
def _compiled() -> Any:
    import numba  # optional, and looked for by who calls this

    jit = numba.njit(nogil=True, fastmath=FLAGS, error_model="numpy")
    f = np.float32
    zero, two, tiny = f(0.0), f(2.0), np.finfo(f).tiny

    @jit
    def weigh(x_D, metric_DD, out_D):
        out_D[:] = zero
        for d in range(len(x_D)):
            for e in range(len(x_D)):
                out_D[e] += x_D[d] * metric_DD[d, e]

    @jit
    def ratio(y_D, along_D, level_D):
        """<y, along> / <level, along>, not negative."""
        product, energy = zero, zero
        for d in range(len(y_D)):
            product += y_D[d] * along_D[d]
            energy += level_D[d] * along_D[d]
        return max(product / energy, zero)

    @jit
    def suit(level_D, g_D, damped_D, unit, threshold_E, value_L, wanted_D, other_D):
        """The level that suits each element best while all others stay."""
        for d in range(len(level_D)):
            wanted_D[d] = (level_D[d] - g_D[d] / damped_D[d]) * unit
            other_D[d] = value_L[0]
        for e in range(len(threshold_E)):
            threshold, rise = threshold_E[e], value_L[e + 1] - value_L[e]
            for d in range(len(level_D)):
                other_D[d] += rise if wanted_D[d] > threshold else zero

    @jit
    def best_move(level_D, other_D, scale, g_D, metric_DD, change_D):
        for d in range(len(level_D)):
            delta = scale * (other_D[d] - level_D[d])
            change_D[d] = delta * (two * g_D[d] + metric_DD[d, d] * delta)
        best, least = -1, zero
        for d in range(len(level_D)):
            if change_D[d] < least:
                best, least = d, change_D[d]
        return best

    @jit
    def search_row(y_D, metric_DD, unit, threshold_E, value_L, steps, code_D, room):
        level_D, g_D, damped_D, wanted_D, other_D, change_D = room
        for d in range(len(y_D)):
            level_D[d] = value_L[code_D[d]]
        scale = ratio(y_D, level_D, level_D)
        for d in range(len(y_D)):
            wanted_D[d] = scale * level_D[d] - y_D[d]
            damped_D[d] = max(scale, tiny) * metric_DD[d, d]
        weigh(wanted_D, metric_DD, g_D)
        for _ in range(steps):
            suit(level_D, g_D, damped_D, unit, threshold_E, value_L, wanted_D, other_D)
            d = best_move(level_D, other_D, scale, g_D, metric_DD, change_D)
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
        weigh(level_D, metric_DD, g_D)
        return ratio(y_D, g_D, level_D)

    @jit
    def search(y_BHTD, metric_HDD, unit_H, threshold_HE, value_HL, steps, code_BHTD, scale_BHT):
        B, H, T, D = y_BHTD.shape
        level_D, g_D, damped_D = np.empty(D, f), np.empty(D, f), np.empty(D, f)
        wanted_D, other_D, change_D = np.empty(D, f), np.empty(D, f), np.empty(D, f)
        room = level_D, g_D, damped_D, wanted_D, other_D, change_D
        for b in range(B):
            for h in range(H):
                for t in range(T):
                    scale_BHT[b, h, t] = search_row(
                        y_BHTD[b, h, t],
                        metric_HDD[h],
                        unit_H[h],
                        threshold_HE[h],
                        value_HL[h],
                        steps,
                        code_BHTD[b, h, t],
                        room,
                    )

    return search
