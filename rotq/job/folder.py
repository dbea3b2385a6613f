"""The folder of a running job: finished parts, the record that guards a resume, publication.

    OUT.partial/  rotq.lock          the mark, made first; locked while a process works here
                  job.json           the record, see ``JobRecord``
                  transform.safetensors
                  outer.safetensors  embedding, final norm, head
                  block-00000.safetensors, ...
                  tuned-*.safetensors
                  gradient-*.safetensors  weights of tokens, where gradients decide them
                  hidden-*, attention-*, inputs-*  activations, where they are kept on the disk
                  source/            a GGUF file made dense
                  checkpoint/        assembled at the end, then renamed to OUT
                  replaced/          what was OUT, until the new one has its name

A job that was killed continues after the last part of its record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rotq.checkpoint.inspection import PROVENANCE
from rotq.checkpoint.ownership import foreign
from rotq.disk.destination import check_replaceable, exists
from rotq.disk.files import remove, rename, sha256_of, sync_folder
from rotq.errors import CheckFailed, RotqError
from rotq.job.marks import CHECKPOINT, LOCK, RECORD, REPLACED, SOURCE, is_ours
from rotq.job.part_names import TUNING, tuned_part
from rotq.job.record import JobRecord


class JobFolder:
    """A job's folder, in the hands of this process."""

    def __init__(
        self,
        path: Path,
        output: Path,
        *,
        overwrite: bool = False,
        discard: bool = False,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """
        Args:
            path: The folder; exists.
            output: What the checkpoint will be called; links are resolved.
            overwrite: Replace what ``output`` is then, if rotq wrote it.
            discard: Begin anew, whatever the record says.
            tell: Is told what stays behind.

        Raises:
            RotqError: the record is damaged.
        """
        self.path, self.output = path, output
        self._overwrite, self._tell = overwrite, tell
        found = None if discard else JobRecord.read(path / RECORD)
        self._record = found or JobRecord(path / RECORD)
        self.claimed = False
        """Whether the folder belongs to the job of this process."""
        self._sound: set[str] = set()

    @property
    def checkpoint(self) -> Path:
        """Where the result is assembled before it takes its name."""
        return self.path / CHECKPOINT

    @property
    def source(self) -> Path:
        """Where a GGUF file is made dense."""
        return self.path / SOURCE

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the parts are made from; empty where there is no job yet."""
        return self._record.fingerprint

    @property
    def is_new(self) -> bool:
        """Whether there is no job to continue."""
        return not self.fingerprint

    @property
    def is_published(self) -> bool:
        """Whether the job was stopped after its checkpoint had been given its name."""
        return self._record.has_published(self.output)

    def part(self, name: str) -> Path:
        """The tensors of a part: "outer" or a block's name from ``block_part``."""
        return self.path / f"{name}.safetensors"

    def latest(self, name: str) -> Path:
        """The tensors of a part as they go into the checkpoint: tuned, if the job came to that."""
        return self.part(tuned_part(name) if self.recorded(TUNING) else name)

    def claim(self, fingerprint: dict[str, Any]) -> None:
        """Make the folder this job's, or compare it with the one of the job to be continued.

        The record is written before anything is cleared: from then on the parts of another job are
        not there, at whatever moment this process is killed.

        Raises:
            RotqError: the folder belongs to a job with other inputs; names what differs.
        """
        if self._record.fingerprint:
            self._record.check(fingerprint)
        else:
            self._record.fingerprint = fingerprint
            self._record.write()
        self.claimed = True
        if not self.is_published:
            self._clear(keep={LOCK, RECORD, SOURCE, REPLACED, *self._record.files})

    def finished(self, name: str) -> bool:
        """Whether a part is complete; its files are compared with their checksums once.

        Raises:
            CheckFailed: they are not as they were written. The part is forgotten, with all that
                were made after it: the next run makes them anew.
        """
        if self.recorded(name) and name not in self._sound:
            self._check(name)
            self._sound.add(name)
        return self.recorded(name)

    def recorded(self, name: str) -> bool:
        """Whether ``record`` has kept something under this name."""
        return name in self._record.parts

    def record(
        self, name: str, results: dict[str, Any], parts: Sequence[str] | None = None
    ) -> None:
        """Name a part as finished, after its tensors are on the disk.

        Args:
            name: What it is recorded under; an earlier record of the name goes, with its files.
            results: What is to be reported about it.
            parts: Whose files belong to it; the part of that name where left out.
        """
        before = self._record.files
        files = [self.part(part) for part in ([name] if parts is None else parts)]
        self._record.add(name, {file.name: sha256_of(file) for file in files}, results)
        self._write_record(before)
        self._sound.add(name)

    def drop_states(self, name: str) -> None:
        """Forget the states of a training that has ended: records under ``name-...``."""
        before = self._record.files
        for state in [part for part in self._record.parts if part.startswith(f"{name}-")]:
            del self._record.parts[state]
        self._write_record(before)

    def results(self, name: str) -> dict[str, Any]:
        """What ``record`` kept."""
        return self._record.parts[name].results

    def verify(self) -> None:
        """Compare all parts with their checksums.

        Raises:
            CheckFailed: see ``finished``.
        """
        for name in list(self._record.parts):
            self._check(name)

    def publish(self) -> None:
        """Give the checkpoint its name and remove the job folder.

        Raises:
            RotqError: what has the name is not rotq's to replace; the job is kept.
        """
        self._record.published = sha256_of(self.checkpoint / PROVENANCE)
        self._record.write()
        replaced = self.path / REPLACED
        if exists(self.output):
            if not self._overwrite:
                raise RotqError(
                    f"{self.output} has come into being; move it away, and the same command "
                    "publishes the result"
                )
            check_replaceable(self.output, foreign, named=self.output)
            remove(replaced)
            rename(self.output, replaced)
        rename(self.checkpoint, self.output)
        self.leave()

    def leave(self) -> None:
        """Remove the folder of a published job: parts, record, lock, each only after the other.

        What somebody else has put there meanwhile stays, and is told.
        """
        self._clear(keep={LOCK, RECORD})
        remove(self.path / RECORD)
        sync_folder(self.path)
        remove(self.path / LOCK)
        left = next(self.path.iterdir(), None)
        if left is None:
            self.path.rmdir()
        else:
            self._tell(f"{self.path} stays: rotq did not make {left.name}")

    def abandon(self) -> None:
        """Take the folder away again if no job has ever claimed it."""
        if exists(self.path / RECORD):
            return
        self._clear(keep=set())
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _check(self, name: str) -> None:
        damage = self._record.parts[name].damage(self.path)
        if damage is not None:
            before = self._record.files
            self._record.forget(name)
            self._write_record(before)
            raise CheckFailed(f"{damage}; the same command makes it anew, and what came after it")

    def _write_record(self, before: set[str]) -> None:
        """Files that it named before and names no more are removed after it."""
        self._record.write()
        for stale in before - self._record.files:
            remove(self.path / stale)

    def _clear(self, keep: set[str]) -> None:
        for entry in list(self.path.iterdir()):
            if is_ours(entry.name) and entry.name not in keep:
                remove(entry)
        sync_folder(self.path)
