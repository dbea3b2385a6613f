"""The folder of a running job: finished parts, the fingerprint that guards a resume, publication.

    OUT.partial/  job.json           what the parts were made from
                  transform.safetensors, transform.json
                  outer.safetensors  embedding, final norm, head
                  block-00000.safetensors, block-00000.json, ...
                  tuned-*.safetensors, tuning.json
                  checkpoint/        assembled at the end, then renamed to OUT

A part appears under its name only when it is complete and on the disk, so that a killed job
continues after its last part.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rotq.checkpoint.files import read_json, write_json
from rotq.errors import RotqError


class JobFolder:
    """An open job folder, locked against a second process."""

    def __init__(self, path: Path, output: Path, *, overwrite: bool) -> None:
        self.path = path
        self.output = output
        self._overwrite = overwrite

    @property
    def checkpoint(self) -> Path:
        """Where the result is assembled before it takes its name."""
        return self.path / "checkpoint"

    def part(self, name: str) -> Path:
        """The tensors of a part: "outer" or a block's name from ``block_part``."""
        return self.path / f"{name}.safetensors"

    def latest(self, name: str) -> Path:
        """The tensors of a part as they go into the checkpoint: tuned, if the job came to that."""
        return self.part(tuned_part(name) if self.recorded(TUNING) else name)

    def claim(self, fingerprint: dict[str, Any]) -> None:
        """Write the fingerprint, or compare it with the one of the job to be continued.

        Raises:
            RotqError: the folder belongs to a job with other inputs; names what differs.
        """
        file = self.path / "job.json"
        if not file.exists():
            write_json(file, fingerprint)
            return
        before = read_json(file)
        differing = [key for key in fingerprint if before.get(key) != fingerprint[key]]
        if differing:
            raise RotqError(
                f"{self.path} holds a job with another {', '.join(differing)}; "
                "use --resume never to discard it"
            )

    def finished(self, name: str) -> bool:
        """Whether a part and its results are complete."""
        return self.part(name).exists() and self.recorded(name)

    def recorded(self, name: str) -> bool:
        """Whether ``record`` has kept something under this name."""
        return self._results(name).exists()

    def record(self, name: str, results: dict[str, Any]) -> None:
        """Keep what is to be reported about a part, after its tensors are on the disk."""
        write_json(self._results(name), results)

    def results(self, name: str) -> dict[str, Any]:
        """What ``record`` kept."""
        return read_json(self._results(name))

    def publish(self) -> None:
        """Rename the checkpoint to its final name and remove the job folder."""
        old = self.output.with_name(self.output.name + ".old")
        if self.output.exists():
            assert self._overwrite, "checked when the job was opened"
            shutil.rmtree(old, ignore_errors=True)
            self.output.rename(old)
        self.checkpoint.rename(self.output)
        shutil.rmtree(self.path)
        if old.exists():
            shutil.rmtree(old)

    def _results(self, name: str) -> Path:
        return self.path / f"{name}.json"


OUTER = "outer"
"""Name of the part with everything outside the blocks."""


TUNING = "tuning"
"""Name under which the training of scales is recorded, once all tuned parts are on the disk."""


TRANSFORM = "transform"
"""Name of the part with the basis, where it was searched for."""


def block_part(index: int) -> str:
    """Name of a block's part; sorts in block order."""
    return f"block-{index:05d}"


def tuned_part(name: str) -> str:
    """Name of what ``tune`` made of a part."""
    return f"tuned-{name}"


@contextmanager
def open_folder(output: Path, *, resume: str, overwrite: bool) -> Iterator[JobFolder]:
    """Open or create OUT.partial.

    Args:
        output: Folder of the finished checkpoint.
        resume: "auto" continues a job if there is one, "required" insists, "never" discards it.
        overwrite: Allow ``output`` to exist; it is replaced only by a finished checkpoint.

    Raises:
        ValueError: unknown ``resume``.
        RotqError: the output exists, there is nothing to resume, or another process works on it.
    """
    if resume not in ("auto", "required", "never"):
        raise ValueError(f"resume must be auto, required or never, got {resume!r}")
    if output.exists() and not overwrite:
        raise RotqError(f"{output} exists; choose another output or pass --overwrite")
    path = output.with_name(output.name + ".partial")
    if resume == "required" and not (path / "job.json").exists():
        raise RotqError(f"nothing to resume in {path}")
    with _locked(path) as lock:
        if resume == "never":
            for entry in path.iterdir():
                if entry != lock:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield JobFolder(path, output, overwrite=overwrite)


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    lock = path / "lock"
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise RotqError(f"cannot write to {path}: {error.strerror}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RotqError(f"another process is working in {path}") from None
        yield lock
