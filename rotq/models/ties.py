"""Tensors that a model has under several names, of which a checkpoint may store any one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotq.models.adapter import Adapter


def ties_of(model: Any, adapter: Adapter) -> dict[str, str]:
    """The name of each tied tensor to the name of the one it is tied to; transformers' own ties.

    Args:
        model: Of transformers; its configuration says whether it is tied at all.
    """
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if getattr(model.config, "tie_word_embeddings", False) and adapter.head:
        ties.setdefault(f"{adapter.head}.weight", f"{adapter.embedding}.weight")
        for tied, other in adapter.tied_biases:
            ties.setdefault(tied, other)
    return {name: other for name, other in ties.items() if name != other}


def stored_under(name: str, present: Collection[str], ties: Mapping[str, str]) -> str:
    """The name under which a checkpoint has a tensor: its own, or that of one it is tied with.

    Args:
        present: Names that the checkpoint has.

    Returns:
        ``name`` itself where the checkpoint has it under none.
    """
    if name in present:
        return name
    other = ties.get(name, name)
    tied = [name for name, to in ties.items() if to == other]
    return next((found for found in (other, *tied) if found in present), name)
