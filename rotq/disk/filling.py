"""Folders that scripts fill with a model: new, empty, or filled by the same script before."""

from __future__ import annotations

from pathlib import Path

from rotq.disk.destination import check_replaceable, exists, resolve_output
from rotq.disk.files import make_folder, whole_file

MARK = "rotq_made_by"
"""File that says which script fills the folder; it is made first."""


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
