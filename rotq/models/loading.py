"""Loading tensors by name, with errors that name them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from rotq.errors import RotqError


class TensorSource(Protocol):
    """What is needed of a checkpoint reader."""

    @property
    def config(self) -> Any:
        """transformers' configuration."""

    def names(self) -> Iterable[str]:
        """Tensor names, as the adapter's module paths spell them."""

    def load(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""


def load_tensors(
    source: TensorSource,
    wanted: dict[str, Tensor],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Load what a module needs, and nothing that does not fit it.

    Args:
        wanted: Names, and tensors of the shapes they must have, on meta.
        device: Where they are put.
        dtype: Of floating point tensors; others keep theirs.

    Raises:
        RotqError: a tensor is missing or has another shape.
    """
    present = set(source.names())
    loaded = {}
    for name, like in wanted.items():
        if name not in present:
            raise RotqError(f"the checkpoint has no tensor {name}")
        tensor = source.load(name)
        if tensor.shape != like.shape:
            raise RotqError(
                f"{name}: the checkpoint has shape {tuple(tensor.shape)}, "
                f"its configuration says {tuple(like.shape)}"
            )
        loaded[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    return loaded
