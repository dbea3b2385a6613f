"""GGUF files are parsed once for all that is read of them.

transformers parses a file's metadata, with each token of its vocabulary, anew for the
configuration, the tokenizer and the weights, and makes the table of tensor names anew for each
module: seconds each, most of what a small model takes to load.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

_REMEMBERED = ("GGUFReader", "get_tensor_name_map")
"""Of the package ``gguf``: their results depend on nothing but arguments, and are only read."""


@contextmanager
def read_once(*models: Path) -> Iterator[None]:
    """Inside, what transformers has parsed of a GGUF file is remembered, until the outermost end.

    Args:
        models: What will be read. Nothing happens where none of them is a GGUF file, or a folder
            with one.
    """
    if importlib.util.find_spec("gguf") is None or not any(map(_is_gguf, models)):
        yield
        return
    import gguf

    outside = {name: getattr(gguf, name) for name in _REMEMBERED}
    for name, made in outside.items():
        setattr(gguf, name, made if hasattr(made, "cache_clear") else lru_cache(made))
    try:
        yield
    finally:
        for name, made in outside.items():
            setattr(gguf, name, made)


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" or any(path.glob("*.gguf"))
