"""What in a folder is a checkpoint that rotq wrote, and what is somebody else's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rotq.checkpoint.files import read_json
from rotq.checkpoint.inspection import PROVENANCE, REPORT
from rotq.disk.files import sha256_of
from rotq.errors import RotqError
from rotq.report.plots import FLATNESS
from rotq.report.plots import foreign as foreign_to_plots


def foreign(folder: Path) -> str | None:
    """What rotq did not write of an existing path, in words; None for a checkpoint of rotq's alone.

    Its provenance is the mark: it lists the files and their checksums. Nothing is lost with an
    empty folder either.
    """
    if not folder.is_dir():
        return "is a file"
    entries = sorted(_entries(folder))
    if not entries:
        return None
    written = _written(folder)
    if written is None:
        shown = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
        return f"holds {shown} and is no checkpoint of rotq's"
    for name in entries:
        file = folder / name
        if name in (PROVENANCE, REPORT) or (name == FLATNESS and foreign_to_plots(file) is None):
            continue
        if name not in written or file.is_symlink():
            return f"holds {name}, which rotq did not write"
        if sha256_of(file) != written[name]:
            return f"holds {name}, which was changed after rotq wrote it"
    return None


def _entries(folder: Path) -> Iterator[str]:
    """Names of all files, links and empty folders, from the folder on."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        yield from (str((here / name).relative_to(folder)) for name in (*files, *links))
        if not folders and not files and here != folder:
            yield str(here.relative_to(folder))


def _written(folder: Path) -> dict[str, str] | None:
    """Checksums by name, as the provenance has them; None where there is no usable one."""
    file = folder / PROVENANCE
    if file.is_symlink() or not file.is_file():
        return None
    try:
        files = read_json(file).get("files")
    except RotqError:
        return None
    return files if isinstance(files, dict) and files else None
