"""A safetensors file that is not believed: header bounded, tensors looked at before they are read.

What the file says of itself is one JSON object, the facts. A tensor is read when the caller has
said which type and shapes it may have, so that nothing of another size is ever held.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rotq.errors import RotqError, reason, told

KIND = "rotq-kv-calibration"
"""The key of the facts among the file's metadata."""

HEADER_LIMIT = 16_000_000
"""Bytes; a header of a thousand layers has 3 MB."""

_NAMES = {torch.float32: "F32", torch.int8: "I8"}
"""As safetensors spells the types that rotq writes."""


class StoredFile:
    """An open file.

    Args:
        opened: By the library.
        facts: What it says of itself.
    """

    def __init__(self, opened: Any, facts: dict[str, Any]) -> None:
        self.facts = facts
        self._opened = opened
        self._left = set(opened.keys())

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def tensor(self, name: str, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Read a tensor, once.

        Args:
            name: In the file.
            dtype: fp32 or int8.
            shapes: Those it may have.

        Raises:
            ValueError: it is missing, of another type or shape, or holds what is not finite.
        """
        if name not in self._left:
            raise ValueError(f"{name} is missing")
        self._left.remove(name)
        found = self._opened.get_slice(name)
        shape = tuple(found.get_shape())
        if found.get_dtype() != _NAMES[dtype] or shape not in shapes:
            allowed = " or ".join(map(str, dict.fromkeys(shapes)))
            raise ValueError(
                f"{name} is {found.get_dtype()} {shape}, not {_NAMES[dtype]} {allowed}"
            )
        tensor: Tensor = self._opened.get_tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite")
        return tensor

    def check_all_read(self) -> None:
        """Refuse what belongs to nothing that was asked for; ValueError."""
        if self._left:
            raise ValueError(f"{min(self._left)!r} belongs to no layer")


@contextmanager
def opened(path: Path) -> Iterator[StoredFile]:
    """A file of ``KVCalibration.save``, as far as its header says.

    Raises:
        RotqError: missing, unreadable, truncated or of another kind, also while it is open.
    """
    if not path.is_file():
        problem = f"cannot read {path}: it is no plain file"
        raise RotqError(problem if path.exists() else f"{path}: no such file")
    with told(f"cannot read {path}"), _opened(path) as file:
        text = (file.metadata() or {}).get(KIND)
        if text is None:
            raise RotqError(f"{path} is not a file of rotq calibrate-kv")
        yield StoredFile(file, _facts(path, text))


def empty_or_ours(path: Path) -> bool:
    """Whether a file is empty, or one of ``KVCalibration.save`` as far as its header says."""
    try:
        with told(f"cannot read {path}"):
            if not path.stat().st_size:
                return True
            with _opened(path) as file:
                return KIND in (file.metadata() or {})
    except RotqError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER_LIMIT:
        raise ValueError(f"a header of {length} bytes")
    with safe_open(path, framework="pt") as tensors:
        yield tensors


def _facts(path: Path, text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RotqError(f"{path} is damaged: its facts are not JSON: {reason(error)}") from None
    if not isinstance(facts, dict):
        raise RotqError(f"{path} is damaged: its facts are no JSON object")
    return facts
