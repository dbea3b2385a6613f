"""What ``compile_check`` compiles of ``prefill.kernels``.

Every tile that ``prefill.launch`` takes, with the residual that takes the most shared memory.
"""

from typing import Any

from rotq_kernels.kv.format import KVFormat
from rotq_kernels.kv.prefill.kernels import dense_chunk_kernel, packed_kernel
from rotq_kernels.kv.prefill.launch import tile_sizes

AMD = ("gfx942",)
NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
SMALL = ("sm_89",)
"""Where shared memory is the least."""

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
    in_blocks: bool = False,
    exact: bool = False,
    targets: tuple[str, ...] = NVIDIA,
) -> dict[str, Any]:
    """Without ``elements``: with so many query rows it is not the memory that limits."""
    form = KVFormat(head_dim=D, k_bits=bits, v_bits=bits, residual=residual)  # type: ignore[arg-type]
    tile = tile_sizes(form, exact=exact)
    num_warps, num_stages = tile.pop("num_warps"), tile.pop("num_stages")
    types = _POINTERS | dict.fromkeys(("H", "rows", "T", "table_width", "tiles"), "i32")
    types["mean_scale"] = "fp32"
    types |= {"hidden_ptr": "*i32"} | dict.fromkeys(GAPS, "i32")
    left_out = ["residual_ptr", "k_sign_ptr", "k_gamma_ptr", "gamma_base_ptr"]
    if exact:
        types |= {"q_ptr": "*fp32", "angle_ptr": "*fp32"}
    if residual != "none":
        types |= {"residual_ptr": "*fp32", "k_sign_ptr": "*i32"}
        left_out = ["k_gamma_ptr", "gamma_base_ptr"]
    if residual == "qjl":
        types |= {"k_gamma_ptr": "*u8", "gamma_base_ptr": "*fp32"}
        left_out = []
    if not in_blocks:
        left_out += ["hidden_ptr", *GAPS]
    if mean != "rope":
        left_out += ["mean_ptr", "angle_ptr", "origin_ptr"]
    constants = {"D": D, "R": D // 2, "K_BITS": bits, "V_BITS": bits, "PAGE": 64, "WINDOW": 0}
    shape = "x".join(str(size) for size in tile.values())
    tile |= {"EXACT": exact, "PTX": targets != AMD}
    return {
        "kernel": packed_kernel,
        "name": f"D={D} k{bits}v{bits} mean {mean}, residual {residual}, {shape}"
        + ", in blocks" * in_blocks
        + ", fp32" * exact
        + ", no PTX" * (targets == AMD),
        "types": {name: kind for name, kind in types.items() if name not in left_out},
        "constants": constants | tile | dict.fromkeys(left_out),
        "num_warps": num_warps,
        "num_stages": num_stages,
        "targets": targets,
        "divisible": GAPS if in_blocks else [],
    }


def _dense_case(D: int, *, exact: bool = False) -> dict[str, Any]:
    pointers = ("sums_ptr", "peak_ptr", "weight_ptr", "position_ptr")
    strides = [f"stride_{side}{axis}" for side in "kv" for axis in "bhn"]
    types = {name: _POINTERS[name] for name in pointers} | {"k_position_ptr": "*i32"}
    kind = "*fp32" if exact else "*bf16"
    types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), kind) | {"scale": "fp32"}
    types |= dict.fromkeys(("H", "rows", "T", "tokens", *strides), "i32")
    tile = tile_sizes(KVFormat(head_dim=D, k_bits=3, v_bits=3), exact=exact)
    num_warps, num_stages = tile.pop("num_warps"), tile.pop("num_stages")
    return {
        "kernel": dense_chunk_kernel,
        "name": f"dense chunk D={D}" + ", fp32" * exact,
        "types": types,
        "constants": {"D": D, "WINDOW": 0, "PRECISION": "tf32x3", **tile},
        "num_warps": num_warps,
        "num_stages": num_stages,
        "targets": NVIDIA if D == 128 and not exact else SMALL,
        "divisible": strides,
    }


COMPILE_CASES = [
    _packed_case(128, 3),
    _packed_case(128, 3, in_blocks=True, targets=("sm_90", *SMALL)),
    _packed_case(128, 3, mean="none", targets=("sm_90", *SMALL)),
    _packed_case(128, 4, residual="qjl"),
    _packed_case(128, 3, residual="sign", targets=SMALL),
    _packed_case(128, 8, targets=SMALL),
    _packed_case(128, 3, exact=True, targets=("sm_90", *SMALL)),
    _packed_case(128, 4, residual="qjl", exact=True, targets=SMALL),
    _packed_case(64, 3),
    _packed_case(64, 4, residual="qjl", targets=SMALL),
    _packed_case(64, 4, residual="qjl", exact=True, targets=SMALL),
    _packed_case(64, 3, targets=AMD),
    _packed_case(96, 4, residual="qjl", targets=SMALL),
    _packed_case(256, 3),
    _packed_case(256, 4, residual="qjl", targets=SMALL),
    _dense_case(64),
    _dense_case(128),
    _dense_case(256),
    _dense_case(128, exact=True),
]
