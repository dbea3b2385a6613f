"""Putting a checkpoint that rotq has published on the Hugging Face hub, in one commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotq.checkpoint.files import read_json
from rotq.checkpoint.hub_errors import hub_errors
from rotq.checkpoint.inspection import PROVENANCE, REPORT
from rotq.checkpoint.ownership import foreign
from rotq.errors import RotqError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

CARD = "README.md"
KEPT = (".gitattributes", CARD)
"""What the hub itself puts into a new repository."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """A commit on the hub."""

    url: str
    commit: str
    private: bool
    files: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def push(folder: Path, repo: str, *, public: bool = False, message: str | None = None) -> Pushed:
    """Upload a checkpoint; the repository is made where there is none.

    The card names the repository in place of PATH. Weight files of an earlier push that the
    checkpoint does not have are deleted in the same commit.

    Args:
        folder: As a job has published it.
        repo: ``ORG/NAME``.
        public: Whether everybody may read it; else a repository that is public is refused.
        message: Of the commit.

    Raises:
        RotqError: the folder is no result of rotq's or was changed; the repository holds something
            else or is public; the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    names = published_names(folder)
    api = HfApi(library_name="rotq")
    with hub_errors(repo, repo):
        there = _names_there(api, repo, public=public)
        made = api.create_repo(repo, private=not public, exist_ok=True)
        done = api.create_commit(
            repo,
            [*_additions(folder, names, repo), *_deletions(there, names)],
            commit_message=message or f"Upload {folder.resolve().name}, quantized with rotq",
        )
        private = bool(api.model_info(repo).private)  # one that was there stays what it was
    return Pushed(
        url=str(made),
        commit=done.oid,
        private=private,
        files=len(names),
        bytes=sum((folder / name).stat().st_size for name in names),
    )


def published_names(folder: Path) -> list[str]:
    """Names of the files of a checkpoint, all of which are as rotq wrote them.

    Raises:
        RotqError: it is none, or a file was changed, is missing, or is not rotq's.
    """
    if not folder.exists():
        raise RotqError(f"{folder} does not exist")
    found = foreign(folder)
    if found is None and not (folder / PROVENANCE).is_file():
        found = "is empty"
    if found is not None:
        raise RotqError(f"{folder} {found}; rotq pushes only what it has written")
    names = [*read_json(folder / PROVENANCE)["files"], PROVENANCE, REPORT]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise RotqError(f"{folder} lacks {missing[0]}, which rotq wrote; it is not pushed")
    return sorted(names)


def _names_there(api: HfApi, repo: str, *, public: bool) -> list[str]:
    """Files of a repository that may be pushed to; none where it is still to be made."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        found = api.model_info(repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return []
    if not found.private and not public:
        raise RotqError(f"{repo} exists and is public; --public pushes to it all the same")
    names = [file.rfilename for file in found.siblings or ()]
    others = [name for name in names if name not in KEPT]
    if others and PROVENANCE not in names:
        raise RotqError(f"{repo} holds {others[0]} and is no checkpoint of rotq's; choose another")
    return names


def _additions(folder: Path, names: Collection[str], repo: str) -> list[CommitOperationAdd]:
    """Every file; card and provenance as they are for the hub."""
    from huggingface_hub import CommitOperationAdd

    changed = {}
    if CARD in names:
        card = (folder / CARD).read_text(encoding="utf-8").replace('"PATH"', f'"{repo}"').encode()
        provenance = read_json(folder / PROVENANCE)
        provenance["files"][CARD] = hashlib.sha256(card).hexdigest()
        told = json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"
        changed = {CARD: card, PROVENANCE: told.encode()}
    return [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=changed.get(name, folder / name))
        for name in names
    ]


def _deletions(there: Collection[str], names: Collection[str]) -> list[CommitOperationDelete]:
    from huggingface_hub import CommitOperationDelete

    ours = (".safetensors", ".safetensors.index.json")
    return [
        CommitOperationDelete(path_in_repo=name)
        for name in there
        if name.endswith(ours) and name not in names
    ]
