"""The packed KV cache: how keys and values are coded, calibrated, stored and attended to."""

from typing import Any


def __getattr__(name: str) -> Any:
    """``rotq.kv.PackedCache``, imported when asked for: presets need no torch."""
    if name == "PackedCache":
        from rotq.kv.cache.packed_cache import PackedCache

        return PackedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
