"""Writing tensors into safetensors files, and merging such files into a checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rotq.checkpoint.files import write_json
from rotq.checkpoint.safetensors import Entry, Part, copy_part, read_entries, write_parts
from rotq.errors import RotqError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Deferred:
    """A tensor that is loaded when it is written, and held no longer."""

    dtype: torch.dtype
    """As it is written."""
    shape: Sequence[int]
    load: Callable[[], Tensor]


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | Deferred],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``tensors`` into one file, whole or not at all.

    Args:
        tensors: Any device and stride; not modified.
        metadata: Strings for the header, next to ``{"format": "pt"}``.

    Raises:
        RotqError: the file cannot be written (disk full, no permission); nothing is left behind.
    """
    parts = [_tensor_part(name, tensor) for name, tensor in tensors.items()]
    write_parts(path, parts, {**METADATA, **(metadata or {})})


def assemble(
    parts: Sequence[Path],
    out_dir: Path,
    max_shard_bytes: int,
    *,
    rename: Callable[[str], str] | None = None,
) -> list[Path]:
    """Merge safetensors files into ``model.safetensors``, or into shards and their index.

    Bytes are streamed, no tensor is built. Tensors are dealt out in natural order of their names,
    so that the result does not depend on the order of ``parts``; a tensor larger than
    ``max_shard_bytes`` has a shard of its own. ``parts`` stay where they are.

    Args:
        parts: Files whose tensors have different names.
        out_dir: Exists, and holds no other checkpoint.
        max_shard_bytes: Bytes of tensor data in one file.
        rename: From a part's tensor names to the checkpoint's (``Source.stored_name``).

    Returns:
        The files written, the index last.

    Raises:
        ValueError: ``max_shard_bytes`` is not positive.
        RotqError: a part is unreadable or corrupt, a name occurs twice, the disk is full.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    entries: dict[str, Entry] = {}
    for path in parts:
        for entry in read_entries(path):
            if rename is not None:
                entry = dataclasses.replace(entry, name=rename(entry.name))
            if entry.name in entries:
                other = entries[entry.name].file
                raise RotqError(f"{entry.name} is both in {other} and in {path}")
            entries[entry.name] = entry
    shards = _deal([entries[name] for name in sorted(entries, key=_natural)], max_shard_bytes)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_parts(out_dir / name, [copy_part(entry) for entry in shard], METADATA)
    written = [out_dir / name for name in names]
    if len(shards) > 1:
        index = out_dir / "model.safetensors.index.json"
        write_json(index, _index(names, shards))
        written.append(index)
    return written


def _tensor_part(name: str, tensor: Tensor | Deferred) -> Part:
    import torch

    dtypes = {
        torch.float64: "F64",
        torch.int64: "I64",
        torch.float32: "F32",
        torch.int32: "I32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.bool: "BOOL",
    }
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: cannot store {tensor.dtype}")

    def write(out: BinaryIO) -> None:
        found = tensor.load().to(tensor.dtype) if isinstance(tensor, Deferred) else tensor
        flat = found.detach().cpu().contiguous().view(-1)
        out.write(flat.view(torch.uint8).numpy().data)

    return Part(
        name=name,
        dtype=dtypes[tensor.dtype],
        shape=tuple(tensor.shape),
        num_bytes=prod(tensor.shape) * tensor.dtype.itemsize,
        write=write,
    )


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    pieces = re.split(r"(\d+)", name)
    return [(1, int(piece), "") if piece.isdecimal() else (0, 0, piece) for piece in pieces]


def _deal(entries: list[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    return shards


def _index(names: list[str], shards: list[list[Entry]]) -> dict[str, object]:
    files = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    total = sum(entry.num_bytes for shard in shards for entry in shard)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
