"""What ``compile_check`` compiles of ``hadamard_kernels``."""

from typing import Any

from rotq_kernels.hadamard import LONGEST_RUN, core_blocks
from rotq_kernels.hadamard_kernels import core_kernel, sylvester_kernel


def _sylvester_case(P: int, dtype: str, out: str, *, signs: bool) -> dict[str, Any]:
    runs = max(1, 2048 // P)
    kind = {"bf16": 16, "fp32": 32}
    return {
        "name": f"runs of {P}, {dtype} to {out}" + (", signs" if signs else ""),
        "kernel": sylvester_kernel,
        "types": {
            "x_ptr": f"*{dtype}",
            "signs_ptr": "*i8",
            "y_ptr": f"*{out}",
            "num_runs": "i32",
            "stride_xr": "i32",
            "M": "i32",
            "scale": "fp32",
        },
        "divisible": ("stride_xr",),
        "constants": {
            "HAS_SIGNS": signs,
            "LOG_P": P.bit_length() - 1,
            "P": P,
            "RUNS": runs,
        },
        "num_warps": 4 if P <= 4096 else 16,
        "whole": True,
        "elements": runs * P,
        "bits": kind[dtype] + kind[out],
    }


def _core_case(M: int, P: int) -> dict[str, Any]:
    blocks = core_blocks(M)
    return {
        "name": f"core {M}, runs of {P}, to bf16",
        "kernel": core_kernel,
        "types": {
            "z_ptr": "*fp32",
            "core_ptr": "*i8",
            "y_ptr": "*bf16",
            "num_columns": "i32",
            "M": "i32",
            "P": "i32",
            "scale": "fp32",
        },
        "divisible": ("num_columns", "P"),
        "constants": blocks,
        "elements": blocks["BLOCK_I"] * blocks["BLOCK_C"],
        "bits": 32,
    }


COMPILE_CASES = [
    _sylvester_case(128, "bf16", "bf16", signs=False),
    _sylvester_case(32, "bf16", "fp32", signs=True),
    _sylvester_case(512, "bf16", "fp32", signs=True),
    _sylvester_case(4096, "bf16", "bf16", signs=True),
    _sylvester_case(LONGEST_RUN, "bf16", "bf16", signs=True),
    _sylvester_case(LONGEST_RUN, "fp32", "fp32", signs=True),
    _core_case(12, 1024),
    _core_case(344, 32),
]
