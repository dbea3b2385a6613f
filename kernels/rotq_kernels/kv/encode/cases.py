"""What ``compile_check`` compiles of ``encode.kernel``: bf16 keys and values of 2 to 8 bits."""

from typing import Any

from rotq_kernels.kv.encode.kernel import encode_kernel
from rotq_kernels.kv.encode.launch import tile_sizes

GAPS = ("gap_codes", "gap_norm", "gap_sign", "gap_gamma")
"""Of pages in blocks."""


def _case(name: str, head_dim: int = 128, tokens: int = 4096, **changes: Any) -> dict[str, Any]:
    shape = tile_sizes(head_dim, tokens, changes.get("SEARCH", 0))
    num_warps = shape.pop("num_warps")
    constants: dict[str, Any] = {
        "D": head_dim,
        "R": head_dim // 2,
        "BITS": 3,
        "PAGE": 64,
        "NORM": "log8",
        "GAIN": "lsq",
        "RESIDUAL": "none",
        "SEARCH": 0,
        "PRECISION": "ieee",
        **shape,
        **changes,
    }
    norm = "*fp16" if constants["NORM"] == "float16" else "*u8"
    types = {name: "*fp32" for name in encode_kernel.arg_names if name.endswith("_ptr")}
    types |= {"x_ptr": "*bf16", "levels_ptr": "*i8", "norm_ptr": norm, "gamma_ptr": norm}
    types |= dict.fromkeys(("position_ptr", "slot_ptr"), "*i64")
    types |= dict.fromkeys(("codes_ptr", "sign_ptr"), "*i32")
    types |= dict.fromkeys(("stride_b", "stride_h", "stride_t"), "i64")
    types |= {"rotary_scale": "fp32", "num_positions": "i32", "num_tokens": "i32"}
    # launched with None
    fixed: dict[str, Any] = dict.fromkeys(GAPS)
    fixed |= {} if constants["R"] else {"inv_freq_ptr": None}
    if constants["RESIDUAL"] != "qjl":
        fixed |= dict.fromkeys(("sketch_ptr", "gamma_base_ptr", "gamma_ptr"))
    if constants["RESIDUAL"] == "none":
        fixed["sign_ptr"] = None
    if not constants["SEARCH"]:
        fixed["metric_ptr"] = None
    return {
        "name": name,
        "kernel": encode_kernel,
        "types": {name: kind for name, kind in types.items() if name not in fixed},
        "constants": constants | fixed,
        "num_warps": num_warps,
        "enable_fp_fusion": False,
    }


COMPILE_CASES = [
    _case("keys k3 rope D128"),
    _case("values v3 D128", R=0),
    _case("keys k3 rope sign D128", RESIDUAL="sign"),
    _case("keys k3 rope qjl D128", RESIDUAL="qjl"),
    _case("keys k4 rope fp16 norm D128", BITS=4, NORM="float16"),
    _case("keys k8 D128", BITS=8, R=0),
    _case("values v2 D128", BITS=2, R=0),
    _case("keys k3 rope search D128", SEARCH=4),
    _case("keys k3 rope search D64", 64, SEARCH=4),
    _case("keys k3 rope search D256", 256, SEARCH=4),
    _case("keys k3 rope D64", 64),
    _case("keys k3 rope D64, append", 64, tokens=1),
    _case("keys k3 rope D80", 80),
    _case("keys k3 rope D256", 256),
]
