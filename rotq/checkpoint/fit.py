"""Whether a checkpoint has what a model needs, by names and shapes, before any tensor is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rotq.checkpoint.foreign import library_errors
from rotq.errors import RotqError

if TYPE_CHECKING:
    from rotq.checkpoint.source import Source
    from rotq.models.conversion import Group
    from rotq.models.skeleton import Skeleton


def check_fit(source: Source, skeleton: Skeleton) -> None:
    """Compare every tensor of the model with what the checkpoint stores.

    Args:
        source: From ``Source.read_for``.

    Raises:
        RotqError: a tensor is missing, or has another shape; names the first.
    """
    makings = source.makings or {}
    for name, like in skeleton.wanted(makings).items():
        making = makings.get(name)
        if making is None:
            raise RotqError(f"the checkpoint has no tensor {name}")
        if making.stored is not None:
            _compare(name, source.shape(making.stored), tuple(like.shape))
    for group in dict.fromkeys(making.group for making in makings.values()):
        if group.make is not None:
            _check_group(group, source, skeleton)


def _check_group(group: Group, source: Source, skeleton: Skeleton) -> None:
    """Make it of tensors without values."""
    import torch

    assert group.make is not None, "only what is made is checked"
    stored = {name: torch.empty(source.shape(name), device="meta") for name in group.stored}
    with library_errors(f"{source.path}: {group.stored[0]} does not fit the model"):
        made = group.make(stored)
    fused = skeleton.conversion.fused
    for name, tensor in made.items():
        if name in fused:
            _compare(name, tuple(tensor.shape), tuple(fused[name].shape))


def _compare(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise RotqError(
            f"{name}: the checkpoint has shape {found}, its configuration says {wanted}"
        )
