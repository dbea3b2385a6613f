"""A block of vLLM's cache as a page of ours.

All that is kept of a token lies in its own block, at its own place there: so a block can be shared,
zeroed, moved and freed like any other. Of all KV heads of a rank a block holds, one behind the
other,

    key words, value words, sign words   int32 (H, S, W)
    the first tokens of a sequence       (2, H, N, D) in the model's dtype, keys and values whole
    key norms, value norms, gammas       (H, S)

The room for first tokens is in every block, and used in the first one of a sequence: workers are
not told when a block is freed or shared, so there can be no table beside the blocks.

Shape suffixes: P blocks, H KV heads, S tokens of a block, C bytes of a token and head, N first
tokens (sinks), D head width, W words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.ops import KVFormat, KVPages

_WORDS = ("k_codes", "v_codes", "k_sign")
_NORMS = ("k_norm", "v_norm", "k_gamma")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Views of a layer's blocks."""

    pages: KVPages
    whole_P2HND: Tensor
    """Keys and values of the first tokens of the sequence that begins in a block."""


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Where things are in a block."""

    format: KVFormat
    """With the block's tokens as ``page_size``."""
    sinks: int
    dtype: torch.dtype
    """Of the model."""

    @property
    def bytes_per_token(self) -> int:
        """C: of one KV head, first tokens and rounding up included."""
        form = self.format
        whole = 2 * self.sinks * form.head_dim * self.dtype.itemsize
        return form.bytes_per_token + -(-whole // form.page_size)

    def view(self, block_PHSC: Tensor) -> Blocks:
        """Take blocks apart; nothing is copied.

        Args:
            block_PHSC: int8, each block contiguous.

        Raises:
            RotqError: the blocks are laid out in another way.
        """
        H, S, C = block_PHSC.shape[1:]
        if self.format.page_size != S or self.bytes_per_token != C:
            raise RotqError(
                f"blocks of {S} tokens and {C} bytes each, made for {self.format.page_size} and "
                f"{self.bytes_per_token}"
            )
        if not block_PHSC[:1].is_contiguous():
            raise RotqError("rotq_kv: the bytes of a block must be contiguous (layout LBHNC)")
        taken = _Taken(block_PHSC.flatten(1))
        like = KVPages.empty(self.format, 1, H, device="meta")
        parts = {name: taken.like(getattr(like, name)) for name in _WORDS}
        D = self.format.head_dim
        whole_12HND = torch.empty(1, 2, H, self.sinks, D, dtype=self.dtype, device="meta")
        whole_P2HND = taken.like(whole_12HND)
        parts |= {name: taken.like(getattr(like, name)) for name in _NORMS}
        assert whole_P2HND is not None
        pages: Any = parts
        return Blocks(pages=KVPages(format=self.format, **pages), whole_P2HND=whole_P2HND)


class _Taken:
    """Parts of blocks of bytes, one behind the other."""

    def __init__(self, bytes_PB: Tensor) -> None:
        self.bytes_PB, self.at = bytes_PB, 0

    def like(self, one: Tensor | None) -> Tensor | None:
        """The next part, of the shape behind the first axis and the dtype of ``one``."""
        if one is None:
            return None
        shape = one.shape[1:]
        width = math.prod(shape) * one.dtype.itemsize
        part_PB = self.bytes_PB[:, self.at : self.at + width]
        self.at += width
        return part_PB.view(one.dtype).unflatten(-1, shape)
