"""Parts of a checkpoint that the language model's forward does not reach.

Layers for multi-token prediction (MTP), a vision tower beside a text model: transformers leaves
them in the file without a word, because the model's class says so. They are copied as they are. A
rotated stream is no stream that they were trained on, so that they are left out where R1 is fused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import Source, read_tensor
from rotq.job.folder import JobFolder
from rotq.job.part_names import KEPT
from rotq.models.skeleton import Skeleton

_NAMED = 3
"""Beginnings of names in a note, at most."""


@dataclass(frozen=True, kw_only=True)
class KeptParts:
    """Stored tensors that no tensor of the model is made of, by the checkpoint's own names."""

    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    rotated: bool

    def notes(self) -> Iterator[str]:
        """A line on what becomes of them."""
        if self.copied:
            yield (
                f"{len(self.copied)} tensors that the model's forward does not reach are copied as "
                f"they are: {_beginnings(self.copied)}"
            )
        if self.left_out:
            why = "which a rotated stream does not fit" if self.rotated else "unknown to the model"
            yield f"{len(self.left_out)} tensors are left out, {why}: {_beginnings(self.left_out)}"


def find_kept(source: Source, skeleton: Skeleton, *, rotated: bool) -> KeptParts:
    """What of a checkpoint is copied or left out.

    Args:
        source: From ``Source.read_for``.
        rotated: R1 is fused.
    """
    patterns = getattr(skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unread = [name for name in source.unread() if not re.search(r"inv_freq|\.masked_bias$", name)]
    ignored = [name for name in unread if any(re.search(p, name) for p in patterns)]
    copied = () if rotated else tuple(ignored)
    left_out = ignored if rotated else [name for name in unread if name not in set(ignored)]
    return KeptParts(copied=copied, left_out=tuple(left_out), rotated=rotated and bool(ignored))


def copy_kept(parts: KeptParts, source: Source, folder: JobFolder) -> None:
    """Write the copied tensors as a part of the job, once."""
    if not parts.copied or folder.finished(KEPT):
        return
    stored = {entry.name: entry for entry in source.entries.values()}
    save_tensors(folder.part(KEPT), {name: read_tensor(stored[name]) for name in parts.copied})
    folder.record(KEPT, {"names": list(parts.copied)})


def _beginnings(names: tuple[str, ...]) -> str:
    """What the names begin with, up to the first number."""
    found = list(dict.fromkeys(re.split(r"(?<=\.)\d+\.", name)[0].rstrip(".") for name in names))
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{', '.join(found[:_NAMED])}{more}"
