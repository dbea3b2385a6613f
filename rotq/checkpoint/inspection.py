"""Reading a finished checkpoint's own account of itself, and checking its files against it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotq.checkpoint.files import read_json
from rotq.checkpoint.hub import HubModel
from rotq.checkpoint.location import ModelName, locate
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
    """Bytes by name, every file of the folder, or of the hub's commit."""
    config: dict[str, Any]
    """The content of config.json."""
    report: JobReport | None
    recipe: dict[str, Any] | None
    provenance: dict[str, Any] | None
    hub: HubModel | None = None
    """Where it is fetched from."""

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


def read_checkpoint(model: ModelName) -> Inspection:
    """Read what a checkpoint folder says about itself; no tensor is loaded, no weights are fetched.

    Raises:
        RotqError: no such folder, no config.json, or a file that cannot be read; or see ``locate``.
    """
    found = locate(model)
    path = found.path
    if not path.is_dir():
        raise RotqError(f"{path}: no folder")
    if not (path / "config.json").is_file():
        raise RotqError(f"{path} holds no config.json, so it is no checkpoint")
    return Inspection(
        path=path,
        files=_sizes(path) if found.hub is None else dict(sorted(found.hub.sizes.items())),
        config=read_json(path / "config.json"),
        report=_read_report(path / REPORT),
        recipe=_read_recipe(path / RECIPE),
        provenance=read_json(path / PROVENANCE) if (path / PROVENANCE).is_file() else None,
        hub=found.hub,
    )


def verify_files(inspection: Inspection) -> int:
    """Compare the files with the sha256 that the provenance holds; of the hub's all are fetched.

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
    if inspection.hub is not None:
        inspection.hub.fetch([name for name in expected if name in inspection.files])
    for name, digest in sorted(expected.items()):
        file = _inside(inspection, name)
        if not file.is_file():
            raise CheckFailed(f"{file} is missing; {PROVENANCE} lists it")
        with open(file, "rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != digest:
            raise CheckFailed(f"{file} was changed: sha256 {found}, written as {digest}")
    return len(expected)


def _sizes(path: Path) -> dict[str, int]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): file.stat().st_size for file in files}


def _inside(inspection: Inspection, name: str) -> Path:
    """The file of a checkpoint that its provenance names; it may be missing."""
    folder, hub = inspection.path, inspection.hub
    file = folder / name
    try:
        file.is_file()  # raises where the name cannot be that of a file
        # the hub's cache has links to a folder of its own
        own = folder if hub is None else hub.storage
        inside = file.resolve().is_relative_to(own.resolve())
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
