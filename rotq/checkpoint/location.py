"""Where a checkpoint is: a folder, a GGUF file, or a commit of the hub that is fetched as needed.

    a folder or .gguf file that exists      is taken
    ORG/NAME[@REVISION]                     else from the hub: first what describes the model, its
                                            weights once nothing is left to refuse
    ORG/NAME[@REVISION]/FILE.gguf           from the hub, whole

Every reader takes a name, a path or a ``Location``; ``locate`` makes one of each.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotq.checkpoint.companions import code_names, description_names, has_code, named_names
from rotq.checkpoint.gguf import find_gguf
from rotq.checkpoint.hub import HubModel, HubName, find_commit
from rotq.checkpoint.safetensors import Entry
from rotq.checkpoint.weight_files import leading_name, pickled_name, shard_names
from rotq.errors import RotqError

_STAMPED = (".safetensors", ".gguf", ".bin", ".json")


@dataclass(frozen=True, kw_only=True)
class Location:
    """A checkpoint that was found."""

    name: str
    """As it was given."""
    path: Path
    """The folder, or the .gguf file."""
    hub: HubModel | None = None
    """Where it is fetched from; None for what was here."""

    def __str__(self) -> str:
        return self.name

    @property
    def title(self) -> str:
        """What it is called where nothing else is said: the repository, or the folder's name."""
        return self.path.absolute().name if self.hub is None else self.hub.name.repo

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file is read."""
        return find_gguf(self.path) is not None

    @property
    def is_complete(self) -> bool:
        """Whether the weights are here."""
        return self.hub is None or not self.hub.missing(self._weights())

    def stamp(self) -> list[Any]:
        """What tells it from others, and from itself after a change: commit, or names and times."""
        if self.hub is not None:
            return [str(self.hub)]
        files = [self.path] if self.path.is_file() else sorted(self.path.iterdir())
        found = [(file.name, file.stat()) for file in files if file.suffix in _STAMPED]
        times = [(name, status.st_size, status.st_mtime_ns) for name, status in found]
        return [str(self.path.resolve()), *times]

    def fetch_weights(self, *, pickled: bool = False) -> None:
        """Bring the files of the format that will be read; nothing else.

        Args:
            pickled: pytorch_model.bin will do, where there is nothing else.

        Raises:
            RotqError: see ``HubModel.fetch``.
        """
        if self.hub is not None:
            self.hub.fetch(self._weights(pickled=pickled))

    def remote_entries(self) -> list[Entry]:
        """The tensors of weights that are not here, by the headers of their files.

        Raises:
            RotqError: the hub cannot be reached, or has no safetensors.
        """
        assert self.hub is not None
        names = self._weights()
        missing = self.hub.missing(names)
        if missing and self.hub.unreached:
            self.hub.fetch(names)  # which says that it cannot
        return [entry for name in names for entry in self.hub.entries(name)]

    def _weights(self, *, pickled: bool = False) -> list[str]:
        """Names of the weight files that will be read."""
        assert self.hub is not None
        if self.path.is_file():
            return [self.path.relative_to(self.hub.folder).as_posix()]
        name = leading_name(self.path, self.hub.sizes)
        if name is None and pickled:
            name = pickled_name(self.hub.sizes)
        if name is None:
            raise RotqError(f"{self} has no model.safetensors{_instead(self.hub)}")
        if not name.endswith(".index.json"):
            return [name]
        self.hub.fetch([name])
        return shard_names(self.path / name)


ModelName = str | os.PathLike[str] | Location
"""How a checkpoint is named."""


def locate(model: ModelName) -> Location:
    """Find a checkpoint; of the hub's, what describes it is fetched.

    Raises:
        RotqError: there is none of the name, here or on the hub; or see ``HubModel.fetch``.
    """
    if isinstance(model, Location):
        return model
    name = os.fspath(model)
    path = Path(name)
    if path.exists():
        return Location(name=name, path=path)
    wanted = HubName.parse(name)
    if wanted is None:
        raise RotqError(
            f"{name} does not exist: it is no folder and no .gguf file here, and no hub id "
            "ORG/NAME[@REVISION]"
        )
    hub = find_commit(wanted)
    return Location(name=name, path=_describe(hub), hub=hub)


def _describe(hub: HubModel) -> Path:
    """Fetch what is needed to know a model; returns the folder, or the GGUF file, that is whole."""
    gguf = _gguf_name(hub)
    if gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise RotqError(f"{hub.name}: reading {gguf} needs: pip install 'rotq[gguf]'")
        hub.fetch([gguf], revision=hub.name.revision or "main")
        return hub.folder / gguf
    names = description_names(hub.sizes)
    if "config.json" not in names:
        raise RotqError(f"{hub.name} has no config.json{_instead(hub)}")
    hub.fetch(names, revision=hub.name.revision or "main")
    if has_code(hub.folder, hub.sizes):
        hub.fetch(code_names(hub.sizes))
        hub.fetch(named_names(hub.folder, hub.sizes))
    return hub.folder


def _gguf_name(hub: HubModel) -> str | None:
    """The .gguf file that is meant; None for a folder's model."""
    if hub.name.file is not None:
        return hub.name.file
    found = sorted(name for name in hub.sizes if name.endswith(".gguf"))
    if "config.json" in hub.sizes or not found:
        return None
    if len(found) > 1:
        shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        raise RotqError(
            f"{hub.name} has {len(found)} .gguf files; name one, as {hub.name}/{found[0]}: {shown}"
        )
    return found[0]


def _instead(hub: HubModel) -> str:
    """What a repository has in place of what is looked for."""
    gguf = sorted(name for name in hub.sizes if name.endswith(".gguf"))
    if gguf:
        return f"; name a .gguf file of it, as {hub.name}/{gguf[0]}"
    pickled = pickled_name(hub.sizes)
    return f"; {pickled} must be converted to safetensors first" if pickled else ""
