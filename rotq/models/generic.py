"""Models of which less is known than an adapter says: the list of blocks, or their stream too.

What can be packed in the blocks is found by running them (see survey.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from rotq.errors import RotqError
from rotq.models.adapter import Adapter, Site
from rotq.models.experts import UnfusedExperts
from rotq.models.multimodal import IMAGE_WRITERS, text_model, text_path
from rotq.models.survey import Kind, kind_of
from rotq.models.task import text_config


@dataclass(frozen=True, kw_only=True)
class GenericAdapter(Adapter):
    """Every linear layer of a block that can be packed is in a site."""

    found: Mapping[Kind, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """By kind of block, in the order in which they are called (``Survey.sites``)."""

    @property
    def is_generic(self) -> bool:
        """True."""
        return True

    def sites(self, block: nn.Module) -> tuple[Site, ...]:
        """Named by the first linear layer of each."""
        found = self.found[kind_of(block)]
        return tuple(Site(name=linears[0], linears=linears) for linears in found)

    @property
    def attention(self) -> str:
        """Unknown."""
        return ""

    def has_experts(self, block: nn.Module) -> bool:
        """Whether some were unfused in it."""
        return any(isinstance(module, UnfusedExperts) for module in block.modules())


@dataclass(frozen=True, kw_only=True)
class StreamAdapter(GenericAdapter):
    """A family whose blocks differ, and of which R1 needs to know the residual stream only.

    A pattern is a regular expression for the whole path of a module inside a block.
    """

    readers: Mapping[str, str]
    """Norm to the pattern of what reads it; a block may lack norms and readers."""
    stream_writers: str
    """Pattern of the linears whose outputs are added to the residual stream."""
    value_rotation: bool = False
    down_rotation: bool = False

    def norms(self, block: nn.Module) -> dict[str, tuple[str, ...]]:
        """By the patterns."""
        present = dict(block.named_modules())
        return {
            norm: _matching(block, pattern)
            for norm, pattern in self.readers.items()
            if norm in present
        }

    def writers(self, block: nn.Module) -> tuple[str, ...]:
        """By the pattern."""
        return _matching(block, self.stream_writers)


def _matching(block: nn.Module, pattern: str) -> tuple[str, ...]:
    """Paths of modules with a matrix; routers are no linear layers."""
    matrices = (
        name.removesuffix(".weight")
        for name, parameter in block.named_parameters()
        if name.endswith(".weight") and parameter.ndim == 2
    )
    return tuple(path for path in matrices if re.fullmatch(pattern, path))


def generic_adapter(model: nn.Module) -> Adapter:
    """An adapter without rotations, for a decoder of which only the list of blocks is known.

    Args:
        model: A transformers decoder, on any device; its parameters may be on meta. Of a model of
            several parts the text decoder is meant.

    Raises:
        RotqError: there is not exactly one list of ``num_hidden_layers`` blocks.
    """
    text, part = text_model(model), text_path(model)
    num_blocks = getattr(text_config(model.config), "num_hidden_layers", None)
    if num_blocks is None:
        raise RotqError(
            f"{type(model).__name__}: no num_hidden_layers in its configuration; "
            "only text decoders can be quantized"
        )
    found = [
        name
        for name, module in text.named_modules(prefix=part)
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks
    ]
    outermost = [name for name in found if not any(name.startswith(f"{o}.") for o in found)]
    if len(outermost) != 1:
        raise RotqError(
            f"{type(model).__name__}: expected one list of {num_blocks} decoder blocks, "
            f"found {', '.join(outermost) or 'none'}"
        )
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        raise RotqError(f"{type(model).__name__} does not say what embeds its tokens") from None
    return GenericAdapter(
        family="generic",
        architectures=(type(model).__name__,),
        embedding=_path(model, embedding),
        blocks=outermost[0],
        final_norm="",
        head=_path(model, model.get_output_embeddings()),  # type: ignore[operator]
        residual_rotation=False,
        value_rotation=False,
        down_rotation=False,
        part=part,
    )


def located(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter with the model's own paths, where it is one that leaves them to be found.

    In a model of several parts the family's paths lead from where its text decoder has its blocks.
    """
    part = text_path(model)
    if not part and not isinstance(adapter, StreamAdapter):
        return adapter
    found = generic_adapter(model)
    own, inside = (path.rpartition(".")[0] for path in (adapter.blocks, found.blocks))

    def moved(path: str) -> str:
        return inside + path.removeprefix(own) if part and path.startswith(f"{own}.") else path

    return replace(
        adapter,
        embedding=found.embedding,
        blocks=found.blocks,
        head=found.head,
        final_norm=moved(adapter.final_norm),
        other_writers=tuple(moved(path) for path in adapter.other_writers),
        part=part,
        image_writers=IMAGE_WRITERS.get(type(model).__name__, ""),
    )


def _path(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")
