"""Files that are whole or absent: written aside, synced with their folder, then renamed.

What is deleted is deleted itself: a link goes, and what it points to stays.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rotq.errors import RotqError

ASIDE = r"\.rotq-[0-9a-f]{16}\.partial"
"""Regular expression of names that files are written and folders deleted under; a killed process
leaves one."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes ``path`` when the block ends without an exception.

    It is written under a name that nobody else has. A link at ``path`` is replaced, not followed.

    Raises:
        RotqError: the file cannot be written (disk full, no permission); nothing is left behind.
    """
    aside = name_aside(path)
    try:
        try:
            with open(aside, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise RotqError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Make a folder, and those around it, where they are not there.

    Raises:
        RotqError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RotqError(f"cannot write to {path}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last: without it a power failure may undo a rename."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # some file systems have no such call for folders, and some folders may not be listed
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def rename(path: Path, to: Path) -> None:
    """Rename, and make the new name last.

    Raises:
        RotqError: it cannot be done.
    """
    try:
        path.rename(to)
        sync_folder(path.parent)
        sync_folder(to.parent)
    except OSError as error:
        raise RotqError(f"cannot rename {path} to {to}: {error.strerror or error}") from error


def sha256_of(file: Path) -> str:
    """Of a file's bytes, as hex.

    Raises:
        RotqError: it cannot be read.
    """
    try:
        with open(file, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise RotqError(f"cannot read {file}: {error.strerror or error}") from error


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder and what lies in it; nothing that links point to.

    A folder loses its name first, so that no part of it is ever found under it.

    Raises:
        RotqError: it cannot be deleted.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            aside = name_aside(path)
            path.rename(aside)
            shutil.rmtree(aside)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RotqError(f"cannot remove {path}: {error.strerror or error}") from error


def name_aside(path: Path) -> Path:
    """A name beside a path that nobody else has, for what is not yet whole."""
    return path.with_name(f".rotq-{secrets.token_hex(8)}.partial")
