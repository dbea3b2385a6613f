"""The search of ``search`` on CPUs, compiled by numba: a row at a time, in the first cache.

Plain PyTorch takes some fifteen operations for each of the steps, and all of them read and write
all rows. Here a step is a few vectors of one row. Sums are in fp32, in another order than torch's,
so that of two moves that gain the same to rounding the other may be made; what a row becomes does
not depend on the rows beside it. A level is summed from the differences of levels, which are whole
numbers or halves: no rounding. Where no move gains, none of the later steps would find one.

Threads share the heads of all sequences. Needs numba, which ``pip install rotq[native]`` brings.

Shape suffixes: B sequences, T tokens, H KV heads, D head width, L levels, E thresholds.
"""

import torch
from torch import Tensor

from rotq_kernels.launching import is_native
from rotq_kernels.sharing import share

SHARED = 1 << 16
"""Numbers from which on torch's threads share them: 1000 rows of 64 take about a millisecond."""


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
    from rotq_kernels.kv.encode import search_loops  # imports numba, which is optional

    codes_BHTD = codes_BHTD.clone(memory_format=torch.contiguous_format)
    scale_BHT = y_BHTD.new_empty(y_BHTD.shape[:-1])
    tables = (metric_HDD, unit_H, thresholds_HE, values_HL)
    B, H, T, D = y_BHTD.shape
    share(
        search_loops.search,
        B * H,
        y_BHTD.contiguous().numpy(),
        *(table.contiguous().numpy() for table in tables),
        steps,
        codes_BHTD.numpy(),
        scale_BHT.numpy(),
        worth_it=B * H * T * D >= SHARED,
    )
    return codes_BHTD, scale_BHT
