"""Rows of different lengths behind each other in one, so that no padding is computed.

Everything but attention works on single tokens; attention is run for each row by itself (rows of
one length together), positions begin anew with each row. Exact: the products of a row alone.

    with packed_rows(model, lengths):
        logits_1NV = model(input_ids=ids_1N, position_ids=row_positions(model, lengths)).logits

Shape suffixes: N tokens of all rows, H heads, T positions of a row, R rows of one length, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotq.models.attention import dispatch
from rotq.models.attention.online import heads_of
from rotq.models.families.esm import first_position, packed_embeddings

_FIRST: dict[str, Callable[[Any], int]] = {
    "esm": first_position,
    "esmc": lambda _: 0,
    "bert": lambda _: 0,
}
"""Model types that pack, and the position of a row's first token."""


def packs_rows(model: Any) -> bool:
    """Whether a model can be run so: masked, of a known type, with sdpa or online attention."""
    config = model.config
    usable = config._attn_implementation in ("sdpa", dispatch.ONLINE)
    return config.model_type in _FIRST and usable and not getattr(config, "is_decoder", False)


def row_positions(model: Any, lengths: Sequence[int]) -> Tensor:
    """``position_ids`` of rows behind each other, (1, N)."""
    first = _FIRST[model.config.model_type](model.config)
    return torch.cat([torch.arange(first, first + length) for length in lengths])[None]


@contextmanager
def packed_rows(model: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Let every token attend to those of its own row inside the context.

    Args:
        model: One that ``packs_rows``; it is given one row of sum(lengths) tokens, and no mask.
        lengths: Tokens of each row.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kw: Any
    ) -> tuple[Tensor, None]:
        assert mask is None
        heads = heads_of(module).apply(query, key, value)
        return _by_rows(module, heads, lengths, kw), None

    dispatch.register(dispatch.ROWS, attention, mask=_no_mask)
    with ExitStack() as stack:
        stack.enter_context(dispatch.used(model, dispatch.ROWS))
        if model.config.model_type == "esm":
            stack.enter_context(packed_embeddings(model, lengths))
        yield


def _by_rows(
    module: nn.Module, heads: tuple[Tensor, ...], lengths: Sequence[int], kw: dict[str, Any]
) -> Tensor:
    """(1, N, H, D) of queries, keys and values (1, H, N, D)."""
    sdpa, start, found = ALL_ATTENTION_FUNCTIONS["sdpa"], 0, []
    for length, group in groupby(lengths):
        rows = len(list(group))
        part = slice(start, start + rows * length)
        start = part.stop
        some_RHTD = [
            side[0, :, part].unflatten(1, (rows, length)).transpose(0, 1) for side in heads
        ]
        out_RTHD: Tensor = sdpa(module, *some_RHTD, None, **kw)[0]
        found.append(out_RTHD.flatten(0, 1))
    return torch.cat(found)[None]


def _no_mask(*_: Any, **__: Any) -> None:
    """Rows are told apart by their lengths."""
