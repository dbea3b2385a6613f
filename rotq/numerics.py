"""How exact fp32 matrix products are, for a stretch of code."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's fp32 matrix product precision ("highest" or "medium") and put it back.

    "medium" multiplies in bf16 and sums in fp32: twice as fast where the CPU has AVX512-BF16;
    hardware without it computes in fp32 or TF32 by torch's own choice.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
