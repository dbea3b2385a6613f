"""Token embeddings that stay packed, and heads that are tied to one.

    e_i = (q_i - z_i) * s_i * c,     logits = x W^T + b,   W = (q - z) * s

c is 1, or what the family multiplies its embedding by. Rows that are asked for are unpacked, and no
other.

Shape suffixes: V vocabulary, D hidden size, G groups of D, M tokens.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rotq.formats.integer import Grid
from rotq.layers.packed_weight import PackedWeight
from rotq.ops import unpack

SCALED = "embed_scale"
"""Where transformers' embeddings that multiply what they look up keep the factor."""


def embedding_obstacle(module: nn.Module) -> str | None:
    """Why a module cannot be packed as an embedding; None where it can."""
    if not isinstance(module, nn.Embedding):
        return f"it is a {type(module).__name__}, and no table of embeddings"
    if module.max_norm is not None:
        return "it normalizes what it looks up"
    if type(module).forward is not nn.Embedding.forward and not hasattr(module, SCALED):
        return f"what a {type(module).__name__} does with what it looks up is not known"
    return None


class QuantEmbedding(PackedWeight):
    """An embedding that keeps its table packed; it has no gradient."""

    factor: float | None
    """What rows are multiplied by; None leaves them."""

    def __init__(
        self,
        original: nn.Embedding,
        grid: Grid,
        *,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate buffers of the checkpoint's shapes; their values come from the checkpoint.

        Args:
            original: What it stands for, of which ``embedding_obstacle`` has nothing to say; its
                weight may be on meta.
            grid: Its group size must divide the embedding's width.
            scale_dtype: As stored.

        Raises:
            ValueError: the group size does not divide the width.
        """
        shape = (original.num_embeddings, original.embedding_dim)
        dtype = original.weight.dtype
        super().__init__(shape, grid, scale_dtype=scale_dtype, dtype=dtype, device=device)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = original.padding_idx
        self.factor = _factor(original)
        self._is_buffer = SCALED in dict(original.named_buffers())
        self._original = (original,)  # no module of this one: the checkpoint has nothing of it

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) rows of the tokens ``input``, in the dtype of ``weight``."""
        rows = self._rows(input.reshape(-1)).to(self.dtype).view(*input.shape, self.embedding_dim)
        if self.factor is None:
            return rows
        # a buffer is rounded to the dtype before it is multiplied with, a number is not
        return rows * (
            torch.tensor(self.factor, dtype=rows.dtype) if self._is_buffer else self.factor
        )

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The original with its weight, of ``dtype``."""
        original = copy.deepcopy(self._original[0])
        original.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self._is_buffer:
            setattr(original, SCALED, torch.tensor(self.factor, device=self.weight_packed.device))
        return original

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.grid}"

    def _rows(self, ids_M: Tensor) -> Tensor:
        """(M, D) fp32."""
        q_MD = unpack(self.weight_packed[ids_M], self.grid.bits, self.embedding_dim).float()
        scale_MG = self.weight_scale[ids_M].float()
        rows_MGg = q_MD.view(*scale_MG.shape, -1)
        if self.weight_zero_point is not None:
            rows_MGg = rows_MGg - self._zeros(ids_M)[..., None]
        return (rows_MGg * scale_MG[..., None]).flatten(1)

    def _zeros(self, ids_M: Tensor) -> Tensor:
        """(M, G) fp32, of codes that are packed along the vocabulary."""
        assert self.weight_zero_point is not None
        bits, words_WG = self.grid.bits, self.weight_zero_point.to(torch.int64) & 0xFFFFFFFF
        start_M1 = (ids_M * bits)[:, None]
        low_MG = words_WG[start_M1[:, 0] // 32] >> start_M1 % 32
        # a code may straddle a word; the last one has no next, and its codes end in it
        after_M = (start_M1[:, 0] // 32 + 1).clamp(max=len(words_WG) - 1)
        high_MG = words_WG[after_M] << (32 - start_M1 % 32)
        stored_MG = (low_MG | high_MG) & (2**bits - 1)
        return (stored_MG - 2 ** (bits - 1)).float()


class TiedHead(nn.Module):
    """A head without a weight of its own: it multiplies with the table of an embedding."""

    bias: nn.Parameter | None

    def __init__(self, embedding: QuantEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # no module of this one: its buffers are stored once
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = bias

    @property
    def embedding(self) -> QuantEmbedding:
        """What it is tied to."""
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        """(V, D) dense, made at each access, as an embedding's is."""
        return self.embedding.weight

    def forward(self, input: Tensor) -> Tensor:
        """(..., V) logits."""
        return shared_product(self.embedding, input, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def shared_product(table: PackedWeight, x: Tensor, bias_V: Tensor | None) -> Tensor:
    """What a head computes that shares a packed embedding; some rows are dense at a time."""
    return table.product(x, bias_V, in_tiles=True)


def _factor(original: nn.Embedding) -> float | None:
    """As a number: a buffer of it may be on meta, and then the class has it as a scalar too."""
    factor = getattr(original, f"scalar_{SCALED}", getattr(original, SCALED, None))
    return None if factor is None else float(factor)
