"""The record of a job, ``job.json``: what it is made from, and what of it is finished.

It is written last, whole, and synced with its folder: a part is finished when the record names its
files with their checksums, and what the record does not name is not there. The record carries a
checksum of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotq.checkpoint.files import read_json, write_json
from rotq.checkpoint.inspection import PROVENANCE
from rotq.disk.files import sha256_of
from rotq.errors import RotqError


@dataclass(frozen=True, kw_only=True)
class FinishedPart:
    """What is known of a finished part."""

    files: Mapping[str, str]
    """sha256 by file name."""
    results: dict[str, Any]
    """What is to be reported about it."""

    def damage(self, folder: Path) -> str | None:
        """What is wrong with its files, in words; None where they are as they were written."""
        for name, digest in self.files.items():
            file = folder / name
            if file.is_symlink() or not file.is_file():
                return f"{file} is missing"
            if sha256_of(file) != digest:
                return f"{file} was changed on the disk after it was written"
        return None


class JobRecord:
    """Fingerprint and finished parts, in the order in which they were made."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.fingerprint: dict[str, Any] = {}
        self.parts: dict[str, FinishedPart] = {}
        self.published = ""
        """sha256 of the provenance of the checkpoint that was given its name; "" before that."""

    @classmethod
    def read(cls, file: Path) -> JobRecord | None:
        """The record in a file; None where there is none.

        Raises:
            RotqError: it is damaged.
        """
        if file.is_symlink() or not file.is_file():
            return None
        record = cls(file)
        try:
            stored = read_json(file)
            content = stored["job"]
            whole = stored["sha256"] == _digest(content)
            record.fingerprint = content["fingerprint"]
            record.parts = {name: FinishedPart(**part) for name, part in content["parts"].items()}
            record.published = content["published"]
        except (RotqError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise RotqError(f"{file} is damaged; use --resume never to discard the job")
        return record

    @property
    def files(self) -> set[str]:
        """Names of the files of all finished parts."""
        return {name for part in self.parts.values() for name in part.files}

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """Compare with what the job to be continued is made from.

        Raises:
            RotqError: it is another job; names what differs.
        """
        own = self.fingerprint
        differing = [key for key in fingerprint if own.get(key) != fingerprint[key]]
        differing += [key for key in own if key not in fingerprint]
        if differing:
            raise RotqError(
                f"{self.file.parent} holds a job with another {', '.join(differing)}; "
                "use --resume never to discard it"
            )

    def has_published(self, output: Path) -> bool:
        """Whether ``output`` is the checkpoint that the job has published."""
        provenance = output / PROVENANCE
        if not self.published or not provenance.is_file():
            return False
        return sha256_of(provenance) == self.published

    def write(self) -> None:
        """Put it on the disk.

        Raises:
            RotqError: it cannot be written.
        """
        parts = {
            name: {"files": dict(part.files), "results": part.results}
            for name, part in self.parts.items()
        }
        content = {"fingerprint": self.fingerprint, "published": self.published, "parts": parts}
        write_json(self.file, {"sha256": _digest(content), "job": content})

    def add(self, name: str, files: Mapping[str, str], results: dict[str, Any]) -> None:
        """Name a finished part; not yet written."""
        plain = json.loads(json.dumps(results))
        self.parts[name] = FinishedPart(files=files, results=plain)

    def forget(self, name: str) -> None:
        """Drop a part and all that were made after it, which may stand on it; not yet written."""
        names = list(self.parts)
        for later in names[names.index(name) :]:
            del self.parts[later]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
