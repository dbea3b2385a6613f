"""Packed models made dense, and why some of those are not saved."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from rotq.checkpoint.packed_embedding import make_embeddings_dense
from rotq.checkpoint.scheme import Scheme
from rotq.errors import RotqError
from rotq.layers.online_heads import UNTOUCHED
from rotq.layers.quant_linear import QuantLinear


def make_dense(model: nn.Module, scheme: Scheme, dtype: torch.dtype) -> None:
    """Replace every packed layer by the dense one of the same function, in place.

    What happens at run time goes on. Such a model refuses ``save_pretrained``: its dense weights
    are those of another function where nothing happens at run time.

    Args:
        scheme: Of the checkpoint that it was loaded from.
    """
    make_embeddings_dense(model, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, module.dense(dtype))
    happens = " and ".join(_at_run_time(scheme))
    if happens:
        model.save_pretrained = functools.partial(_refuse, happens)  # type: ignore[assignment]


def _at_run_time(scheme: Scheme) -> list[str]:
    """What a dense checkpoint has no words for."""
    kinds = {
        "rotates inputs": bool(scheme.rotated),
        "turns the residual stream": scheme.turns_residual,
        "rounds inputs": any(group.input_grid for group in scheme.groups),
        "rotates or rounds heads": scheme.heads != UNTOUCHED,
    }
    return [kind for kind, happens in kinds.items() if happens]


def _refuse(happens: str, *_: Any, **__: Any) -> None:
    raise RotqError(
        f"the model {happens} at run time, and dense weights without that are another model: save "
        "it packed, as it was loaded"
    )
