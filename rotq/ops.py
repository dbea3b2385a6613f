"""The operators rotq uses from ``rotq_kernels``; no other module imports that package.

No Triton is imported before a tensor on a GPU needs it.
"""

from rotq_kernels.hadamard import hadamard, hadamard_reference
from rotq_kernels.kv.attention import packed_attention
from rotq_kernels.kv.encode.one_side import (
    dequantize_residual,
    dequantize_side,
    key_mean,
    quantize_residual,
    quantize_side,
    turned_mean,
)
from rotq_kernels.kv.encode.reference import (
    dequantize_kv_reference,
    encode_kv_reference,
    write_tokens,
)
from rotq_kernels.kv.encoding import encode_kv
from rotq_kernels.kv.format import (
    STEPS_PER_OCTAVE,
    TABLE_BITS,
    DenseKV,
    Extent,
    KVConstants,
    KVFormat,
    KVHistory,
    KVPages,
    SideConstants,
    decode_norm,
    encode_norm,
    level_values,
)
from rotq_kernels.kv.prefill.whole import WHOLE_TOKENS
from rotq_kernels.launching import TritonMissing, is_native
from rotq_kernels.layout import pack, pack_kv, packed_words, unpack, unpack_kv
from rotq_kernels.packed_linear import dequantize_reference as dequantize_weight
from rotq_kernels.packed_linear import packed_linear
from rotq_kernels.rounding.native import (
    NATIVE_FROM,
    best_candidates,
    refine_block,
    round_block,
    rounds_natively,
    searches_natively,
    unpacked_levels,
)
from rotq_kernels.rounding.two_sided import refine_column, round_column
from rotq_kernels.trellis.code import check_ring, path_levels, ring_rows
from rotq_kernels.trellis.linear import dequantize_paths, packed_levels, trellis_linear
from rotq_kernels.trellis.search import search_paths
from rotq_kernels.trellis.tiles import (
    from_rings,
    pack_tiles,
    search_tiles,
    tile_levels,
    tile_weight,
    to_rings,
)

__all__ = [
    "NATIVE_FROM",
    "STEPS_PER_OCTAVE",
    "TABLE_BITS",
    "WHOLE_TOKENS",
    "DenseKV",
    "Extent",
    "KVConstants",
    "KVFormat",
    "KVHistory",
    "KVPages",
    "SideConstants",
    "TritonMissing",
    "best_candidates",
    "check_ring",
    "decode_norm",
    "dequantize_kv_reference",
    "dequantize_paths",
    "dequantize_residual",
    "dequantize_side",
    "dequantize_weight",
    "encode_kv",
    "encode_kv_reference",
    "encode_norm",
    "from_rings",
    "hadamard",
    "hadamard_reference",
    "is_native",
    "key_mean",
    "level_values",
    "pack",
    "pack_kv",
    "pack_tiles",
    "packed_attention",
    "packed_levels",
    "packed_linear",
    "packed_words",
    "path_levels",
    "quantize_residual",
    "quantize_side",
    "refine_block",
    "refine_column",
    "ring_rows",
    "round_block",
    "round_column",
    "rounds_natively",
    "search_paths",
    "search_tiles",
    "searches_natively",
    "tile_levels",
    "tile_weight",
    "to_rings",
    "trellis_linear",
    "turned_mean",
    "unpack",
    "unpack_kv",
    "unpacked_levels",
    "write_tokens",
]
