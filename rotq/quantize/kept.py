"""Parts of a checkpoint that are not quantized: what lies beside the text decoder, and the unread.

The towers and projectors of a multimodal model are copied byte by byte. Where R1 turns the residual
stream, the tensors that write image features into it are turned with it (``models.multimodal``).

Layers for multi-token prediction (MTP), a vision tower that a text model's class does not have:
transformers leaves them in the file without a word, because the model's class says so. They are
copied as they are. A rotated stream is no stream that they were trained on, so that they are left
out where R1 is fused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import Source, read_tensor
from rotq.errors import RotqError
from rotq.fusion.fuse import fuse_writer
from rotq.job.folder import JobFolder
from rotq.job.part_names import KEPT
from rotq.models.skeleton import Skeleton
from rotq.rotations.basis import Basis

_NAMED = 3
"""Beginnings of names in a note, at most."""


@dataclass(frozen=True, kw_only=True)
class KeptParts:
    """Stored tensors that the text decoder is not made of, by the checkpoint's own names."""

    beside: tuple[str, ...]
    """Of the other parts of a multimodal model."""
    writers: tuple[str, ...]
    """Those of ``beside`` that R1 turns, since they write into the residual stream."""
    copied: tuple[str, ...]
    """Of no part of the model; its class knows of them."""
    left_out: tuple[str, ...]
    rotated: bool

    def notes(self) -> Iterator[str]:
        """A line on what becomes of them."""
        if self.beside:
            but = f", but for {_beginnings(self.writers)}, which R1 turns" if self.writers else ""
            yield (
                f"{len(self.beside)} tensors beside the text decoder are copied as they are: "
                f"{_beginnings(self.beside)}{but}"
            )
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

    Raises:
        RotqError: R1 is fused, and what it must turn beside the decoder is not stored as it is.
    """
    patterns = getattr(skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unread = [name for name in source.unread() if not re.search(r"inv_freq|\.masked_bias$", name)]
    ignored = [name for name in unread if any(re.search(p, name) for p in patterns)]
    copied = () if rotated else tuple(ignored)
    left_out = ignored if rotated else [name for name in unread if name not in set(ignored)]
    return KeptParts(
        beside=tuple(_beside(source, skeleton)),
        writers=tuple(_writers(source, skeleton)) if rotated and skeleton.adapter.part else (),
        copied=copied,
        left_out=tuple(left_out),
        rotated=rotated and bool(ignored),
    )


def copy_kept(parts: KeptParts, source: Source, folder: JobFolder, basis: Basis) -> None:
    """Write what is copied as a part of the job, once.

    Args:
        basis: Of the job; its R1 turns ``parts.writers``.
    """
    names = (*parts.beside, *parts.copied)
    if not names or folder.finished(KEPT):
        return
    stored = {entry.name: entry for entry in source.entries.values()}
    tensors = {name: read_tensor(stored[name]) for name in names}
    tensors |= {name: fuse_writer(tensors[name], basis) for name in parts.writers}
    save_tensors(folder.part(KEPT), tensors)
    folder.record(KEPT, {"names": list(names)})


def _beside(source: Source, skeleton: Skeleton) -> Iterable[str]:
    """In the order of the file."""
    makings, adapter = source.makings or {}, skeleton.adapter
    read = {
        source.entries[stored].name
        for name, making in makings.items()
        if adapter.is_beside(name)
        for stored in making.group.stored
    }
    return sorted(read)


def _writers(source: Source, skeleton: Skeleton) -> Iterator[str]:
    makings, adapter = source.makings or {}, skeleton.adapter
    pattern = re.compile(adapter.image_writers)
    found = [name for name in makings if adapter.is_beside(name) and pattern.fullmatch(name)]
    if source.entries and not found:
        raise RotqError(f"rotation.residual: no tensor {pattern.pattern}; set it to none")
    for name in found:
        stored = makings[name].stored
        if stored is None:
            raise RotqError(
                f"rotation.residual: {name} must be turned with the residual stream, and is stored "
                "in another form; set rotation.residual=none"
            )
        if source.entries[stored].shape[0] != skeleton.config.hidden_size:
            raise RotqError(
                f"rotation.residual: {name} writes {source.entries[stored].shape[0]} features, the "
                f"residual stream has {skeleton.config.hidden_size}; set rotation.residual=none"
            )
        yield source.entries[stored].name


def _beginnings(names: tuple[str, ...]) -> str:
    """What the names begin with, up to the first number."""
    found = list(dict.fromkeys(re.split(r"(?<=\.)\d+\.", name)[0].rstrip(".") for name in names))
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{', '.join(found[:_NAMED])}{more}"
