"""What a basis does to the columns and rows of each linear layer of a block.

The algebra is in ``fuse``, which applies these maps to weights; the loss of single layers applies
them to features as well.

Shape suffixes: N out features, K in features, D hidden size, H KV heads, d head size, E experts,
I features between up and down.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from rotq.errors import RotqError
from rotq.models.adapter import Adapter
from rotq.rotations.basis import Basis, Scales
from rotq.rotations.hadamard import fast_hadamard


class LinearMap:
    """x -> x diag(before) M diag(after) over the last axis; what is None is left out.

    M may be (H, d, d): runs of heads that share a matrix, with ``before`` (H, d). The query heads
    one KV head lie next to each other.
    """

    def __init__(
        self,
        before: Tensor | None = None,
        matrix: Tensor | None = None,
        after: Tensor | None = None,
        *,
        online: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.before, self.matrix, self.after = before, matrix, after
        self.online = online
        """x -> x M, where M is an orthogonal matrix that is never built."""
        given = [tensor for tensor in (before, matrix, after) if tensor is not None]
        self.dtype = given[0].dtype if given else None

    @functools.cached_property
    def folded(self) -> Tensor:
        """diag(before) M diag(after), (K, K) or (H, d, d)."""
        assert self.matrix is not None
        folded = self.matrix if self.before is None else self.before[..., None] * self.matrix
        return folded if self.after is None else folded * self.after

    def __call__(self, x: Tensor) -> Tensor:
        if self.matrix is None or self.online:
            for factor in (self.before, self.after):
                if factor is not None:
                    x = _times(x, factor.to(x.device))
            return x if self.online is None else self.online(x)
        folded = self.folded.to(x.device)
        if folded.ndim == 2:
            return x @ folded
        H, d, _ = folded.shape
        heads = x.reshape(*x.shape[:-1], H, -1, d)  # [..., H, heads per group, d] @ [H, d, d]
        return (heads @ folded).reshape(x.shape)

    def features(self, x: Tensor) -> Tensor:
        """What is read, where a weight's columns are mapped so: x diag(before)^-1 M diag(after)^-1.

        The matrix is orthogonal, so that products with weights stay as they are.
        """
        before, after = (None if f is None else 1 / f for f in (self.before, self.after))
        return LinearMap(before, self.matrix, after, online=self.online)(x)

    def on_rows(self, weight_NK: Tensor) -> Tensor:
        """The map of what a layer writes: it acts on the weight's first axis."""
        if self.matrix is not None and self.matrix.ndim == 2 and not self.online:
            return self.folded.to(weight_NK.device).T @ weight_NK
        return self.on_last(weight_NK.T).T

    def on_last(self, x: Tensor) -> Tensor:
        """The map of the last features, where a linear layer is q, k and v in one."""
        if self.matrix is None or self.matrix.ndim == 2:
            return self(x)
        size = self.matrix.shape[:2].numel()
        return torch.cat((x[..., :-size], self(x[..., -size:])), dim=-1)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply features by factors, (K,) or (H, d) repeated over the heads of a group."""
    if factor.ndim == 1:
        return x * factor
    H, d = factor.shape
    return (x.reshape(*x.shape[:-1], H, -1, d) * factor[:, None]).reshape(x.shape)


def block_maps(
    block: nn.Module,
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    basis: Basis,
    layer_index: int,
) -> tuple[dict[str, LinearMap], dict[str, LinearMap]]:
    """What a basis does to the columns (``reads``) and rows (``writes``) of each linear's weight.

    Args: as of ``fused_tensors``.

    Returns:
        By path inside the block; a linear that is in neither stays as it is.
    """
    scales = Scales() if basis.scales is None else basis.scales[layer_index]
    scale_of = norm_scales(adapter, scales)
    reads: dict[str, LinearMap] = {}
    for norm, readers in adapter.norms(block).items():
        gain_D = None
        if basis.residual_DD is not None:
            gain_D = gain(f"{norm}.weight", tensors, adapter, basis.residual_DD)
        reads |= dict.fromkeys(readers, LinearMap(gain_D, basis.residual_DD, scale_of.get(norm)))
    writes = dict.fromkeys(adapter.writers(block), LinearMap(matrix=basis.residual_DD))
    _add_heads(reads, writes, adapter, basis, scales, layer_index)
    _add_up(reads, writes, block, adapter, basis, layer_index)
    return reads, writes


def norm_scales(adapter: Adapter, scales: Scales) -> dict[str, Tensor | None]:
    """What is read behind each norm of a block is divided by this."""
    return {adapter.attention_norm: scales.qkv_D, adapter.mlp_norm: scales.gate_up_D}


def gain(name: str, tensors: Mapping[str, Tensor], adapter: Adapter, like: Tensor) -> Tensor | None:
    """A norm's gain (D), in the dtype and on the device of ``like``; None where it has none.

    Args:
        name: Of its weight.
    """
    weight_D = tensors.get(name)
    return None if weight_D is None else adapter.norm_offset + weight_D.to(like.device, like.dtype)


def _add_heads(
    reads: dict[str, LinearMap],
    writes: dict[str, LinearMap],
    adapter: Adapter,
    basis: Basis,
    scales: Scales,
    layer_index: int,
) -> None:
    """R2, S of values, and S of queries and keys where no norm stands behind them."""
    R_Hdd = None if basis.value is None else basis.value[layer_index]
    S_HK = scales.value_HK
    if R_Hdd is None and S_HK is None and scales.query_key_HK is None:
        return
    writes[adapter.value] = LinearMap(None if S_HK is None else 1 / S_HK, R_Hdd)
    reads[adapter.attention_output] = LinearMap(S_HK, R_Hdd)
    if scales.query_key_HK is not None and not adapter.query_norm:
        writes[adapter.query] = LinearMap(1 / scales.query_key_HK)
        writes[adapter.key] = LinearMap(scales.query_key_HK)


def _add_up(
    reads: dict[str, LinearMap],
    writes: dict[str, LinearMap],
    block: nn.Module,
    adapter: Adapter,
    basis: Basis,
    layer_index: int,
) -> None:
    """S between up and down, and R4 behind it: its signs and Hadamard."""
    if basis.inputs:
        for path in online_layers(block, adapter, basis):
            size = cast(nn.Linear, block.get_submodule(path)).in_features
            reads[path] = _online_map(basis, size, None)
        return
    scales = Scales() if basis.scales is None else basis.scales[layer_index]
    if basis.down is None and scales.up_EI is None:
        return
    ups, downs = adapter.mlp_ups(block), adapter.mlp_writers(block)
    for expert, (up, down) in enumerate(zip(ups, downs, strict=True)):
        factors_I = None if scales.up_EI is None else scales.up_EI[expert]
        if factors_I is not None:
            writes[up] = LinearMap(1 / factors_I)
        if basis.down is None:
            reads[down] = LinearMap(factors_I)
        else:
            size = cast(nn.Linear, block.get_submodule(down)).in_features
            reads[down] = _online_map(basis, size, factors_I)


def _online_map(basis: Basis, size: int, factors_I: Tensor | None) -> LinearMap:
    """Factors, then R4's signs and Hadamard, of a layer that reads ``size`` features."""
    signs_R = basis.down_signs(size)
    if size % len(signs_R):
        raise RotqError(f"rotated blocks of {len(signs_R)} do not divide {size} features")
    signs_I = signs_R.repeat(size // len(signs_R)).to(basis.dtype)
    factors_I = signs_I if factors_I is None else signs_I.to(factors_I.device) * factors_I
    return LinearMap(factors_I, online=functools.partial(fast_hadamard, n=len(signs_R)))


def online_layers(block: nn.Module, adapter: Adapter, basis: Basis) -> tuple[str, ...]:
    """Paths of the linear layers whose input R4 rotates at run time."""
    if basis.down is None:
        return ()
    if basis.inputs:
        return tuple(path for site in adapter.sites(block) for path in site.linears)
    return adapter.mlp_writers(block)
