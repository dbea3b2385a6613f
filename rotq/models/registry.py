"""Which adapter serves which checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from rotq.errors import RotqError
from rotq.models.adapter import Adapter, Site
from rotq.models.experts import UnfusedExperts
from rotq.models.families import (
    bert,
    esm,
    esmc,
    gemma3,
    gpt2,
    llama,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from rotq.models.survey import Kind, kind_of
from rotq.models.task import architectures

_FAMILIES = (llama, qwen2, qwen3, gemma3, mixtral, qwen3_moe, gpt2, esm, esmc, bert)

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
            the language model of its ``model_type`` does.

    Raises:
        RotqError: none is known; names the supported families and what works without one.
    """
    names = architectures(config)
    for name in names:
        if name in ADAPTERS:
            return ADAPTERS[name]
    families = ", ".join(sorted({adapter.family for adapter in ADAPTERS.values()}))
    raise RotqError(
        f"no adapter for {' or '.join(names) or config.model_type}; rotation is supported for "
        f"{families}. Other models can be quantized without it (rotation.residual=none, "
        "rotation.value=none, rotation.attention=none, rotation.down=none, kv_cache.bits=16)"
    )


def adapter_for(model: nn.Module) -> Adapter:
    """The family's adapter, or the generic one, which allows no rotation."""
    if any(name in ADAPTERS for name in architectures(model.config)):
        return find_adapter(model.config)
    return generic_adapter(model)


def known_renames(config: Any) -> tuple[tuple[str, str], ...]:
    """Those of the family's adapter; none where the family is not known."""
    found = [ADAPTERS[name] for name in architectures(config) if name in ADAPTERS]
    return found[0].renames if found else ()


def with_transposed(adapter: Adapter, convolutions: Iterable[str]) -> Adapter:
    """The adapter of a model some of whose linear layers were Conv1D, which it need not know.

    Args:
        convolutions: Their names.
    """
    leaves = sorted({name.rpartition(".")[2] for name in convolutions})
    if adapter.transposed or not leaves:
        return adapter
    return replace(adapter, transposed=rf"(^|\.)({'|'.join(map(re.escape, leaves))})\.weight$")


def generic_adapter(model: nn.Module) -> Adapter:
    """An adapter without rotations, for a decoder of which only the list of blocks is known.

    Args:
        model: A transformers decoder, on any device; its parameters may be on meta.

    Raises:
        RotqError: there is not exactly one list of ``num_hidden_layers`` blocks.
    """
    num_blocks = getattr(model.config, "num_hidden_layers", None)
    if num_blocks is None:
        raise RotqError(
            f"{type(model).__name__}: no num_hidden_layers in its configuration; "
            "only text decoders can be quantized"
        )
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks
    ]
    outermost = [name for name in found if not any(name.startswith(f"{o}.") for o in found)]
    if len(outermost) != 1:
        raise RotqError(
            f"{type(model).__name__}: expected one list of {num_blocks} decoder blocks, "
            f"found {', '.join(outermost) or 'none'}"
        )
    return GenericAdapter(
        family="generic",
        architectures=(type(model).__name__,),
        embedding=_path(model, model.get_input_embeddings()),  # type: ignore[operator]
        blocks=outermost[0],
        final_norm="",
        head=_path(model, model.get_output_embeddings()),  # type: ignore[operator]
        residual_rotation=False,
        value_rotation=False,
        down_rotation=False,
    )


@dataclass(frozen=True, kw_only=True)
class GenericAdapter(Adapter):
    """Every linear layer of a block that can be packed is a site of its own."""

    linears: Mapping[Kind, tuple[str, ...]] = field(default_factory=dict)
    """By kind of block, in the order in which they are called (``Survey.linears``)."""

    @property
    def is_generic(self) -> bool:
        """True."""
        return True

    def sites(self, block: nn.Module) -> tuple[Site, ...]:
        """One site per linear layer."""
        return tuple(Site(name=path, linears=(path,)) for path in self.linears[kind_of(block)])

    @property
    def attention(self) -> str:
        """Unknown."""
        return ""

    def has_experts(self, block: nn.Module) -> bool:
        """Whether some were unfused in it."""
        return any(isinstance(module, UnfusedExperts) for module in block.modules())


def _path(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")
