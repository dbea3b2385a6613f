"""What ``compile_check`` compiles of ``packed_linear_kernels``."""

from typing import Any

from rotq_kernels.packed_linear_kernels import dequantize_kernel, gemm_kernel, gemv_kernel


def _compile_case(
    kernel: Any, bits: int, block: tuple[int, int, int], *, zero: bool = True, **rest: Any
) -> dict[str, Any]:
    """bf16, groups of 128."""
    block_m, block_n, block_k = block
    types = dict.fromkeys(
        ("M", "N", "K", "stride_xm", "stride_wn", "num_groups", "magic", "blocks"), "i32"
    )
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*i32", "scale_ptr": "*fp16", "zero_ptr": "*i32"}
    constants = {
        "BITS": bits,
        "GROUP": 128,
        "RUN": 32,
        "HAS_ZERO": zero,
        "HAS_BIAS": False,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
    }
    if kernel is gemv_kernel:
        del types["blocks"]
    return {
        "kernel": kernel,
        "name": f"{kernel.__name__} {bits} bits{' zero' * zero} {'x'.join(map(str, block))}",
        "types": types | pointers | {"bias_ptr": "*bf16", "y_ptr": "*bf16"},
        "constants": constants,
        "divisible": ("N", "K", "stride_xm"),
        # the memory is the limit for few rows only
        "elements": block_n * block_k if block_m <= 16 else None,
        "bits": bits + (16 + bits * zero) / 128,
        "num_warps": 1 if kernel is gemv_kernel else 4,
        **rest,
    }


def _dense_case(bits: int) -> dict[str, Any]:
    types = dict.fromkeys(("N", "K", "stride_wn", "num_groups", "magic"), "i32")
    pointers = {"weight_ptr": "*i32", "scale_ptr": "*fp16", "zero_ptr": "*i32"}
    constants = {"BITS": bits, "GROUP": 128, "RUN": 32, "HAS_ZERO": True}
    return {
        "kernel": dequantize_kernel,
        "name": f"dequantize_kernel {bits} bits zero 32x128",
        "types": types | pointers | {"dense_ptr": "*bf16"},
        "constants": constants | {"BLOCK_N": 32, "BLOCK_K": 128},
        "divisible": ("N", "K"),
        "whole": True,
        "elements": 32 * 128,
        "bits": bits + (16 + bits) / 128 + 16,
    }


COMPILE_CASES = [
    *(_compile_case(gemv_kernel, bits, (1, 4, 1024)) for bits in (3, 4, 5)),
    _compile_case(gemv_kernel, 3, (1, 4, 1024), zero=False),
    _compile_case(gemv_kernel, 3, (2, 4, 1024)),
    *(_compile_case(gemm_kernel, bits, (16, 64, 128)) for bits in (3, 4, 5)),
    _compile_case(gemm_kernel, 3, (128, 128, 64), num_warps=8),
    _dense_case(3),
    _dense_case(4),
]
