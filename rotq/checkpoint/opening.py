"""A checkpoint opened for a job: found, converted where it is a GGUF file, and looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rotq.checkpoint.configuration import (
    checkpoint_dtype,
    declares_dtype,
    load_config,
)
from rotq.checkpoint.files import read_json
from rotq.checkpoint.gguf import convert, find_gguf
from rotq.checkpoint.location import Location, ModelName, locate
from rotq.checkpoint.safetensors import Entry
from rotq.checkpoint.source import Source
from rotq.checkpoint.weight_files import find_entries
from rotq.errors import RotqError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def open_source(
    model: ModelName, *, gguf_dir: Path | None = None, trust_remote_code: bool = False
) -> Source:
    """Open a dense checkpoint.

    Args:
        model: Folder with config.json and safetensors files, or a folder that holds one .gguf
            file, or that file; or a hub id, whose weights are fetched.
        gguf_dir: Where a .gguf file is converted to; needed for one. An earlier conversion of the
            same file is taken as it is.
        trust_remote_code: Let transformers run the checkpoint's own code for its config.

    Raises:
        RotqError: missing folder, config, shard or tensor; corrupt or truncated file; weights that
            are not safetensors; a checkpoint that is already quantized; or see ``locate``.
    """
    found = locate(model)
    path, gguf = found.path, find_gguf(found.path)
    if gguf is not None:
        if gguf_dir is None:
            raise RotqError(f"{gguf} must be converted first, and no folder for that was given")
        path = convert(gguf, gguf_dir)
    config = _dense_config(path, trust_remote_code)
    if gguf is None:
        found.fetch_weights()
    source = _opened(found, path, config, find_entries(path))
    return source if gguf is None else replace(source, quantized_bytes=gguf.stat().st_size)


def describe_source(model: ModelName, *, trust_remote_code: bool = False) -> Source:
    """A checkpoint as far as it is known before long work: for estimates, and to refuse it.

    A GGUF file is not converted, and has no tensors then. Of the hub's weights that are not here
    yet the headers are read, and their tensors cannot be loaded.

    Raises:
        RotqError: as ``open_source``, as far as config and headers show it.
    """
    found = locate(model)
    gguf = find_gguf(found.path)
    if gguf is not None:
        config = load_config(gguf.parent, gguf_file=gguf.name)
        config.dtype = "float32"
        return Source(
            path=gguf.parent,
            config=config,
            entries={},
            hub=found.hub,
            quantized_bytes=gguf.stat().st_size,
        )
    if found.is_complete:
        return open_source(found, trust_remote_code=trust_remote_code)
    config = _dense_config(found.path, trust_remote_code)
    return _opened(found, found.path, config, found.remote_entries())


def _dense_config(path: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration, of a dense checkpoint alone."""
    if not (path / "config.json").is_file():
        raise RotqError(f"{path} has no config.json")
    declared = read_json(path / "config.json").get("quantization_config")
    if declared:
        method = declared.get("quant_method") if isinstance(declared, dict) else declared
        raise RotqError(
            f"{path} is already quantized ({str(method)[:80]}); a dense checkpoint is needed"
        )
    return load_config(path, trust_remote_code=trust_remote_code)


def _opened(
    found: Location, path: Path, config: PretrainedConfig, entries: Iterable[Entry]
) -> Source:
    by_name = {entry.name: entry for entry in entries}
    for name, entry in by_name.items():
        if entry.dtype.startswith("F8"):
            raise RotqError(f"{entry.file}: {name} is {entry.dtype}; a dense checkpoint is needed")
    if config.dtype is None and not declares_dtype(path):
        config.dtype = checkpoint_dtype(config, by_name.values(), path)
    return Source(path=path, config=config, entries=dict(sorted(by_name.items())), hub=found.hub)
