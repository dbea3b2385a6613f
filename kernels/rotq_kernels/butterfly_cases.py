"""What ``compile_check`` compiles of ``butterfly_kernels``."""

from typing import Any

from rotq_kernels.butterfly_kernels import butterfly_kernel


def _case(P: int, dtype: str, out: str) -> dict[str, Any]:
    runs = max(1, 2048 // P)
    kind = {"bf16": 16, "fp32": 32}
    return {
        "name": f"runs of {P}, {dtype} to {out}, signs",
        "kernel": butterfly_kernel,
        "types": {
            "x_ptr": f"*{dtype}",
            "signs_ptr": "*i8",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "y_ptr": f"*{out}",
            "num_runs": "i32",
            "stride_xr": "i32",
            "M": "i32",
        },
        "divisible": ("stride_xr",),
        "constants": {"HAS_SIGNS": True, "LOG_P": P.bit_length() - 1, "P": P, "RUNS": runs},
        "num_warps": 4 if P <= 4096 else 16,
        "whole": True,
        "elements": runs * P,
        "bits": kind[dtype] + kind[out],
    }


COMPILE_CASES = [_case(128, "bf16", "fp32"), _case(32, "bf16", "fp32"), _case(4096, "bf16", "bf16")]
