"""Reading a finished checkpoint's own account of itself, and checking its files against it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotq.checkpoint.files import read_json
from rotq.errors import CheckFailed, RotqError
from rotq.recipe import read_mapping
from rotq.recipe.sections import shown
from rotq.report.results import JobReport

REPORT = "report.json"
RECIPE = "rotq_recipe.yaml"
PROVENANCE = "rotq_provenance.json"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What the files next to the weights say. Parts that a checkpoint lacks are None."""

    path: Path
    files: dict[str, int]
    """Bytes by name, every file of the folder."""
    config: dict[str, Any]
    """The content of config.json."""
    report: JobReport | None
    recipe: dict[str, Any] | None
    provenance: dict[str, Any] | None

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The ``quantization_config`` of config.json; None for a dense checkpoint."""
        return self.config.get("quantization_config")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "path": str(self.path),
            "files": self.files,
            "quantization_config": self.quantization,
            "report": self.report.to_dict() if self.report else None,
            "recipe": self.recipe,
            "provenance": self.provenance,
        }


def read_checkpoint(path: Path) -> Inspection:
    """Read what a checkpoint folder says about itself; no tensor is loaded.

    Raises:
        RotqError: no such folder, no config.json, or a file that cannot be read.
    """
    if not path.is_dir():
        raise RotqError(f"{path}: no such folder")
    if not (path / "config.json").is_file():
        raise RotqError(f"{path} holds no config.json, so it is no checkpoint")
    return Inspection(
        path=path,
        files={
            str(file.relative_to(path)): file.stat().st_size
            for file in sorted(path.rglob("*"))
            if file.is_file()
        },
        config=read_json(path / "config.json"),
        report=_read_report(path / REPORT),
        recipe=_read_recipe(path / RECIPE),
        provenance=read_json(path / PROVENANCE) if (path / PROVENANCE).is_file() else None,
    )


def verify_files(inspection: Inspection) -> int:
    """Compare the files with the sha256 that the provenance holds.

    Returns:
        Number of files compared.

    Raises:
        RotqError: the checkpoint has no provenance.
        CheckFailed: a file differs or is gone; names the first one.
    """
    if inspection.provenance is None:
        raise RotqError(f"{inspection.path} has no {PROVENANCE} to verify with")
    expected = inspection.provenance.get("files")
    if not isinstance(expected, dict) or not expected:
        raise RotqError(f"{inspection.path / PROVENANCE} lists no files to verify")
    for name, digest in sorted(expected.items()):
        file = _inside(inspection.path, name)
        if not file.is_file():
            raise CheckFailed(f"{file} is missing; {PROVENANCE} lists it")
        with open(file, "rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != digest:
            raise CheckFailed(f"{file} was changed: sha256 {found}, written as {digest}")
    return len(expected)


def _inside(folder: Path, name: str) -> Path:
    """The file of a checkpoint that its provenance names; it may be missing."""
    file = folder / name
    try:
        file.is_file()  # raises where the name cannot be that of a file
        inside = file.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RotqError(f"{folder / PROVENANCE} lists {shown(name)}: {why}") from None
    if not inside:
        what = f"{shown(name)}, which is outside of the folder"
        raise RotqError(f"{folder / PROVENANCE} lists {what}")
    return file


def _read_report(file: Path) -> JobReport | None:
    if not file.is_file():
        return None
    try:
        return JobReport.from_dict(read_json(file))
    except ValueError as error:
        raise RotqError(f"{file}: {error}") from None


def _read_recipe(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return read_mapping(file)
    except ValueError as error:
        raise RotqError(str(error)) from None
