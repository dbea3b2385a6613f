"""The checkpoint that a job reads: its config, and its tensors one at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotq.checkpoint.companions import companion_files
from rotq.checkpoint.configuration import (
    checkpoint_dtype,
    torch_dtype,
)
from rotq.checkpoint.fit import check_fit, with_tied
from rotq.checkpoint.gguf import STAMP
from rotq.checkpoint.hub import HubModel
from rotq.checkpoint.made_tensors import MadeTensors
from rotq.checkpoint.safetensors import Entry, read_bytes, read_entries
from rotq.disk.files import sha256_of
from rotq.errors import RotqError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

    from rotq.models.conversion import Making
    from rotq.models.skeleton import Skeleton

DECIDING_SUFFIXES = (
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".py",
    ".tiktoken",
    ".spm",
    ".bpe",
    ".vocab",
)
"""Of files that a tokenizer, its templates, the settings or the code of a model are made of."""


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
    makings: Mapping[str, Making] | None = None
    """How the model's tensors are made of ``entries``; None: they are the entries."""
    hub: HubModel | None = None
    """Where it comes from; None for what was here."""
    quantized_bytes: int = 0
    """Of the GGUF file that it was converted from; 0 for none."""

    @property
    def dtype(self) -> torch.dtype:
        """See ``checkpoint_dtype``."""
        return checkpoint_dtype(self.config, self.entries.values(), self.path)

    @property
    def title(self) -> str:
        """The hub's repository, or the folder's name."""
        return self.path.name if self.hub is None else self.hub.name.repo

    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self.entries if self.makings is None else self.makings)

    def load(self, name: str) -> Tensor:
        """A tensor in memory of its own; stored dtype, on the CPU.

        Raises:
            RotqError: no such tensor, the file is truncated, or a value is NaN or infinite.
        """
        if self.makings is None or name not in self.makings:
            return self._stored(name)
        return self._made.tensor(name, self.makings[name], self._stored)

    def _stored(self, name: str) -> Tensor:
        """Copy a tensor out of its file."""
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

    def read_for(self, skeleton: Skeleton) -> Source:
        """The same checkpoint with the tensors that a model has.

        Raises:
            RotqError: a tensor of the model is missing, or has another shape.
        """
        adapter = skeleton.adapter
        renamed = self.renamed(adapter.renames, adapter.transposed)
        makings = with_tied(skeleton.conversion.makings(renamed.entries), skeleton)
        source = dataclasses.replace(renamed, makings=makings)
        if source.entries:
            check_fit(source, skeleton)
        return source

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of ``entries``, as ``load`` gives it."""
        shape = self.entries[name].shape
        return shape[::-1] if self.transposed and re.search(self.transposed, name) else shape

    def stored_name(self, name: str) -> str:
        """The checkpoint's own name for one of our tensors, also for one made of its weight.

        Mixtral's ``model.layers.0.mlp.experts.3.up_proj.weight_packed`` is
        ``model.layers.0.block_sparse_moe.experts.3.w3.weight_packed``.
        """
        layer, _, leaf = name.rpartition(".")
        for ours, end in ((name, ""), (f"{layer}.weight", "weight")):
            stored = self._own_name(ours)
            if stored is not None:
                return stored if not end else stored.removesuffix(end) + leaf
        return name

    def _own_name(self, name: str) -> str | None:
        """The file's name of a tensor that is taken from it as it is; None for any other."""
        if self.makings is None:
            return self.entries[name].name if name in self.entries else None
        stored = self.makings[name].stored if name in self.makings else None
        return None if stored is None else self.entries[stored].name

    def unread(self) -> list[str]:
        """The files' names of tensors that none of the model is made of."""
        makings = {} if self.makings is None else self.makings
        read = {name for making in makings.values() for name in making.group.stored}
        return sorted(entry.name for name, entry in self.entries.items() if name not in read)

    def fingerprint(self) -> str:
        """SHA-256 of the config and the weights, as hex; the files are read once per Source."""
        return self._fingerprint

    def tokenizer_files(self) -> list[Path]:
        """The files that travel with the weights; see ``companions``."""
        return companion_files(self.path)

    def deciding_files(self) -> dict[str, str]:
        """sha256 by name of the files beside config and weights that a job's result depends on.

        Tokenizers are made of files of many names, so all of a kind count; of the hub's those that
        were fetched: what else comes into the cache meanwhile is another program's.
        """
        folders = [self.path, self.path / "additional_chat_templates"]
        files = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
        return {
            file.relative_to(self.path).as_posix(): sha256_of(file)
            for file in sorted(files)
            if file.suffix in DECIDING_SUFFIXES
            and file.is_file()
            and file.name not in ("config.json", STAMP)
            and not file.name.endswith(".index.json")
            and (self.hub is None or self.hub.brings(file))
        }

    @cached_property
    def _made(self) -> MadeTensors:
        return MadeTensors(self.makings or {}, self.path)

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        files = {entry.file for entry in self.entries.values()} | {self.path / "config.json"}
        for path in sorted(files):
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
        return digest.hexdigest()


def read_tensor(entry: Entry) -> Tensor:
    """Copy one tensor out of its file, unchecked."""
    import torch

    tensor = torch.empty(entry.num_bytes, dtype=torch.uint8)
    read_bytes(entry, tensor.numpy().data)
    return tensor.view(torch_dtype(entry.dtype)).view(entry.shape)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Copy all tensors out of a safetensors file, by name, unchecked."""
    return {entry.name: read_tensor(entry) for entry in read_entries(file)}


def _all_finite(tensor: Any) -> bool:
    low, high = tensor.aminmax()
    return bool(low.isfinite()) and bool(high.isfinite())
