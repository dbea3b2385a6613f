"""What ``compile_check`` compiles of ``prefill.kernels``: half-precision queries."""

from typing import Any

from rotq_kernels.kv.prefill.kernels import dense_chunk_kernel, packed_kernel

AMD = ("gfx942",)

GAPS = [name for name in packed_kernel.arg_names if name.startswith("gap_")]
"""Of pages in blocks."""

_POINTERS = {
    "q_ptr": "*bf16",
    "levels_ptr": "*fp32",
    "constant_ptr": "*fp32",
    "mean_ptr": "*fp32",
    "angle_ptr": "*fp16",
    "origin_ptr": "*fp32",
    "k_codes_ptr": "*i32",
    "k_norm_ptr": "*u8",
    "k_table_ptr": "*i32",
    "k_base_ptr": "*fp32",
    "v_codes_ptr": "*i32",
    "v_norm_ptr": "*u8",
    "v_table_ptr": "*i32",
    "v_base_ptr": "*fp32",
    "page_table_ptr": "*i32",
    "length_ptr": "*i32",
    "start_ptr": "*i32",
    "position_ptr": "*i32",
    "sums_ptr": "*fp32",
    "peak_ptr": "*fp32",
    "weight_ptr": "*fp32",
}


def _packed_case(
    D: int,
    bits: int,
    *,
    mean: str = "rope",
    residual: str = "none",
    N: int = 128,
    TILE: int = 64,
    in_blocks: bool = False,
    num_warps: int = 8,
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100"),
) -> dict[str, Any]:
    """Without ``elements``: with so many query rows it is not the memory that limits."""
    types = _POINTERS | dict.fromkeys(("H", "rows", "T", "table_width", "tiles"), "i32")
    types["mean_scale"] = "fp32"
    types |= {"hidden_ptr": "*i32"} | dict.fromkeys(GAPS, "i32")
    left_out = ["residual_ptr", "k_sign_ptr", "k_gamma_ptr", "gamma_base_ptr"]
    if residual == "qjl":
        types |= {"residual_ptr": "*fp32", "k_sign_ptr": "*i32"}
        types |= {"k_gamma_ptr": "*u8", "gamma_base_ptr": "*fp32"}
        left_out = []
    if not in_blocks:
        left_out += ["hidden_ptr", *GAPS]
    if mean != "rope":
        left_out += ["mean_ptr", "angle_ptr", "origin_ptr"]
    constants = {"D": D, "R": D // 2, "K_BITS": bits, "V_BITS": bits, "PAGE": 64, "WINDOW": 0}
    tile = {"N": N, "TILE": TILE, "EXACT": False, "PTX": targets != AMD}
    return {
        "kernel": packed_kernel,
        "name": f"D={D} k{bits}v{bits} mean {mean}, residual {residual}, {N}x{TILE}"
        + ", in blocks" * in_blocks
        + ", no PTX" * (targets == AMD),
        "types": {name: kind for name, kind in types.items() if name not in left_out},
        "constants": constants | tile | dict.fromkeys(left_out),
        "num_warps": num_warps,
        "targets": targets,
        "divisible": GAPS if in_blocks else [],
    }


def _dense_case(D: int) -> dict[str, Any]:
    pointers = ("sums_ptr", "peak_ptr", "weight_ptr", "position_ptr")
    strides = [f"stride_{side}{axis}" for side in "kv" for axis in "bhn"]
    types = {name: _POINTERS[name] for name in pointers} | {"k_position_ptr": "*i32"}
    types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16") | {"scale": "fp32"}
    types |= dict.fromkeys(("H", "rows", "T", "tokens", *strides), "i32")
    return {
        "kernel": dense_chunk_kernel,
        "name": f"dense chunk D={D}",
        "types": types,
        "constants": {"D": D, "WINDOW": 0, "N": 128, "TILE": 64, "PRECISION": "tf32x3"},
        "num_warps": 8,
        "targets": ("sm_80", "sm_90", "sm_100"),
        "divisible": strides,
    }


COMPILE_CASES = [
    _packed_case(128, 3),
    _packed_case(128, 3, in_blocks=True),
    _packed_case(128, 3, mean="none"),
    _packed_case(128, 4, residual="qjl"),
    _packed_case(64, 3, N=64, num_warps=4),
    _packed_case(64, 3, N=64, num_warps=4, targets=AMD),
    _packed_case(256, 3, N=64, TILE=32),
    _dense_case(128),
]
