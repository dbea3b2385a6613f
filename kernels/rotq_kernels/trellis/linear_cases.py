"""What ``compile_check`` compiles of ``trellis.linear_kernels``."""

from typing import Any

from rotq_kernels.trellis.linear_kernels import gemm_kernel, gemv_kernel

NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942",)


def _compile_case(
    kernel: Any, bits: int, block: tuple[int, int, int], targets: tuple[str, ...], **rest: Any
) -> dict[str, Any]:
    """bf16, L = 12, one scale a row, rings of whole chunks."""
    block_m, block_n, block_k = block
    types = dict.fromkeys(("M", "N", "K", "stride_xm", "num_groups", "ring"), "i32")
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*i32", "scale_ptr": "*fp16"}
    constants = {
        "BITS": bits,
        "STATE_BITS": 12,
        "DOT": targets == NVIDIA,
        "GROUP": 0,
        "CHUNKED": True,
        "HAS_BIAS": False,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
    }
    return {
        "kernel": kernel,
        "name": f"{kernel.__name__} {bits} bits {'x'.join(map(str, block))}",
        "targets": targets,
        "types": types | pointers | {"bias_ptr": "*bf16", "y_ptr": "*bf16"},
        "constants": constants,
        "divisible": ("N", "K", "stride_xm", "ring"),
        # the memory is the limit for few rows only
        "elements": block_n * block_k if block_m <= 16 else None,
        "bits": bits,
        "num_warps": 4,
        **rest,
    }


COMPILE_CASES = [
    _compile_case(kernel, bits, block, targets, **rest)
    for targets in (NVIDIA, AMD)
    for kernel, bits, block, rest in (
        *((gemv_kernel, bits, (1, 32, 128), {}) for bits in (2, 3, 4)),
        (gemv_kernel, 3, (2, 32, 128), {}),
        *((gemm_kernel, bits, (16, 64, 64), {}) for bits in (2, 3, 4)),
        (gemm_kernel, 3, (128, 128, 32), {"num_warps": 8}),
    )
]
