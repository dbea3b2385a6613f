"""The marks of a job's folder: what it holds by name, and what in it is somebody else's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rotq.checkpoint.gguf import foreign_to_conversion
from rotq.checkpoint.inspection import PROVENANCE, RECIPE, REPORT
from rotq.disk.files import ASIDE
from rotq.errors import RotqError
from rotq.job.record import JobRecord

LOCK = "rotq.lock"
"""The mark, made before anything else."""
RECORD = "job.json"
SOURCE, CHECKPOINT, REPLACED = "source", "checkpoint", "replaced"

_FILES = re.compile(
    rf"{LOCK}|{re.escape(RECORD)}|{ASIDE}"
    r"|((tuned-)?(outer|block-\d{5,})|kept|own-text|gradient-\d{5,}|transform(-[a-z]+-\d{5,})?)"
    r"\.safetensors|((hidden|attention)-(quantized|original)|hidden-gradients)(-[0-9]+)?"
    r"|mlp-quantized-[0-9]+|inputs-[\w.]+-\d+-\d+"
)
_FOLDERS = re.compile(rf"{SOURCE}(\.partial)?|{CHECKPOINT}|{REPLACED}|{ASIDE}")
_ASSEMBLED = re.compile(
    rf"model(-\d{{5,}}-of-\d{{5,}})?\.safetensors|model\.safetensors\.index\.json|{ASIDE}"
    rf"|config\.json|README\.md|rotq_[a-z]+\.svg|{REPORT}|{RECIPE}|{PROVENANCE}"
)


def is_ours(name: str) -> bool:
    """Whether a job makes an entry of this name in its folder."""
    return bool(_FILES.fullmatch(name) or _FOLDERS.fullmatch(name))


def foreign_to_job(folder: Path) -> str | None:
    """What no job has made of an existing path, in words; None for its folder or an empty one."""
    if not folder.is_dir():
        return "is a file"
    entries = sorted(folder.iterdir())
    if not entries:
        return None
    if not (folder / LOCK).is_file():
        shown = ", ".join(entry.name for entry in entries[:3]) + ", ..." * (len(entries) > 3)
        return f"holds {shown} and is no folder of a job of rotq's"
    return next((f"holds {name}, which rotq did not make" for name in _others(entries)), None)


def _others(entries: list[Path]) -> Iterator[str]:
    for entry in entries:
        plain = not entry.is_symlink()
        if plain and entry.is_file() and _FILES.fullmatch(entry.name):
            continue
        if plain and entry.is_dir() and _FOLDERS.fullmatch(entry.name):
            inside = _foreign_inside(entry)
            if inside is None:
                continue
            yield f"{entry.name}, which {inside}"
        yield entry.name


def _foreign_inside(folder: Path) -> str | None:
    if folder.name.startswith(SOURCE):
        return foreign_to_conversion(folder)
    if folder.name != CHECKPOINT:
        return None  # looked at before it was moved here
    copied = _copied(folder.parent / RECORD)
    for entry in folder.iterdir():
        ours = _ASSEMBLED.fullmatch(entry.name) or entry.name in copied
        if entry.is_symlink() or not entry.is_file() or not ours:
            return f"holds {entry.name}"
    return None


def _copied(record: Path) -> set[str]:
    """Names of the model's files that a checkpoint takes along, as the fingerprint has them."""
    try:
        found = JobRecord.read(record)
    except RotqError:
        found = None
    return set(found.fingerprint) if found else set()
