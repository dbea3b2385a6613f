"""Which adapter serves which checkpoint."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from typing import Any

from torch import nn

from rotq.errors import RotqError
from rotq.models import families
from rotq.models.adapter import Adapter
from rotq.models.generic import generic_adapter, located
from rotq.models.task import architectures, is_multimodal, text_config

_FAMILIES = [
    import_module(f"{families.__name__}.{found.name}")
    for found in pkgutil.iter_modules(families.__path__)
]
"""Every module of the folder: a new file there is all that a family needs."""

ADAPTERS: dict[str, Adapter] = {
    architecture: module.ADAPTER
    for module in _FAMILIES
    for architecture in module.ADAPTER.architectures
}
"""Architecture, as checkpoints name it, to adapter."""


def find_adapter(config: Any) -> Adapter:
    """The adapter of a model configuration.

    Args:
        config: transformers' configuration. Its ``architectures`` decide; where they are absent,
            the language model of its ``model_type`` does. A model of several parts that has none of
            its own is of its text part's family.

    Raises:
        RotqError: none is known; says what works without one.
    """
    known = _known(config)
    if known is not None:
        return known
    names = architectures(config)
    raise RotqError(
        f"no adapter for {' or '.join(names) or config.model_type}, which is needed for rotations "
        "(docs/models.md lists the families that have one); it can be quantized without "
        "(rotation.residual=none, rotation.value=none, rotation.attention=none, "
        "rotation.down=none, kv_cache.bits=16)"
    )


def adapter_for(model: nn.Module) -> Adapter:
    """The family's adapter, or the generic one, which allows no rotation."""
    known = _known(model.config)
    return generic_adapter(model) if known is None else located(known, model)


def known_renames(config: Any) -> tuple[tuple[str, str], ...]:
    """Those of the family's adapter; none where the family is not known."""
    known = _known(config)
    return () if known is None else known.renames


def _known(config: Any) -> Adapter | None:
    names = list(architectures(config))
    if is_multimodal(config):
        names += architectures(text_config(config))
    return next((ADAPTERS[name] for name in names if name in ADAPTERS), None)


def with_transposed(adapter: Adapter, convolutions: Iterable[str]) -> Adapter:
    """The adapter of a model some of whose linear layers were Conv1D, which it need not know.

    Args:
        convolutions: Their names.
    """
    leaves = sorted({name.rpartition(".")[2] for name in convolutions})
    if adapter.transposed or not leaves:
        return adapter
    return replace(adapter, transposed=rf"(^|\.)({'|'.join(map(re.escape, leaves))})\.weight$")
