"""The operators rotq uses from ``rotq_kernels``; no other module imports that package."""

from rotq_kernels.kv_format import (
    STEPS_PER_OCTAVE,
    TABLE_BITS,
    DenseKV,
    KVFormat,
    KVPages,
    KVTransform,
    SideTransform,
    decode_norm,
    encode_norm,
    level_values,
)
from rotq_kernels.layout import pack, pack_kv, packed_words, unpack, unpack_kv

__all__ = [
    "STEPS_PER_OCTAVE",
    "TABLE_BITS",
    "DenseKV",
    "KVFormat",
    "KVPages",
    "KVTransform",
    "SideTransform",
    "decode_norm",
    "encode_norm",
    "level_values",
    "pack",
    "pack_kv",
    "packed_words",
    "unpack",
    "unpack_kv",
]
