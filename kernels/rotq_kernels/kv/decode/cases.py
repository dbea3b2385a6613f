"""What ``compile_check`` compiles of a decode step, as ``decode.launch`` launches it.

Heads of width 128 and 64, groups of up to 8 query rows on NVIDIA's tile and of 16, the mean and
residual modes and widths of codes that the presets use. Elements are those of keys and values.
"""

from typing import Any

from rotq_kernels.kv.decode.kernel import decode_kernel
from rotq_kernels.kv.decode.merge import merge_kernel
from rotq_kernels.kv.decode.sizes import (
    COLUMNS,
    MAX_ROWS,
    lane_order,
    merge_sizes,
    tile_sizes,
    turn_sizes,
)
from rotq_kernels.kv.decode.turn import turn_kernel
from rotq_kernels.kv.format import KVFormat

NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
SMALL = ("sm_89",)
"""Where shared memory is the least."""
AMD = ("gfx942",)

POINTERS = {
    "levels_ptr": "*fp32",
    "k_codes_ptr": "*i32",
    "k_norm_ptr": "*u8",
    "k_base_ptr": "*fp32",
    "v_codes_ptr": "*i32",
    "v_norm_ptr": "*u8",
    "v_base_ptr": "*fp32",
    "page_table_ptr": "*i32",
    "length_ptr": "*i32",
    "start_ptr": "*i32",
    "position_ptr": "*i32",
    "sums_ptr": "*fp32",
    "peak_ptr": "*fp32",
    "weight_ptr": "*fp32",
}
SIZES = dict.fromkeys(("H", "rows", "T", "table_width", "partials", "run"), "i32")
PARTIALS = dict.fromkeys(("sums_ptr", "peak_ptr", "weight_ptr"), "*fp32")
STRIDES = [f"stride_{side}{axis}" for side in "kv" for axis in "bhn"]
GAPS = [name for name in decode_kernel.arg_names if name.startswith("gap_")]
"""Of pages in blocks."""
RESIDUAL = {"residual_ptr": "*fp32", "k_sign_ptr": "*i32"}
GAMMA = {"k_gamma_ptr": "*u8", "gamma_base_ptr": "*fp32"}
MEAN = {"cosine_ptr": "*fp32", "sine_ptr": "*fp32", "frequency_ptr": "*fp32"}


def _decode_case(
    name: str,
    *,
    width: int = 128,
    bits: tuple[int, int] = (3, 3),
    rows: int = 8,
    mean: str = "rope",
    residual: str = "none",
    window: int = 0,
    in_blocks: bool = False,
    exact: bool = False,
    targets: tuple[str, ...] = ("sm_90",),
    headline: bool = False,
) -> dict[str, Any]:
    form = KVFormat(head_dim=width, k_bits=bits[0], v_bits=bits[1], residual=residual)  # type: ignore[arg-type]
    types = POINTERS | SIZES
    types |= {f"{side}_table_ptr": "*i32" for side, n in zip("kv", bits, strict=True) if n <= 4}
    if mean == "rope":
        types |= MEAN | {"angle_ptr": "*fp32" if exact else "*fp16"}
    if in_blocks:
        types |= {"hidden_ptr": "*i32"} | dict.fromkeys(GAPS, "i32")
    if residual != "none":
        types |= RESIDUAL | (GAMMA if residual == "qjl" else {})
    has_ptx = targets != AMD
    tile = tile_sizes(width, rows, has_ptx=has_ptx, exact=exact)
    constants = {
        **{argument: None for argument in decode_kernel.arg_names if argument.endswith("_ptr")},
        **dict.fromkeys(GAPS),
        "D": width,
        "R": width // 2,
        "K_BITS": bits[0],
        "V_BITS": bits[1],
        "PAGE": form.page_size,
        "WINDOW": window,
        "LIMBS": 3 if exact else 2,
        "PTX": has_ptx,
        **lane_order(has_ptx=has_ptx),
        **tile,
    }
    return {
        "name": name,
        "kernel": decode_kernel,
        "types": types,
        "constants": {key: value for key, value in constants.items() if key not in types},
        "num_warps": tile["WARPS"],
        "num_stages": 1,
        "targets": targets,
        "divisible": GAPS if in_blocks else [],
        "elements": 2 * tile["TILE"] * width,
        "bits": form.bits_per_element,
        "headline": headline,
    }


def _turn_case(
    name: str,
    *,
    width: int = 128,
    mean: str = "rope",
    residual: str = "none",
    exact: bool = False,
    targets: tuple[str, ...] = NVIDIA,
) -> dict[str, Any]:
    kind = "*fp32" if exact else "*bf16"
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), kind) | PARTIALS
    types |= dict.fromkeys(("inverse_ptr", "mean_ptr", "levels_ptr"), "*fp32")
    types |= dict.fromkeys(("k_position_ptr", "position_ptr"), "*i32")
    types |= dict.fromkeys(("H", "rows", "T", "tokens", "partials", *STRIDES), "i32")
    types |= {"scale": "fp32", "rotary_scale": "fp32"}
    if mean == "rope":
        types |= dict.fromkeys(("cosine_ptr", "sine_ptr"), "*fp32")
    else:
        types |= {"constant_ptr": "*fp32"}
    if residual == "qjl":
        types |= dict.fromkeys(("residual_ptr", "residual_matrix_ptr"), "*fp32")
    has_ptx, sizes = targets != AMD, turn_sizes(width, exact=exact)
    constants = {
        **{argument: None for argument in turn_kernel.arg_names if argument.endswith("_ptr")},
        "D": width,
        "R": width // 2 if mean == "rope" else 0,
        "WINDOW": 0,
        "N": MAX_ROWS,
        "BLOCK": COLUMNS,
        "TILE": sizes["TILE"],
        "TURN": "tf32x3" if has_ptx else "ieee",
        "DENSE": "ieee" if not has_ptx else "tf32x3" if exact else "tf32",
    }
    return {
        "name": f"turn, {name}",
        "kernel": turn_kernel,
        "types": types,
        "constants": {key: value for key, value in constants.items() if key not in types},
        "num_stages": sizes["num_stages"],
        "targets": targets,
        "divisible": STRIDES,
    }


def _merge_case(
    width: int = 128, rows: int = 4, targets: tuple[str, ...] = NVIDIA
) -> dict[str, Any]:
    types = PARTIALS | dict.fromkeys(("inverse_ptr", "mean_ptr"), "*fp32")
    types |= {"out_ptr": "*bf16"} | dict.fromkeys(("H", "rows", "packed", "partials"), "i32")
    sizes = merge_sizes(width, rows)
    precision = "ieee" if targets == AMD else "tf32x3"
    return {
        "name": f"merge, width {width}, {rows} rows, {precision}",
        "kernel": merge_kernel,
        "types": types,
        "constants": sizes | {"D": width, "PRECISION": precision, "constant_ptr": None},
        "num_warps": 8,
        "targets": targets,
    }


COMPILE_CASES = [
    _decode_case("k3v3, width 128, RoPE mean", targets=NVIDIA, headline=True),
    _decode_case("k3v3, width 128, portable", targets=AMD, headline=True),
    _decode_case("k3v3, width 128, static mean", mean="static", targets=NVIDIA),
    _decode_case("k3v3, width 128, static mean, sign", mean="static", residual="sign"),
    _decode_case("k3v3, width 128, static mean, qjl", mean="static", residual="qjl"),
    _decode_case("k3v3, width 128, static mean, window", mean="static", window=1024),
    _decode_case("k3v3, width 128, RoPE mean, in blocks", in_blocks=True, targets=NVIDIA),
    _decode_case("k3v3, width 64, in blocks, portable", width=64, in_blocks=True, targets=AMD),
    _decode_case("k3v3, width 128, static mean, 16 rows", mean="static", rows=16),
    _decode_case("k3v3, width 128, RoPE mean, 16 rows", rows=16),
    _decode_case("k3v3, width 128, RoPE mean, fp32", exact=True, targets=("sm_90", *SMALL)),
    _decode_case(
        "k4v4, width 128, RoPE mean, qjl, 16 rows, fp32",
        bits=(4, 4),
        residual="qjl",
        rows=16,
        exact=True,
        targets=SMALL,
    ),
    _decode_case("k3v3, width 256, RoPE mean, fp32", width=256, exact=True, targets=SMALL),
    _decode_case(
        "k3v3, width 256, RoPE mean, 16 rows, fp32",
        width=256,
        rows=16,
        exact=True,
        targets=("sm_80", *SMALL),
    ),
    _decode_case(
        "k4v4, width 256, RoPE mean, qjl, fp32",
        width=256,
        bits=(4, 4),
        residual="qjl",
        exact=True,
        targets=SMALL,
    ),
    _decode_case(
        "k4v4, width 256, RoPE mean, qjl, 16 rows",
        width=256,
        bits=(4, 4),
        residual="qjl",
        rows=16,
        targets=SMALL,
    ),
    _decode_case("k4v3, width 128, RoPE mean", bits=(4, 3)),
    _decode_case("k4v2, width 128, RoPE mean", bits=(4, 2)),
    _decode_case("k8v3, width 128, RoPE mean", bits=(8, 3)),
    _decode_case("k5v5, width 128, RoPE mean", bits=(5, 5)),
    _decode_case("k3v3, width 64, static mean", width=64, mean="static"),
    _decode_case("k3v3, width 64, RoPE mean", width=64, targets=NVIDIA),
    _decode_case("k3v3, width 80, RoPE mean", width=80),
    _decode_case("k3v3, width 96, RoPE mean", width=96),
    _decode_case("k3v3, width 256, RoPE mean", width=256, targets=("sm_90", *SMALL)),
    _turn_case("width 128, RoPE mean, bf16"),
    _turn_case("width 128, RoPE mean, bf16, portable", targets=AMD),
    _turn_case(
        "width 256, RoPE mean, qjl, fp32", width=256, residual="qjl", exact=True, targets=SMALL
    ),
    _turn_case("width 64, static mean, bf16", width=64, mean="static", targets=("sm_90",)),
    _merge_case(),
    _merge_case(targets=AMD),
    _merge_case(rows=16, targets=("sm_90", *SMALL)),
    _merge_case(width=256, rows=8, targets=("sm_90", *SMALL)),
]
