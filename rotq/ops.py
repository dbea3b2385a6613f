"""The operators rotq uses from ``rotq_kernels``; no other module imports that package."""

from rotq_kernels.layout import pack, packed_words, unpack

__all__ = ["pack", "packed_words", "unpack"]
