"""Attention by name: layers of transformers run what ``config._attn_implementation`` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rotq.errors import RotqError

ONLINE, OBSERVED, REPLACED = "rotq_online", "rotq_observed", "rotq_replaced"
ROWS, MAPS = "rotq_rows", "rotq_maps"
POOLED = "rotq_pooled"
"""Of a server's pages; the others are of this package."""


def register(
    name: str, attention: Callable[..., Any], mask: Callable[..., Any] = sdpa_mask
) -> None:
    """Make a name known to transformers, with the mask that a model makes for it."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def use(module: nn.Module, name: str) -> None:
    """Let every layer inside ``module`` run the attention ``name`` from now on.

    Args:
        module: A model of transformers, or a part of one; parameters may be on meta.

    Raises:
        RotqError: the model does not dispatch its attention by name.
    """
    if not isinstance(module, PreTrainedModel):
        for config in _configs(module):
            config._attn_implementation = name
        return
    try:
        module.set_attn_implementation(name)
    except ValueError as error:
        raise RotqError(f"{type(module).__name__}: {' '.join(str(error).split())}") from None
    # transformers only warns where a model's attention cannot be set
    if module.config._attn_implementation != name:
        raise RotqError(f"{type(module).__name__} does not let its attention be set")


@contextmanager
def used(module: nn.Module, name: str) -> Iterator[None]:
    """``use`` inside the context."""
    before = names(module)
    try:
        use(module, name)
        yield
    finally:
        put_back(before)


def names(module: nn.Module) -> list[tuple[Any, str]]:
    """What each configuration inside ``module`` says now, for ``put_back``."""
    return [(config, config._attn_implementation) for config in _configs(module)]


def put_back(before: list[tuple[Any, str]]) -> None:
    """Let configurations say again what they said when ``names`` was called."""
    for config, earlier in before:
        config._attn_implementation = earlier


def _configs(module: nn.Module) -> list[Any]:
    """The configurations that modules hold, each once; layers ask theirs at each call."""
    held = [part.config for part in module.modules() if hasattr(part, "config")]
    return list({id(config): config for config in held}.values())
