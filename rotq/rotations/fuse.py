"""Fusing a basis into a model's weights, without changing its function.

Activations are rows, a linear layer is y = x W^T + b. With R1 on the residual stream, g the gain
of the norm in front of a reader, per KV head h an R2, and S what ``Scales`` holds:

    embedding        E   <- E R1
    readers          W   <- W diag(g) R1 diag(S)    q, k, v, gate, up, router, head;  g <- 1 / S
    writers          W   <- R1^T W,  b <- b R1      o, down
    v, head h        W_h <- R2_h^T diag(1/S_h) W_h,  b_h <- b_h diag(1/S_h) R2_h
    o, columns of each query head in group h:  W <- W diag(S_h) R2_h
    q, k, head h     W_h <- diag(1/S_h) W_h,  W_h <- diag(S_h) W_h, biases too; behind a norm on
                     the heads its gain is divided or multiplied instead
    up               W   <- diag(1/S) W,  b <- b diag(1/S)
    R3: nothing; queries and keys are multiplied by H online
    R4: down         W   <- W diag(S) D H, its input is multiplied by D H online; H may be the
                     butterfly of the layer's angles

RMSNorm without gain commutes with R1, which is why g has to be folded first; without R1 it stays
and is divided by S. What LayerNorm needs besides is in ``layernorm``. The order of factors matters:
S of a norm stands behind R1, S of values before R2, S of up before D H. All products are taken in
the basis' dtype, fp64 in a job. (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406, whose names
R1 to R4 are used; OSTQuant, arXiv 2501.13987, for S. Unlike QuaRot's code the embedding is not
centred: that changes an RMSNorm model.)

Shape suffixes: N out features, K in features, D hidden size, H KV heads, d head size.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rotq.heads import OnlineHeads
from rotq.layers import OnlineLinear
from rotq.models.online_attention import set_heads
from rotq.rotations.basis import Basis, Scales
from rotq.rotations.butterfly import fast_butterfly, to_codes
from rotq.rotations.hadamard import fast_hadamard, random_signs
from rotq.rotations.layernorm import fold_final_bias, fold_layer_norm

if TYPE_CHECKING:
    from rotq.models.adapter import Adapter

_ROWS_AT_ONCE = 1024
"""Rows of an embedding that are held in fp64 at a time."""


@torch.no_grad()
def fuse_block(block: nn.Module, adapter: Adapter, basis: Basis, layer_index: int) -> None:
    """Fuse a basis into one block, in place, and let its attention apply R3.

    Weights keep their dtype; pass an fp64 block to have them unrounded. With R4 the down
    projections become OnlineLinear. An identity basis changes nothing.

    Args:
        layer_index: Which of the basis' value matrices and scales are this block's.
    """
    if adapter.layer_norm and basis.residual_DD is not None:
        _fold_layer_norms(block, adapter, basis.residual_DD)
    parameters = dict(block.named_parameters())
    for name, tensor in fused_tensors(block, parameters, adapter, basis, layer_index):
        parameters[name].copy_(tensor)
    rotate_online(block, adapter, basis, layer_index)


def _fold_layer_norms(block: nn.Module, adapter: Adapter, R_DD: Tensor) -> None:
    """Leave the block's LayerNorms with gain 1, in place; see ``layernorm``."""
    for norm, readers in (
        (adapter.attention_norm, adapter.attention_readers),
        (adapter.mlp_norm, (*adapter.mlp_readers(block), *adapter.routers(block))),
    ):
        linears = [cast(nn.Linear, block.get_submodule(path)) for path in readers]
        fold_layer_norm(cast(nn.LayerNorm, block.get_submodule(norm)), linears, R_DD)


@torch.no_grad()
def rotate_online(block: nn.Module, adapter: Adapter, basis: Basis, layer_index: int) -> None:
    """Apply R3 and R4 from now on, where the basis has them; weights stay as they are."""
    if basis.attention is not None:
        set_heads(block.get_submodule(adapter.attention), OnlineHeads(rotated=True))
    if basis.down is None:
        return
    for expert, path in enumerate(adapter.mlp_writers(block)):
        linear = cast(nn.Linear, block.get_submodule(path))
        signs_K = random_signs(linear.in_features, basis.down_seed).to(linear.weight.device)
        codes_AMQ = None
        if basis.down_angles is not None:
            codes_AMQ = to_codes(basis.down_angles[layer_index][expert])
        parent, _, leaf = path.rpartition(".")
        online = OnlineLinear.wrap(linear, signs_K=signs_K, angles_AMQ=codes_AMQ)
        setattr(block.get_submodule(parent), leaf, online)


def fused_tensors(
    block: nn.Module,
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    basis: Basis,
    layer_index: int,
) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a block that a basis changes, with the basis fused, one at a time.

    Differentiable in the basis. A consumer may overwrite each of ``tensors`` as it comes.

    Args:
        block: Its structure; its parameters may be on meta.
        tensors: The original parameters by path inside the block; cast to the basis' dtype.

    Yields:
        Path and tensor of the basis' dtype.
    """
    reads, writes = block_maps(block, tensors, adapter, basis, layer_index)
    for path in dict.fromkeys((*reads, *writes)):
        yield from _fused_linear(path, tensors, reads.get(path, Map()), writes.get(path, Map()))
    scales = Scales() if basis.scales is None else basis.scales[layer_index]
    for norm, scale_D in (
        (adapter.attention_norm, scales.qkv_D),
        (adapter.mlp_norm, scales.gate_up_D),
    ):
        yield from _fused_norm(f"{norm}.weight", tensors, adapter.norm_offset, basis, scale_D)
    if adapter.query_norm and scales.query_key_HK is not None:
        for norm, factor_K in (
            (adapter.query_norm, 1 / scales.query_key_HK[0]),
            (adapter.key_norm, scales.query_key_HK[0]),
        ):
            gain_K = adapter.norm_offset + tensors[f"{norm}.weight"].to(factor_K.dtype)
            yield f"{norm}.weight", gain_K * factor_K.to(gain_K.device) - adapter.norm_offset


def block_maps(
    block: nn.Module,
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    basis: Basis,
    layer_index: int,
) -> tuple[dict[str, Map], dict[str, Map]]:
    """What a basis does to the columns (``reads``) and rows (``writes``) of each linear's weight.

    Args: as of ``fused_tensors``.

    Returns:
        By path inside the block; a linear that is in neither stays as it is.
    """
    scales = Scales() if basis.scales is None else basis.scales[layer_index]
    mlp_readers = (*adapter.mlp_readers(block), *adapter.routers(block))
    norms = (
        (adapter.attention_norm, adapter.attention_readers, scales.qkv_D),
        (adapter.mlp_norm, mlp_readers, scales.gate_up_D),
    )
    reads: dict[str, Map] = {}
    for norm, readers, scale_D in norms:
        gain_D = None
        if basis.residual_DD is not None:
            gain_D = adapter.norm_offset + tensors[f"{norm}.weight"].to(basis.residual_DD.dtype)
        reads |= dict.fromkeys(readers, Map(gain_D, basis.residual_DD, scale_D))
    writers = (adapter.attention_output, *adapter.mlp_writers(block))
    writes = dict.fromkeys(writers, Map(matrix=basis.residual_DD))
    _add_heads(reads, writes, adapter, basis, scales, layer_index)
    _add_up(reads, writes, block, adapter, basis, layer_index)
    return reads, writes


class Map:
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
        return Map(before, self.matrix, after, online=self.online)(x)

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


def _fused_linear(
    path: str, tensors: Mapping[str, Tensor], reads: Map, writes: Map
) -> Iterator[tuple[str, Tensor]]:
    """The weight, and the bias where there is one, if they change."""
    dtype = reads.dtype or writes.dtype
    if dtype is None:
        return
    yield f"{path}.weight", writes.on_rows(reads(tensors[f"{path}.weight"].to(dtype)))
    bias_N = tensors.get(f"{path}.bias")
    if bias_N is not None and writes.dtype is not None:
        yield f"{path}.bias", writes.on_last(bias_N.to(dtype))


def _add_heads(
    reads: dict[str, Map],
    writes: dict[str, Map],
    adapter: Adapter,
    basis: Basis,
    scales: Scales,
    layer_index: int,
) -> None:
    """R2, S of values, and S of queries and keys where no norm stands behind them."""
    R_Hdd = None if basis.value is None else basis.value[layer_index]
    S_HK = scales.value_HK
    writes[adapter.value] = Map(None if S_HK is None else 1 / S_HK, R_Hdd)
    reads[adapter.attention_output] = Map(S_HK, R_Hdd)
    if scales.query_key_HK is not None and not adapter.query_norm:
        writes[adapter.query] = Map(1 / scales.query_key_HK)
        writes[adapter.key] = Map(scales.query_key_HK)


def _add_up(
    reads: dict[str, Map],
    writes: dict[str, Map],
    block: nn.Module,
    adapter: Adapter,
    basis: Basis,
    layer_index: int,
) -> None:
    """S between up and down, and R4 behind it: its signs and Hadamard or butterfly."""
    scales = Scales() if basis.scales is None else basis.scales[layer_index]
    online: Callable[[Tensor], Tensor] | None = None if basis.down is None else fast_hadamard
    ups, downs = adapter.mlp_ups(block), adapter.mlp_writers(block)
    for expert, (up, down) in enumerate(zip(ups, downs, strict=True)):
        factors_I = None if scales.up_EI is None else scales.up_EI[expert]
        if factors_I is not None:
            writes[up] = Map(1 / factors_I)
        if basis.down is not None:
            size = cast(nn.Linear, block.get_submodule(down)).in_features
            signs_I = random_signs(size, basis.down_seed).to(basis.dtype)
            factors_I = signs_I if factors_I is None else signs_I.to(factors_I.device) * factors_I
        if basis.down_angles is not None:
            angles_AMQ = basis.down_angles[layer_index][expert]
            online = functools.partial(fast_butterfly, angles_AMQ=angles_AMQ)
        reads[down] = Map(factors_I, online=online)


def _fused_norm(
    name: str, tensors: Mapping[str, Tensor], offset: float, basis: Basis, scale_D: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """The gain 1 / S where R1 moved the old one into the readers, g / S where it stays."""
    if basis.residual_DD is None and scale_D is None:
        return
    weight_D = tensors[name]
    if basis.residual_DD is not None:
        gain_D = torch.ones_like(weight_D, dtype=basis.residual_DD.dtype)
    else:
        assert scale_D is not None
        gain_D = offset + weight_D.to(scale_D.dtype)
    if scale_D is not None:
        gain_D = gain_D / scale_D.to(gain_D.device)
    yield name, gain_D - offset


@torch.no_grad()
def fuse_outer(
    outer: dict[str, Tensor], adapter: Adapter, basis: Basis, *, in_place: bool = False
) -> dict[str, Tensor]:
    """Fuse R1 into the tensors outside the blocks; the input dict is kept.

    A tied head becomes a tensor of its own, because only the head takes the final norm's gain; if
    something lies between final norm and head, the head keeps the embedding as it was.

    Args:
        outer: By full name; the head may be missing if it is tied to the embedding.
        in_place: Overwrite the given embedding and head, which saves a copy of each.

    Returns:
        A new dict, dtypes as given. Without R1 it holds the same tensors.
    """
    fused = dict(outer)
    if basis.residual_DD is None:
        return fused
    R_DD = basis.residual_DD
    reader_path = adapter.head_reader or adapter.head
    embedding, head, norm, reader = (
        f"{path}.weight"
        for path in (adapter.embedding, adapter.head, adapter.final_norm, reader_path)
    )
    gain_D = adapter.norm_offset + outer[norm].double()
    if adapter.layer_norm:
        fused |= fold_final_bias(outer, adapter.final_norm, reader_path, R_DD)
    if head not in outer or (reader == head and not in_place):
        fused[head] = outer.get(head, outer[embedding]).clone()
    reader_VD = fused[reader] if in_place or reader == head else outer[reader].clone()
    fused[reader] = _rotate_rows(reader_VD, gain_D[:, None] * R_DD.to(gain_D.device))
    for name in (embedding, *(f"{path}.weight" for path in adapter.other_writers)):
        fused[name] = _rotate_rows(outer[name] if in_place else outer[name].clone(), R_DD)
    fused[norm] = torch.full_like(outer[norm], 1 - adapter.norm_offset)
    return fused


def in_basis(hidden_BTD: Tensor, basis: Basis) -> Tensor:
    """Hidden states of the original model as the fused one has them, in their dtype."""
    R_DD = basis.residual_DD
    return hidden_BTD if R_DD is None else hidden_BTD @ R_DD.to(hidden_BTD)


@contextmanager
def exact_norms(module: nn.Module) -> Iterator[None]:
    """Compute the RMSNorms inside ``module`` in their input's dtype.

    transformers computes them in fp32 whatever comes in, which hides an exact rotation behind
    errors of 1e-7. Modules on meta may be given: gains are read when the norm is called.

    Raises:
        ValueError: a module named RMSNorm is none that is known here.
    """
    norms = [m for m in module.modules() if type(m).__name__.endswith("RMSNorm")]
    offsets = [_gain_offset(norm) for norm in norms]
    for norm, offset in zip(norms, offsets, strict=True):
        norm.forward = functools.partial(_exact_norm, norm, offset)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _rotate_rows(rows_VD: Tensor, R_DD: Tensor) -> Tensor:
    """Overwrite the rows with their products in fp64; returns them."""
    R_DD = R_DD.to(rows_VD.device)
    for start in range(0, len(rows_VD), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        rows_VD[some] = (rows_VD[some].double() @ R_DD).to(rows_VD.dtype)
    return rows_VD


def _parameter(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _epsilon(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(norm, name, None), float):
            return cast(float, getattr(norm, name))
    raise ValueError(f"{type(norm).__name__} has neither variance_epsilon nor eps")


def normalized(norm: nn.Module, x_ND: Tensor) -> Tensor:
    """What an RMSNorm makes of its input before the gain, in the input's dtype."""
    return x_ND * torch.rsqrt(x_ND.pow(2).mean(-1, keepdim=True) + _epsilon(norm))


def _exact_norm(norm: nn.Module, offset: float, x_ND: Tensor) -> Tensor:
    return normalized(norm, x_ND) * (offset + _parameter(norm).to(x_ND.dtype))


def _gain_offset(norm: nn.Module) -> float:
    """0 where the gain is the weight, 1 where it is 1 + weight; asked of the module's forward."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad():
        _parameter(probe).fill_(0.25)
        gain = probe(torch.ones_like(_parameter(probe))) * (1 + _epsilon(norm)) ** 0.5
    for offset in (0.0, 1.0):
        if torch.allclose(gain, torch.full_like(gain, offset + 0.25), atol=1e-3):
            return offset
    raise ValueError(f"{type(norm).__name__} is not an RMSNorm with gain w or 1 + w")
