"""The checkpoint that a job reads: its config, and its tensors one at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotq.checkpoint.files import read_json
from rotq.checkpoint.gguf import convert, find_gguf
from rotq.checkpoint.safetensors import Entry, read_bytes, read_entries
from rotq.errors import RotqError
from rotq.models.sizes import check_counts

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dense checkpoint, opened by ``open_source``."""

    path: Path
    """The folder that holds it."""
    config: PretrainedConfig
    entries: dict[str, Entry]
    """By our name of the tensor."""
    transposed: str = ""
    """Regular expression of the names whose tensors are stored as (in, out)."""

    @property
    def dtype(self) -> torch.dtype:
        """The config's dtype; without one, that of the first floating-point tensor."""
        import torch

        declared = getattr(self.config.get_text_config(), "dtype", None) or self.config.dtype
        if isinstance(declared, str):
            declared = getattr(torch, declared)
        if isinstance(declared, torch.dtype):
            return declared
        floats = (
            e.dtype for e in self.entries.values() if e.dtype in ("F64", "F32", "F16", "BF16")
        )
        return torch_dtype(next(floats, "F32"))

    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self.entries)

    def load(self, name: str) -> Tensor:
        """Copy a tensor out of its file; stored dtype, on the CPU.

        Raises:
            RotqError: no such tensor, the file is truncated, or a value is NaN or infinite.
        """
        if name not in self.entries:
            raise RotqError(f"{self.path} has no tensor {name}")
        tensor = read_tensor(self.entries[name])
        if tensor.is_floating_point() and tensor.numel() and not _all_finite(tensor):
            raise RotqError(f"{self.entries[name].file}: {name} holds NaN or infinite values")
        if self.transposed and re.search(self.transposed, name):
            tensor = tensor.T.contiguous()
        return tensor

    def renamed(self, renames: Iterable[tuple[str, str]], transposed: str = "") -> Source:
        """The same checkpoint under other tensor names.

        Args:
            renames: Pairs of a regular expression and its replacement, as for ``re.sub``, applied
                in order.
            transposed: Regular expression of new names; ``load`` transposes what they name.

        Raises:
            RotqError: two tensors end up with one name.
        """
        entries: dict[str, Entry] = {}
        rules = [(re.compile(pattern), replacement) for pattern, replacement in renames]
        for name, entry in self.entries.items():
            new = name
            for pattern, replacement in rules:
                new = pattern.sub(replacement, new)
            if new in entries:
                raise RotqError(f"{entries[new].name} and {name} would both be read as {new}")
            entries[new] = entry
        return dataclasses.replace(self, entries=entries, transposed=transposed)

    def stored_name(self, name: str) -> str:
        """The checkpoint's own name for one of our tensors, also for one made of its weight.

        Mixtral's ``model.layers.0.mlp.experts.3.up_proj.weight_packed`` is
        ``model.layers.0.block_sparse_moe.experts.3.w3.weight_packed``.
        """
        layer, _, leaf = name.rpartition(".")
        if name in self.entries:
            return self.entries[name].name
        if f"{layer}.weight" in self.entries:
            return self.entries[f"{layer}.weight"].name.removesuffix("weight") + leaf
        return name

    def fingerprint(self) -> str:
        """SHA-256 of the config and the weights, as hex; the files are read once per Source."""
        return self._fingerprint

    def tokenizer_files(self) -> list[Path]:
        """The files a tokenizer is made of, as far as they are there."""
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        files = {entry.file for entry in self.entries.values()} | {self.path / "config.json"}
        for path in sorted(files):
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name} {content}\n".encode())
        return digest.hexdigest()


def open_source(
    path: Path, *, gguf_dir: Path | None = None, trust_remote_code: bool = False
) -> Source:
    """Open a dense checkpoint.

    Args:
        path: Folder with config.json and safetensors files, or a folder that holds one .gguf
            file, or that file.
        gguf_dir: Where a .gguf file is converted to; needed for one. An earlier conversion of the
            same file is taken as it is.
        trust_remote_code: Let transformers run the checkpoint's own code for its config.

    Raises:
        RotqError: missing folder, config, shard or tensor; corrupt or truncated file; weights that
            are not safetensors; a checkpoint that is already quantized.
    """
    if not path.exists():
        raise RotqError(f"{path} does not exist; rotq reads local folders only")
    gguf = find_gguf(path)
    if gguf is not None:
        if gguf_dir is None:
            raise RotqError(f"{gguf} must be converted first, and no folder for that was given")
        path = convert(gguf, gguf_dir)
    if not (path / "config.json").is_file():
        raise RotqError(f"{path} has no config.json")
    declared = read_json(path / "config.json")
    if declared.get("quantization_config"):
        method = declared["quantization_config"].get("quant_method", "unknown")
        raise RotqError(f"{path} is already quantized ({method}); a dense checkpoint is needed")
    config = load_config(path, trust_remote_code=trust_remote_code)
    return Source(path=path, config=config, entries=_find_entries(path))


def describe_source(path: Path, *, trust_remote_code: bool = False) -> Source:
    """A checkpoint's config without its tensors, for estimates; nothing is converted.

    Raises:
        RotqError: as ``open_source``, as far as the config shows it.
    """
    if not path.exists():
        raise RotqError(f"{path} does not exist; rotq reads local folders only")
    gguf = find_gguf(path)
    if gguf is None:
        return open_source(path, trust_remote_code=trust_remote_code)
    config = load_config(gguf.parent, gguf_file=gguf.name)
    config.dtype = "float32"
    return Source(path=gguf.parent, config=config, entries={})


def load_config(
    path: Path, *, trust_remote_code: bool = False, gguf_file: str | None = None
) -> PretrainedConfig:
    """The transformers config of a folder, or of a .gguf file in it.

    Raises:
        RotqError: transformers does not know the model type, or cannot read the config.
    """
    from transformers import AutoConfig

    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    if (path / "config.json").is_file():
        check_counts(read_json(path / "config.json"), path / "config.json")
    try:
        return AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True, **gguf
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise RotqError(f"{path / (gguf_file or 'config.json')}: {first_line}") from error


def find_entries(path: Path) -> list[Entry]:
    """Every tensor of a checkpoint folder.

    Raises:
        RotqError: no safetensors weights, a shard of the index is missing or lacks a tensor.
    """
    index = path / INDEX_NAME
    if not index.is_file():
        single = path / "model.safetensors"
        if not single.is_file():
            raise RotqError(f"{path} has no model.safetensors and no {INDEX_NAME}{_other(path)}")
        return read_entries(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RotqError(f"{index} has no weight_map")
    entries: dict[str, Entry] = {}
    for file_name in sorted(set(weight_map.values())):
        if not (path / file_name).is_file():
            raise RotqError(f"{path} lacks the shard {file_name}, which its index names")
        entries.update({entry.name: entry for entry in read_entries(path / file_name)})
    for name, file_name in weight_map.items():
        if name not in entries:
            raise RotqError(f"{path / file_name} lacks the tensor {name}, which the index names")
    return list(entries.values())


def read_tensor(entry: Entry) -> Tensor:
    """Copy one tensor out of its file, unchecked."""
    import torch

    tensor = torch.empty(entry.num_bytes, dtype=torch.uint8)
    read_bytes(entry, tensor.numpy().data)
    return tensor.view(torch_dtype(entry.dtype)).view(entry.shape)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }[name]


def _find_entries(path: Path) -> dict[str, Entry]:
    entries = {entry.name: entry for entry in find_entries(path)}
    for name, entry in entries.items():
        if entry.dtype.startswith("F8"):
            raise RotqError(f"{entry.file}: {name} is {entry.dtype}; a dense checkpoint is needed")
    return dict(sorted(entries.items()))


def _other(path: Path) -> str:
    pickled = sorted([*path.glob("pytorch_model*.bin"), *path.glob("*.pth")])
    return f"; {pickled[0].name} must be converted to safetensors first" if pickled else ""


def _all_finite(tensor: Any) -> bool:
    low, high = tensor.aminmax()
    return bool(low.isfinite()) and bool(high.isfinite())
