"""What ``compile_check`` compiles of ``dequantize.kernel``: keys and values, to bf16."""

from typing import Any

from rotq_kernels.kv.dequantize.kernel import dequantize_kernel
from rotq_kernels.kv.dequantize.launch import tile_sizes

AMD = ("gfx942",)
NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
SMALL = ("sm_89",)
"""Where shared memory is the least."""

GAPS = ("gap_codes", "gap_norm")
"""Of pages in blocks."""


def _case(
    name: str, D: int = 128, bits: int = 3, *, turns: bool = True, targets: tuple[str, ...] = NVIDIA
) -> dict[str, Any]:
    """Without ``elements``: what it takes is small beside the attention that follows."""
    types = dict.fromkeys(("base_ptr", "inverse_ptr", "mean_ptr"), "*fp32")
    types |= dict.fromkeys(("codes_ptr", "page_table_ptr", "start_ptr"), "*i32")
    types |= {"norm_ptr": "*u8", "out_ptr": "*bf16", "rotary_scale": "fp32"}
    types |= dict.fromkeys(("H", "table_width", "packed", "held", *GAPS), "i32")
    types |= {"table_ptr": "*i32"} if bits <= 4 else {}
    types |= {"inv_freq_ptr": "*fp32"} if turns else {}
    sizes = tile_sizes(D)
    num_stages = sizes.pop("num_stages")
    pointers = [name for name in dequantize_kernel.arg_names if name.endswith("_ptr")]
    constants: dict[str, Any] = {name: None for name in pointers if name not in types}
    constants |= {"D": D, "R": D // 2 if turns else 0, "BITS": bits, "PAGE": 64, **sizes}
    constants |= {"PTX": targets != AMD}
    return {
        "name": name,
        "kernel": dequantize_kernel,
        "types": types,
        "constants": constants,
        "num_stages": num_stages,
        "targets": targets,
        "divisible": GAPS,
        "headline": not turns,
    }


COMPILE_CASES = [
    _case("keys k3 rope D128"),
    _case("keys k3 rope D128, portable", targets=AMD),
    _case("values v3 D128", turns=False, targets=("sm_90", *SMALL)),
    _case("keys k8 rope D64", 64, 8, targets=SMALL),
    _case("keys k4 rope D256", 256, 4, targets=("sm_90", *SMALL)),
]
