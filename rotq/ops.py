"""The operators rotq uses from ``rotq_kernels``; no other module imports that package."""

from rotq_kernels.layout import pack, pack_kv, packed_words, unpack, unpack_kv

__all__ = ["pack", "pack_kv", "packed_words", "unpack", "unpack_kv"]
