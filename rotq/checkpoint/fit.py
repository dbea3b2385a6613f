"""Whether a checkpoint has what a model needs, by names and shapes, before any tensor is read."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from rotq.checkpoint.foreign import library_errors
from rotq.errors import RotqError
from rotq.models.ties import stored_under

if TYPE_CHECKING:
    from torch import Tensor

    from rotq.checkpoint.source import Source
    from rotq.models.conversion import Group, Making
    from rotq.models.skeleton import Skeleton


def check_fit(source: Source, skeleton: Skeleton) -> None:
    """Compare every tensor of the model with what the checkpoint stores.

    Args:
        source: From ``Source.read_for``.

    Raises:
        RotqError: a tensor is missing, or has another shape; names the first.
    """
    makings = source.makings or {}
    for name, like in _wanted(skeleton, makings).items():
        making = makings.get(name)
        if making is None:
            raise RotqError(f"the checkpoint has no tensor {name}")
        if making.stored is not None:
            _compare(name, source.shape(making.stored), tuple(like.shape))
    for group in dict.fromkeys(making.group for making in makings.values()):
        if group.make is not None:
            _check_group(group, source, skeleton)


def with_tied(makings: dict[str, Making], skeleton: Skeleton) -> dict[str, Making]:
    """Tied tensors inside the blocks too, which are loaded one block at a time."""
    prefix, ties = f"{skeleton.adapter.blocks}.", skeleton.ties
    names = {name: stored_under(name, makings, ties) for name in ties}
    tied = {
        name: makings[stored]
        for name, stored in names.items()
        if name.startswith(prefix) and stored in makings
    }
    return makings | tied


def _wanted(skeleton: Skeleton, present: Collection[str]) -> dict[str, Tensor]:
    """What the model must be given, by the names under which a checkpoint has it, on meta.

    Args:
        present: Names that the checkpoint has. Of tied tensors one is wanted, of buffers outside
            the blocks none.
    """
    buffers = {name for name, _ in skeleton.model.named_buffers()}
    wanted = {}
    for name, like in skeleton.model.state_dict().items():
        inside = name.startswith(f"{skeleton.adapter.blocks}.")
        if inside or name in present or (name not in buffers and name not in skeleton.ties):
            wanted[stored_under(name, present, skeleton.ties)] = like
    return wanted


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
