"""The safetensors file format, read and written by bytes.

    8 bytes      length of the header, little-endian
    header       JSON: name -> {dtype, shape, data_offsets}; spaces fill it to a multiple of 8
    data         tensors without gaps, offsets counted from its start

Reading by offset copies a tensor out of the file without mapping it, so that the pages do not
count as memory of the process; merging files moves bytes without building tensors. The library
``safetensors`` does neither. Files written here are byte for byte repeatable: wide types come
first, which keeps every tensor aligned, then names in order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from rotq.disk.files import whole_file
from rotq.errors import RotqError

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
HEADER_LIMIT = 32_000_000
"""Bytes; a header of 100,000 tensors has 14 MB."""
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of a file: its type, shape and place."""

    name: str
    file: Path
    dtype: str
    """As the header spells it, a key of ``ITEM_BYTES``."""
    shape: tuple[int, ...]
    start: int
    """Bytes from the start of the file."""
    num_bytes: int


def read_entries(path: Path) -> list[Entry]:
    """The tensors of a file, checked against its size, in the order of their offsets.

    Raises:
        RotqError: missing or unreadable; header not valid; data truncated, overlapping or longer
            than the tensors.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = _read_header(path, file, size)
    except OSError as error:
        raise RotqError(f"cannot read {path}: {error.strerror or error}") from error
    data_start = header.data_start
    entries = [
        _entry(path, name, fields, data_start)
        for name, fields in header.fields.items()
        if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
    end = data_start
    for entry in entries:
        if entry.start != end:
            raise RotqError(f"{path} is corrupt: {entry.name} starts at the wrong offset")
        end += entry.num_bytes
    if end != size:
        kind = "truncated" if size < end else "corrupt"
        raise RotqError(f"{path} is {kind}: {size} bytes, its header says {end}")
    return entries


def read_bytes(entry: Entry, into: memoryview) -> None:
    """Fill ``into``, ``entry.num_bytes`` long, from the file; nothing of it stays mapped.

    Raises:
        RotqError: unreadable, or the file became shorter.
    """
    done = 0
    try:
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.start)
            while done < entry.num_bytes:
                count = file.readinto(into[done : done + CHUNK_BYTES])
                if not count:
                    raise RotqError(f"{entry.file} is truncated: {entry.name} is cut off")
                done += count
    except OSError as error:
        raise RotqError(f"cannot read {entry.file}: {error.strerror or error}") from error


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    write: Callable[[BinaryIO], None]
    """Writes exactly ``num_bytes`` bytes to the file."""


def write_parts(path: Path, parts: Sequence[Part], metadata: dict[str, str]) -> None:
    """Write one file, whole or not at all.

    Raises:
        RotqError: it cannot be written.
    """
    parts = sorted(parts, key=lambda part: (-ITEM_BYTES[part.dtype], part.name))
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for part in parts:
        offsets = [offset, offset + part.num_bytes]
        fields[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": offsets}
        offset += part.num_bytes
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with whole_file(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for part in parts:
            part.write(file)


def copy_part(entry: Entry) -> Part:
    """The part that copies ``entry``'s bytes."""

    def write(out: BinaryIO) -> None:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.num_bytes)))
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.start)
            left = entry.num_bytes
            while left:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise RotqError(f"{entry.file} is truncated: {entry.name} is cut off")
                out.write(buffer[:count])
                left -= count

    return Part(
        name=entry.name,
        dtype=entry.dtype,
        shape=entry.shape,
        num_bytes=entry.num_bytes,
        write=write,
    )


@dataclass(frozen=True)
class _Header:
    fields: dict[str, dict[str, object]]
    data_start: int


def _read_header(path: Path, file: BinaryIO, size: int) -> _Header:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > HEADER_LIMIT or 8 + length > size:
        raise RotqError(f"{path} is not a safetensors file, or is truncated in its header")
    try:
        fields = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise RotqError(f"{path} is corrupt: its header is not JSON") from error
    if not isinstance(fields, dict):
        raise RotqError(f"{path} is corrupt: its header is not a JSON object")
    return _Header(fields, 8 + length)


def _entry(path: Path, name: str, fields: object, data_start: int) -> Entry:
    if isinstance(fields, dict) and isinstance(fields.get("dtype"), str):
        dtype = fields["dtype"]
        if dtype not in ITEM_BYTES:
            raise RotqError(f"{path}: {name} is stored as {dtype}, which rotq cannot read")
    try:
        dtype, shape = fields["dtype"], tuple(fields["shape"])  # type: ignore[index]
        start, end = fields["data_offsets"]  # type: ignore[index]
        num_bytes = ITEM_BYTES[dtype] * prod(shape)
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise RotqError(f"{path} is corrupt: the header's entry for {name} is not valid") from error
    if not whole or end - start != num_bytes:
        raise RotqError(f"{path} is corrupt: the header's entry for {name} does not add up")
    return Entry(
        name=name,
        file=path,
        dtype=dtype,
        shape=shape,
        start=data_start + start,
        num_bytes=num_bytes,
    )
