"""Models of the Hugging Face hub: one commit of a repository, in huggingface_hub's own cache.

huggingface_hub does the work: its cache, token, progress bars and environment variables
(``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ...) are the ones in force. A file is there under
its name once it is whole; one that breaks off is continued a few times, and else not there.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rotq.checkpoint.hub_errors import hub_errors, is_unreachable
from rotq.checkpoint.safetensors import Entry
from rotq.errors import RotqError

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})"
    r"(?:@(?P<revision>refs/[\w.-]+/[^/@]+|[^@]+?))?"
    r"(?:/(?P<file>[^@]+\.gguf))?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class HubName:
    """``ORG/NAME[@REVISION][/FILE.gguf]``."""

    repo: str
    revision: str | None = None
    """Branch, tag or commit; None is the main branch."""
    file: str | None = None
    """A .gguf file of the repository."""

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """None where a name is spelled otherwise."""
        found = _NAME.fullmatch(name)
        if found is None or ".." in found["repo"] or "--" in found["repo"]:
            return None
        return cls(**found.groupdict())

    def __str__(self) -> str:
        """The repository and its revision."""
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """One commit of a repository, from ``find_commit``."""

    name: HubName
    commit: str
    """In full, 40 digits."""
    folder: Path
    """Of the commit in the cache; its files are links."""
    sizes: Mapping[str, int]
    """Bytes by name of the commit's files; where the hub was not reached, of those in the cache."""
    unreached: str = ""
    """Why the hub was not asked, in words; empty where it was."""
    fetched: list[str] = field(default_factory=list)
    """Names of the files that ``fetch`` has brought."""
    asked: set[str] = field(default_factory=set)
    """Names of all that ``fetch`` was asked for."""

    def __str__(self) -> str:
        return f"{self.name.repo}@{self.commit}"

    @property
    def storage(self) -> Path:
        """The repository's folder in the cache, which the links of ``folder`` do not leave."""
        return self.folder.parents[1]

    def brings(self, file: Path) -> bool:
        """Whether a file of ``folder`` is one that ``fetch`` was asked for."""
        return file.relative_to(self.folder).as_posix() in self.asked

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those that are not in the cache."""
        return [name for name in names if not (self.folder / name).is_file()]

    def fetch(self, names: Collection[str], *, revision: str | None = None) -> None:
        """Bring files into the cache, where they are not there.

        Args:
            names: Of the commit.
            revision: The branch or tag that led to the commit; the cache remembers where.

        Raises:
            RotqError: the repository lacks one, or none is in the cache and the hub cannot be
                reached, refuses or breaks off; the disk has no room for them.
        """
        self.asked.update(names)
        missing = self.missing(names)
        unknown = [name for name in missing if name not in self.sizes]
        if unknown and not self.unreached:
            raise RotqError(f"{self} has no file {unknown[0]}")
        if missing and self.unreached:
            raise RotqError(f"{self}: {missing[0]} is not in the cache, and {self.unreached}")
        if not missing and (revision is None or self.unreached):
            return
        self._check_room(missing)
        self._download(names, revision or self.commit)
        if self.missing(names):  # the branch has moved on since it was looked up
            self._download(names, self.commit)
        self._check_whole(missing)
        self.fetched.extend(missing)

    def account(self) -> str:
        """What was fetched and what was not, in a line."""
        num_bytes = sum(self.sizes[name] for name in self.fetched)
        names = ", ".join(sorted(self.fetched)) or "nothing"
        rest = sum(self.sizes[name] for name in self.missing(self.sizes))
        return (
            f"{self.name}: fetched {names} ({num_bytes / 1e6:.1f} MB); of its {rest / 1e9:.2f} GB "
            "of other files at most the headers of weights"
        )

    def entries(self, name: str) -> list[Entry]:
        """Tensors of a safetensors file, by its header alone; their bytes are not here.

        Raises:
            RotqError: the hub cannot be reached, or the header is not valid.
        """
        from huggingface_hub import HfApi

        with hub_errors(f"{self.name}", self.name.repo):
            found = HfApi().parse_safetensors_file_metadata(
                self.name.repo, name, revision=self.commit
            )
        return [
            Entry(
                name=tensor,
                file=self.folder / name,
                dtype=told.dtype,
                shape=tuple(told.shape),
                start=told.data_offsets[0],
                num_bytes=told.data_offsets[1] - told.data_offsets[0],
            )
            for tensor, told in found.tensors.items()
        ]

    def _download(self, names: Collection[str], revision: str) -> None:
        from huggingface_hub import snapshot_download

        with hub_errors(f"{self.name}", self.name.repo):
            snapshot_download(
                self.name.repo,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in names],
                library_name="rotq",
            )

    def _check_whole(self, names: Iterable[str]) -> None:
        """What came over another way than HTTP (Xet) was compared with nothing: with its size, now.

        A file that is not whole is taken out of the cache, where all programs would believe it.
        """
        for name in names:
            file = self.folder / name
            found, wanted = file.stat().st_size, self.sizes.get(name, 0)
            if wanted and found != wanted:
                file.resolve().unlink()
                file.unlink(missing_ok=True)
                raise RotqError(f"{self.name}: {name} came with {found} of its {wanted} bytes")

    def _check_room(self, names: Iterable[str]) -> None:
        """Refuse before gigabytes come what would not fit."""
        wanted, disk = sum(self.sizes[name] for name in names), self.folder
        while not disk.exists():
            disk = disk.parent
        free = shutil.disk_usage(disk).free
        if wanted > free:
            raise RotqError(
                f"{self.name}: {wanted / 1e9:.1f} GB are to be fetched, and {disk} has "
                f"{free / 1e9:.1f} GB free; HF_HOME names another place for the cache"
            )


def find_commit(name: HubName) -> HubModel:
    """Look up what a name stands for now: one request, or the cache where there is no network.

    Raises:
        RotqError: the hub has no such model or revision, or refuses; it cannot be reached, and the
            cache has none.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi(library_name="rotq")
    with hub_errors(f"{name}", name.repo):
        try:
            found = api.model_info(
                name.repo,
                revision=name.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        except Exception as error:
            unreached = is_unreachable(error)
            if not unreached:
                raise
            return _cached(name, unreached)
    assert found.sha is not None, "the hub gives a commit for every revision"
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    return HubModel(name=name, commit=found.sha, folder=_place(name, found.sha), sizes=sizes)


def _cached(name: HubName, unreached: str) -> HubModel:
    """What the cache has of a name."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name.repo, revision=name.revision, local_files_only=True, allow_patterns=[]
        )
    except LocalEntryNotFoundError:
        raise RotqError(
            f"{name} is no folder here and not in the hub's cache, and {unreached}"
        ) from None
    place = Path(folder)
    files = [file for file in place.rglob("*") if file.is_file()]
    sizes = {file.relative_to(place).as_posix(): file.stat().st_size for file in files}
    return HubModel(name=name, commit=place.name, folder=place, sizes=sizes, unreached=unreached)


def _place(name: HubName, commit: str) -> Path:
    """Where the cache has a commit, or will have it."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=name.repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / folder / "snapshots" / commit
