"""Which paths a command may create, replace or clear; asked before its work, nothing is written.

- An output is the path that it resolves to: a link stays a link, what it points to is made.
- It is not, does not hold and does not lie inside what the command reads.
- What is there is replaced only where rotq wrote all of it. Each kind of output has marks that
  tell: a checkpoint's provenance, a calibration file's header, a job folder's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rotq.errors import RotqError

Inputs = Mapping[str, Path]
"""What a command reads, by the words for it: ``{"the model": Path("models/llama")}``."""

Foreign = Callable[[Path], str | None]
"""What rotq did not write of an existing path, as ``holds x``; None where it wrote all of it."""

_Identity = tuple[int, int]
"""Device and number of a file: the same under every name and mount."""


def resolve_output(output: Path, inputs: Inputs) -> Path:
    """Where ``output`` is on the disk, if the command may write there.

    Raises:
        RotqError: it meets an input, is a link in a circle or the root, or no folder can be made
            there.
    """
    path = Path(os.path.realpath(output))
    if exists(path) and path.is_symlink():
        raise RotqError(f"{output} is a link that leads to itself; choose another output")
    if path == path.parent:
        raise RotqError(f"{output} is the root of the file system; choose another output")
    check_apart(path, inputs, named=output)
    _check_writable(path, output)
    return path


def file_to_write(output: Path, inputs: Inputs, foreign: Foreign, *, parents: bool = False) -> Path:
    """Where a command that writes one file may write it: a new file, or one of its own kind.

    Args:
        output: As given.
        inputs: What the command reads.
        foreign: Tells whether a file is of the kind.
        parents: The command makes the folders around it.

    Raises:
        RotqError: see ``resolve_output`` and ``check_replaceable``; or it is a folder, or lies in
            none.
    """
    if output.is_dir():
        raise RotqError(f"cannot write {output}: it is a folder")
    path = resolve_output(output, inputs)
    if not parents and not path.parent.is_dir():
        raise RotqError(f"cannot write {output}: {path.parent} is not a folder")
    if exists(path):
        check_replaceable(path, foreign, named=output)
    return path


def check_apart(path: Path, inputs: Inputs, *, named: Path) -> None:
    """Refuse a path that is, holds or lies inside what a command reads.

    Args:
        path: Resolved; it need not exist.
        named: What the message calls it.

    Raises:
        RotqError: it does; names the input.
    """
    own, around = _identity(path), set(_lineage(path))
    for words, given in inputs.items():
        for place in _places(given):
            found = _identity(place)
            if found is None:
                continue
            relation = "is" if found == own else "lies inside" if found in around else ""
            if not relation and own in set(_lineage(place)):
                relation = "holds"
            if relation:
                raise RotqError(f"{named} {relation} {words} {given}; choose another output")


def check_replaceable(path: Path, foreign: Foreign, *, named: Path) -> None:
    """Refuse an existing path where rotq did not write all of it.

    Raises:
        RotqError: it did not; says what is there.
    """
    found = foreign(path)
    if found is not None:
        raise RotqError(
            f"{named} {found}; rotq replaces only what it has written: choose another output, or "
            "move it away"
        )


def without_mark(path: Path, mark: bytes, kind: str) -> str | None:
    """What makes an existing path no ``kind`` of rotq's, which has a mark near its start; or None.

    An empty file is taken for one: it holds nothing that could be lost.
    """
    if not path.is_file():
        return "is no plain file"
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if not start or mark in start else f"exists and is no {kind} of rotq's"


def exists(path: Path) -> bool:
    """Whether there is something of this name; a link counts, wherever it leads.

    Raises:
        RotqError: nobody can tell (no permission, a name that is too long).
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise RotqError(f"cannot use {path}: {error.strerror or error}") from None
    return True


def is_mount(path: Path) -> bool:
    """Whether a disk or folder is mounted here, which cannot be renamed."""
    if os.path.ismount(path):
        return True
    # a folder that is mounted on another one of the same disk does not look like it
    table = Path("/proc/self/mountinfo")
    if not table.is_file():
        return False
    escaped = str(path).replace("\\", r"\134").replace(" ", r"\040")
    return any(
        line.split()[4] == escaped for line in table.read_text(errors="replace").splitlines()
    )


def named_file(source: str) -> Path | None:
    """The file or folder that a text's name stands for; None where there is none."""
    path = Path(source).expanduser()
    try:
        return path if path.exists() else None
    except OSError:
        return None


def _check_writable(path: Path, output: Path) -> None:
    folder = path.parent
    while not exists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise RotqError(f"cannot write {output}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RotqError(f"cannot write {output}: no permission for {folder}")


def _places(given: Path) -> Iterator[Path]:
    """An input's own place, and those that links in its folder lead to."""
    path = Path(os.path.realpath(given))
    yield path
    if path.is_dir() and os.access(path, os.R_OK | os.X_OK):
        yield from (Path(os.path.realpath(entry)) for entry in path.iterdir() if entry.is_symlink())


def _lineage(path: Path) -> Iterator[_Identity]:
    """Of a path and the folders around it, as far as they exist."""
    yield from filter(None, map(_identity, (path, *path.parents)))


def _identity(path: Path) -> _Identity | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
