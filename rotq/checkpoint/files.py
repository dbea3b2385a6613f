"""Text and JSON on the disk; what is written is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rotq.disk.files import whole_file
from rotq.errors import RotqError

LIMIT_BYTES = 1 << 26
"""Of a JSON file; the index of a thousand shards has some MB."""


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text through ``whole_file``."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON with an indent of 2, keys as ordered in ``value``."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RotqError: missing, unreadable, or not a JSON object.
    """
    try:
        if path.stat().st_size > LIMIT_BYTES:
            raise RotqError(f"{path} is larger than {LIMIT_BYTES} bytes: no checkpoint's file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RotqError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RotqError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RotqError(f"{path} is not a JSON object")
    return value
