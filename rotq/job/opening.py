"""Opening a job's folder: what is refused before any work, the mark, the lock.

Nothing is written by ``find_place``; ``open_folder`` makes the folder, and takes it away again
where the job is refused before it has claimed it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rotq.checkpoint.ownership import foreign
from rotq.disk.destination import (
    Inputs,
    check_apart,
    check_replaceable,
    exists,
    is_mount,
    named_file,
    resolve_output,
)
from rotq.disk.files import remove, rename, sync_folder
from rotq.errors import RotqError, Stopped
from rotq.job.folder import JobFolder
from rotq.job.marks import LOCK, RECORD, REPLACED, foreign_to_job
from rotq.job.record import JobRecord
from rotq.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a job makes its checkpoint."""

    output: Path
    """Of the checkpoint; links are resolved."""
    partial: Path
    """The job's folder, beside it."""


def job_inputs(model: Path, recipe: Recipe, others: Inputs) -> Inputs:
    """What a job reads: the model, the calibration texts that are files, and ``others``."""
    texts = {}
    for number, text in enumerate(recipe.calibration.texts, start=1):
        file = named_file(text.source)
        if file is not None:
            several = f" {number}" if recipe.calibration.mix else ""
            texts[f"the calibration text{several}"] = file
    return {"the model": model, **texts, **others}


def find_place(output: Path, *, resume: str, overwrite: bool, inputs: Inputs) -> Place:
    """The places of a job, if it may have them; nothing is written.

    Args:
        output: Folder of the finished checkpoint.
        resume: "auto" continues a job if there is one, "required" insists, "never" discards it.
        overwrite: Allow ``output`` to exist, empty or written by rotq; it is replaced only by a
            finished checkpoint.
        inputs: What the job reads.

    Raises:
        ValueError: unknown ``resume``.
        RotqError: the output exists or meets an input, there is nothing to resume, or what has the
            name of the job's folder is not rotq's.
    """
    if resume not in ("auto", "required", "never"):
        raise ValueError(f"resume must be auto, required or never, got {resume!r}")
    path = resolve_output(output, inputs)
    partial = path.with_name(f"{path.name}.partial")
    _check_partial(partial, inputs)
    if resume == "required" and not (partial / RECORD).is_file():
        raise RotqError(f"nothing to resume in {partial}")
    record = None if resume == "never" else JobRecord.read(partial / RECORD)
    if record is None or not record.has_published(path):
        _check_output(path, output, exists(path) or exists(partial / REPLACED), overwrite)
    return Place(output=path, partial=partial)


@contextmanager
def open_folder(
    place: Place,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[JobFolder]:
    """Open or create the job's folder, locked against a second process.

    Args:
        place: From ``find_place`` with the same ``resume`` and ``overwrite``.
        tell: Is told what stays behind.

    Raises:
        RotqError: the folder cannot be made, or another process works in it.
    """
    made = _make_folders(place.partial)
    try:
        with _locked(place.partial):
            _put_back(place)
            folder = JobFolder(
                place.partial,
                place.output,
                overwrite=overwrite,
                discard=resume == "never",
                tell=tell,
            )
            try:
                yield folder
            except BaseException as error:
                converted = isinstance(error, Stopped) and exists(folder.source)
                if not folder.claimed and not converted:
                    folder.abandon()
                raise
    except BaseException:
        for folder_made in reversed(made):
            if folder_made.is_dir() and not any(folder_made.iterdir()):
                folder_made.rmdir()
        raise


def _check_partial(partial: Path, inputs: Inputs) -> None:
    check_apart(partial, inputs, named=partial)
    if not exists(partial):
        return
    if partial.is_symlink() or is_mount(partial):
        raise RotqError(
            f"{partial} leads to another place; rotq makes that folder itself, beside the "
            "checkpoint: remove the link or mount, or choose an output on the other disk"
        )
    check_replaceable(partial, foreign_to_job, named=partial)


def _check_output(path: Path, output: Path, occupied: bool, overwrite: bool) -> None:
    if not occupied:
        return
    if not overwrite:
        raise RotqError(f"{output} exists; choose another output or pass --overwrite")
    if not exists(path):
        return
    check_replaceable(path, foreign, named=output)
    if path in (Path.cwd(), *Path.cwd().parents):
        raise RotqError(f"{output} holds the current folder; choose another output")
    if is_mount(path):
        raise RotqError(f"{output} is where a disk is mounted; choose a folder on that disk")


def _put_back(place: Place) -> None:
    """Undo the first of a publication's two renames, where the process was killed between them."""
    replaced = place.partial / REPLACED
    if exists(replaced) and not exists(place.output):
        rename(replaced, place.output)


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those around it; returns those made, the outermost first."""
    missing = [folder]
    while not exists(missing[-1].parent):
        missing.append(missing[-1].parent)
    made: list[Path] = []
    try:
        for place in reversed(missing):
            if not exists(place):
                place.mkdir(exist_ok=True)
                made.append(place)
                sync_folder(place.parent)
    except OSError as error:
        for place in reversed(made):
            place.rmdir()
        raise RotqError(f"cannot write to {folder}: {error.strerror}") from None
    return made


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which is its mark too."""
    file = folder / LOCK
    fresh = not exists(file)
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise RotqError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        _take(handle, file, fresh)
        yield
    finally:
        os.close(handle)


def _take(handle: int, file: Path, fresh: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # another process may have ended between the two calls, and taken its folder with it
        free = file.exists() and os.path.samestat(os.fstat(handle), file.stat())
    except BlockingIOError:
        free = False
    except OSError as error:
        if fresh:
            remove(file)
        raise RotqError(f"cannot lock {file}: {error.strerror}") from None
    if not free:
        raise RotqError(f"another process is working in {file.parent}")
