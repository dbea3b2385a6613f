"""A weight as its codes, scales and zero points, in buffers that are those of the checkpoint.

    W = (q - z) * s,    or    W = level(path) * s,    or    W = level(q) * s / global

Codes are packed along the columns, symbols of paths along the rows; those of a ``PlainGrid`` are
int8, and packed for kernels at each call. Floats of 4 bits are stored as
compressed-tensors has them (``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``): two in a byte, and
scales that are powers of two as the byte of their exponent; E4M3 is stored as it is.

Shape suffixes: N rows, K columns, G groups of K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotq.autocast import lowered
from rotq.formats.floats import FloatGrid
from rotq.formats.integer import Grid, PlainGrid, Quantized, true_scales
from rotq.formats.trellis import Trellis
from rotq.ops import (
    NATIVE_FROM,
    is_native,
    pack,
    packed_levels,
    packed_linear,
    packed_words,
    trellis_linear,
    unpack,
    unpacked_levels,
)

ROWS_AT_ONCE = 4096
"""Are packed and unpacked: in between a weight takes several times its room, and vocabularies are
large."""

KEPT_DTYPES = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
"""Buffers that another dtype would make others of."""


class PackedWeight(nn.Module):
    """What linear layers and embeddings keep in place of a dense weight.

    Buffers have the names and dtypes that they have in the checkpoint.
    """

    as_dense: bool = False
    """On a CPU: products are those of the dense weight bit by bit, which paths are slower at."""
    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor | None
    weight_zero_point: Tensor | None
    weight_global_scale: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        grid: Grid,
        *,
        scale_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate buffers of the checkpoint's shapes; their values come from the checkpoint.

        Args:
            shape: (N, K); the grid's group size must divide K.
            scale_dtype: As stored.
            dtype: Of ``weight``; None is fp32.

        Raises:
            ValueError: the group size does not divide K, or rows are too few for a path.
        """
        super().__init__()
        self.shape, self.grid = shape, grid
        self.dtype = dtype or torch.float32
        N, K = shape
        groups = K // grid.columns_per_group(K)
        scale_NG = torch.ones(N, groups, device=device).to(scale_dtype)
        if isinstance(grid, FloatGrid):
            scale_NG = grid.stored_scales(scale_NG)
        self.register_buffer("weight_scale", _stored(scale_NG))
        stored_shape, global_scale = None, None
        if isinstance(grid, PlainGrid):
            self.register_buffer(
                "weight_packed", torch.zeros(shape, dtype=torch.int8, device=device)
            )
        elif isinstance(grid, FloatGrid):
            stored, packed_dtype = grid.packed_like(N, K)
            self.register_buffer(
                "weight_packed", torch.zeros(stored, device=device).to(packed_dtype)
            )
            if grid.has_global_scale:
                global_scale = torch.ones(1, device=device)
        else:
            stored_shape = torch.tensor(shape, dtype=torch.int64, device=device)
            if isinstance(grid, Trellis):
                grid.ring_rows(N)
                self._allocate("weight_packed", (packed_words(N, grid.bits), K), device)
            else:
                self._allocate("weight_packed", (N, packed_words(K, grid.bits)), device)
        self.register_buffer("weight_shape", stored_shape)
        self.register_buffer("weight_global_scale", global_scale)
        if grid.symmetric:
            self.register_buffer("weight_zero_point", None)
        else:
            self._allocate("weight_zero_point", (packed_words(N, grid.bits), groups), device)

    def pack(self, quantized: Quantized) -> Self:
        """Take codes, scales and zero points, in place of the buffers that were allocated."""
        bits, device = quantized.grid.bits, quantized.q_NK.device
        self.weight_scale = _stored(quantized.scale_NG.contiguous())
        if isinstance(quantized.grid, PlainGrid):
            self.weight_packed = quantized.q_NK
            return self
        if isinstance(quantized.grid, FloatGrid):
            self.weight_scale = quantized.grid.stored_scales(self.weight_scale)
            self.weight_packed = quantized.grid.pack(quantized.q_NK)
            self.weight_global_scale = quantized.global_scale
            return self
        if isinstance(quantized.grid, Trellis):
            self.weight_packed = pack(quantized.q_NK, bits, dim=0)
        else:
            parts = [pack(part_NK, bits) for part_NK in quantized.q_NK.split(ROWS_AT_ONCE)]
            self.weight_packed = parts[0] if len(parts) == 1 else torch.cat(parts)
        self.weight_shape = torch.tensor(quantized.q_NK.shape, dtype=torch.int64, device=device)
        if quantized.zero_NG is not None:
            self.weight_zero_point = pack(quantized.zero_NG, bits, dim=0)
        return self

    def quantized(self) -> Quantized:
        """Codes, scales and zero points, unpacked."""
        if not isinstance(self.grid, Trellis):
            return self._unpacked(slice(None))
        q_NK = unpack(self.weight_packed, self.grid.bits, self.shape[0], dim=0)
        return Quantized(q_NK=q_NK, scale_NG=self.weight_scale, zero_NG=None, grid=self.grid)

    def levels(self) -> Tensor:
        """fp32 (N, G, columns of a group): the weight in units of its scales."""
        grid = self.grid
        if not isinstance(grid, Trellis):
            return self._native_levels() if self._is_native() else self.quantized().levels()
        level_NK = packed_levels(self.weight_packed, self.shape[0], grid.bits, grid.state_bits)
        return level_NK.unflatten(1, (self.weight_scale.shape[1], -1))

    def steps(self) -> Tensor:
        """fp32 (N, G): the scales, the global one counted."""
        return true_scales(self._scales(), self.weight_global_scale)

    def _is_native(self) -> bool:
        packed = self.weight_packed
        is_large = packed.device.type == "cpu" and self.shape[0] * self.shape[1] >= NATIVE_FROM
        is_plain = type(self.grid) is Grid and self.grid.columns_per_group(self.shape[1]) % 8 == 0
        return is_large and is_plain and is_native()

    def _native_levels(self) -> Tensor:
        (N, K), bits = self.shape, self.grid.bits
        zero_NG = None
        if self.weight_zero_point is not None:
            zero_NG = unpack(self.weight_zero_point, bits, N, dim=0)
        groups = self.weight_scale.shape[1]
        return unpacked_levels(self.weight_packed, zero_NG, bits, (N, groups, K // groups))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K) dense weight, computed in fp32 some rows at a time, then cast to ``dtype``."""
        N = self.shape[0]
        if isinstance(self.grid, Trellis):
            return (self.levels() * self.steps()[..., None]).flatten(1).to(dtype)
        if N <= ROWS_AT_ONCE:
            return self.quantized().dequantize(dtype)
        weight_NK = torch.empty(self.shape, dtype=dtype, device=self.weight_packed.device)
        for start in range(0, N, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            weight_NK[rows] = self._unpacked(rows).dequantize(dtype)
        return weight_NK

    def _unpacked(self, rows: slice) -> Quantized:
        N, K = self.shape
        scale_NG, zero_NG = self._scales()[rows], None
        if isinstance(self.grid, FloatGrid):
            return Quantized(
                q_NK=self.grid.unpack(self.weight_packed[rows]),
                scale_NG=scale_NG,
                zero_NG=None,
                grid=self.grid,
                global_scale=self.weight_global_scale,
            )
        if isinstance(self.grid, PlainGrid):
            return Quantized(
                q_NK=self.weight_packed[rows], scale_NG=scale_NG, zero_NG=None, grid=self.grid
            )
        if self.weight_zero_point is not None:
            zero_NG = unpack(self.weight_zero_point, self.grid.bits, N, dim=0)[rows]
        q_NK = unpack(self.weight_packed[rows], self.grid.bits, K)
        return Quantized(q_NK=q_NK, scale_NG=scale_NG, zero_NG=zero_NG, grid=self.grid)

    def _scales(self) -> Tensor:
        """(N, G) as they are meant: of powers of two exponents are stored, of blocks one row."""
        if isinstance(self.grid, FloatGrid) and self.grid.block_rows > 1:
            return self.grid.row_scales(self.weight_scale, self.shape[0])
        is_power = self.weight_scale.dtype == torch.uint8
        return self.weight_scale.view(torch.float8_e8m0fnu) if is_power else self.weight_scale

    @property
    def weight(self) -> Tensor:
        """(N, K) dense, made at each access, for models that look at it; nothing is written back.

        It counts as loaded: transformers initializes what does not.
        """
        weight_NK = self.dequantize(self.dtype)
        weight_NK._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight_NK

    def product(self, x: Tensor, bias_N: Tensor | None, *, in_tiles: bool = False) -> Tensor:
        """x W^T + b over the last axis of ``x``, in its dtype; differentiable in both.

        Args:
            in_tiles: On a CPU, too, unpack some rows at a time; for weights that are larger than
                the rest of a model in use.
        """
        # for the backward pass the operator keeps the codes, F.linear would keep the dense weight
        is_differentiated = x.requires_grad and torch.is_grad_enabled()
        # native code needs no dense weight, and states take more memory than codes
        is_path = isinstance(self.grid, Trellis) and x.device.type == "cpu" and not self.as_dense
        if isinstance(self.grid, FloatGrid):  # no kernel multiplies with these codes
            return F.linear(x, self.dequantize(x.dtype), bias_N)
        if x.dtype == torch.float64 or not (x.is_cuda or is_differentiated or in_tiles or is_path):
            return F.linear(x, self.dequantize(x.dtype), bias_N)
        if isinstance(self.grid, Trellis):
            return trellis_linear(
                lowered(x),
                self.weight_packed,
                self.weight_scale,
                bias_N,
                bits=self.grid.bits,
                state_bits=self.grid.state_bits,
            )
        plain = isinstance(self.grid, PlainGrid)
        return packed_linear(
            lowered(x),
            pack(self.weight_packed, self.grid.bits) if plain else self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            bias_N,
            bits=self.grid.bits,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Scales keep the dtype that they are stored in: another would be another weight."""
        kept = {
            name: tensor
            for name in KEPT_DTYPES
            if (tensor := getattr(self, name, None)) is not None
        }
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        device = self.weight_packed.device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self

    def _allocate(
        self, name: str, shape: tuple[int, int], device: torch.device | str | None
    ) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=torch.int32, device=device))


def _stored(scale_NG: Tensor) -> Tensor:
    """Scales as a buffer: powers of two as the byte of their exponent."""
    is_power = scale_NG.dtype == torch.float8_e8m0fnu
    return scale_NG.view(torch.uint8) if is_power else scale_NG


def multiply_as_dense(model: nn.Module) -> None:
    """Let all packed layers of a model compute on a CPU what dense ones would, bit by bit."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.as_dense = True
