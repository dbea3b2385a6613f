"""Folders that are filled with a model: new, empty, or filled by the same script before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rotq.disk.destination import check_replaceable, exists, resolve_output
from rotq.disk.files import make_folder, name_aside, remove, rename, whole_file
from rotq.errors import RotqError

MARK = "rotq_made_by"
"""File that says which script fills the folder; it is made first."""


@contextmanager
def new_folder(path: Path, *, named: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``path`` when the block ends without an exception.

    Args:
        path: From ``resolve_output``.
        named: What messages call it.

    Raises:
        RotqError: there is something of that name that is no empty folder, or it cannot be written.
    """
    there = exists(path)
    if there and not (path.is_dir() and not any(path.iterdir())):
        raise RotqError(f"{named} exists; choose another output")
    aside = name_aside(path)
    make_folder(aside)
    try:
        yield aside
        if there:
            remove(path)
        rename(aside, path)
    except BaseException:
        if aside.exists():
            remove(aside)
        raise


def folder_to_fill(output: Path, script: str) -> Path:
    """Make a folder a script's own.

    Args:
        output: Created if need be.
        script: Name of the script.

    Returns:
        The folder, links resolved.

    Raises:
        RotqError: it holds what the script has not made, or cannot be written to.
    """
    path = resolve_output(output, {})

    def foreign(folder: Path) -> str | None:
        if not folder.is_dir():
            return "is a file"
        entries = sorted(entry.name for entry in folder.iterdir())
        mark = folder / MARK
        made = mark.is_file() and mark.read_text(encoding="utf-8", errors="replace") == script
        return None if made or not entries else f"holds {entries[0]} and was not made by {script}"

    if exists(path):
        check_replaceable(path, foreign, named=output)
    make_folder(path)
    with whole_file(path / MARK) as file:
        file.write(script.encode())
    return path
