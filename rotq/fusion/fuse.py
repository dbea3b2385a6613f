"""Fusing a basis into a model's weights, without changing its function.

Activations are rows, a linear layer is y = x W^T + b. With R1 on the residual stream, g the gain
of the norm in front of a reader, per KV head h an R2, and S what ``Scales`` holds:

    embedding        E   <- E R1                    and image features, see ``models.multimodal``
    readers          W   <- W diag(g) R1 diag(S)    q, k, v, gate, up, router, head;  g <- 1 / S
    writers          W   <- R1^T W,  b <- b R1      o, down
    v, head h        W_h <- R2_h^T diag(1/S_h) W_h,  b_h <- b_h diag(1/S_h) R2_h
    o, columns of each query head in group h:  W <- W diag(S_h) R2_h
    q, k, head h     W_h <- diag(1/S_h) W_h,  W_h <- diag(S_h) W_h, biases too; behind a norm on
                     the heads its gain is divided or multiplied instead
    up               W   <- diag(1/S) W,  b <- b diag(1/S)
    R3: nothing; queries and keys are multiplied by H online
    R4: down         W   <- W diag(S) D H, its input is multiplied by D H online; in diagonal
                     blocks of b features D H is kron(I, D_b H_b); of all linear layers where the
                     basis says ``inputs``, and then nothing above is in it

RMSNorm without gain commutes with R1, which is why g has to be folded first; without R1 it stays
and is divided by S. What LayerNorm needs besides is in ``layernorm``. The order of factors matters:
S of a norm stands behind R1, S of values before R2, S of up before D H. All products are taken in
the basis' dtype, fp64 in a job. (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406, whose names
R1 to R4 are used; OSTQuant, arXiv 2501.13987, for S. Unlike QuaRot's code the embedding is not
centred: that changes an RMSNorm model.)

Shape suffixes: N out features, K in features, D hidden size, H KV heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from rotq.fusion.layernorm import fold_final_bias, fold_layer_norm
from rotq.fusion.maps import LinearMap, block_maps, gain, norm_scales, online_layers
from rotq.layers.online_heads import OnlineHeads
from rotq.layers.online_linear import OnlineLinear
from rotq.layers.online_residual import turn_ends
from rotq.models.adapter import Adapter
from rotq.models.attention.online import set_heads
from rotq.rotations.basis import Basis, Scales

_ROWS_AT_ONCE = 1024
"""Rows of an embedding that are held in fp64 at a time."""


@torch.no_grad()
def fuse_block(block: nn.Module, adapter: Adapter, basis: Basis, layer_index: int) -> None:
    """Fuse a basis into one block, in place, and let it do what is done at run time.

    Weights keep their dtype; pass an fp64 block to have them unrounded. With R4 the down
    projections become OnlineLinear. An identity basis changes nothing.

    Args:
        layer_index: Which of the basis' value matrices and scales are this block's.
    """
    fold_norms(block, adapter, basis)
    parameters = dict(block.named_parameters())
    for name, tensor in fused_tensors(block, parameters, adapter, basis, layer_index):
        parameters[name].copy_(tensor)
    rotate_online(block, adapter, basis)
    if basis.ends is not None:
        signs_D = basis.ends.signs_D.to(next(block.parameters()).device)
        is_last = layer_index == basis.ends.last_block
        turn_ends(block, signs_D, first=layer_index == 0, last=is_last)


@torch.no_grad()
def fold_norms(block: nn.Module, adapter: Adapter, basis: Basis) -> None:
    """Leave a block's LayerNorms with gain 1, in place, if R1 is to be fused; see ``layernorm``.

    What it does depends on no matrix of the basis, so a training folds once for all its steps.
    """
    if not adapter.layer_norm or basis.residual_DD is None:
        return
    for norm, readers in adapter.norms(block).items():
        linears = [cast(nn.Linear, block.get_submodule(path)) for path in readers]
        fold_layer_norm(block.get_submodule(norm), linears, offset=adapter.norm_offset)


@torch.no_grad()
def rotate_online(block: nn.Module, adapter: Adapter, basis: Basis) -> None:
    """Apply R3 and R4 from now on, where the basis has them; weights stay as they are."""
    if basis.attention is not None:
        set_heads(block.get_submodule(adapter.attention), OnlineHeads(rotated=True))
    for path in online_layers(block, adapter, basis):
        linear = cast(nn.Linear, block.get_submodule(path))
        signs_R = basis.down_signs(linear.in_features).to(linear.weight.device)
        parent, _, leaf = path.rpartition(".")
        online = OnlineLinear.wrap(linear, signs_R=signs_R)
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
        tensors: The original parameters by path inside the block, behind ``fold_norms``; cast to
            the basis' dtype.

    Yields:
        Path and tensor of the basis' dtype.
    """
    reads, writes = block_maps(block, tensors, adapter, basis, layer_index)
    same = LinearMap()
    for path in dict.fromkeys((*reads, *writes)):
        yield from _fused_linear(path, tensors, reads.get(path, same), writes.get(path, same))
    scales = Scales() if basis.scales is None else basis.scales[layer_index]
    scale_of = norm_scales(adapter, scales)
    for norm in adapter.norms(block):
        yield from _fused_norm(f"{norm}.weight", tensors, adapter, basis, scale_of.get(norm))
        yield from _fused_norm_bias(f"{norm}.bias", tensors, basis, scale_of.get(norm))
    if adapter.query_norm and scales.query_key_HK is not None:
        for norm, factor_K in (
            (adapter.query_norm, 1 / scales.query_key_HK[0]),
            (adapter.key_norm, scales.query_key_HK[0]),
        ):
            gain_K = adapter.norm_offset + tensors[f"{norm}.weight"].to(factor_K.dtype)
            yield f"{norm}.weight", gain_K * factor_K.to(gain_K.device) - adapter.norm_offset


def _fused_linear(
    path: str, tensors: Mapping[str, Tensor], reads: LinearMap, writes: LinearMap
) -> Iterator[tuple[str, Tensor]]:
    """The weight, and the bias where there is one, if they change."""
    dtype = reads.dtype or writes.dtype
    if dtype is None:
        return
    yield f"{path}.weight", writes.on_rows(reads(tensors[f"{path}.weight"].to(dtype)))
    bias_N = tensors.get(f"{path}.bias")
    if bias_N is not None and writes.dtype is not None:
        yield f"{path}.bias", writes.on_last(bias_N.to(dtype))


def _fused_norm(
    name: str, tensors: Mapping[str, Tensor], adapter: Adapter, basis: Basis, scale_D: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """The gain 1 / S where R1 moved the old one into the readers, g / S where it stays."""
    like = scale_D if basis.residual_DD is None else basis.residual_DD
    if like is None:
        return
    gain_D = gain(name, tensors, adapter, like)
    if gain_D is None:
        return
    if basis.residual_DD is not None:
        gain_D = torch.ones_like(gain_D)
    if scale_D is not None:
        gain_D = gain_D / scale_D.to(gain_D.device)
    yield name, gain_D - adapter.norm_offset


def _fused_norm_bias(
    name: str, tensors: Mapping[str, Tensor], basis: Basis, scale_D: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """What a LayerNorm adds, in the new basis and divided by S."""
    added_D, like = tensors.get(name), scale_D if basis.residual_DD is None else basis.residual_DD
    if added_D is None or like is None:
        return
    added_D = added_D.to(like.device, like.dtype)
    if basis.residual_DD is not None:
        added_D = added_D @ basis.residual_DD
    yield name, added_D if scale_D is None else added_D / scale_D.to(added_D.device)


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
        A new dict, dtypes as given. Without R1, or where R1 begins and ends at run time, it holds
        the same tensors.
    """
    fused = dict(outer)
    R_DD = basis.residual_DD
    if R_DD is None or basis.ends is not None:
        return fused
    reader_path = adapter.head_reader or adapter.head
    embedding, head, norm, reader = (
        f"{path}.weight"
        for path in (adapter.embedding, adapter.head, adapter.final_norm, reader_path)
    )
    gain_D = gain(norm, outer, adapter, R_DD)
    if head not in outer or (reader == head and not in_place):
        fused[head] = outer.get(head, outer[embedding]).clone()
    if adapter.layer_norm:
        fused |= fold_final_bias(
            fused, adapter.final_norm, reader_path, R_DD, offset=adapter.norm_offset
        )
    reader_VD = fused[reader] if in_place or reader == head else outer[reader].clone()
    folded_DD = R_DD if gain_D is None else gain_D[:, None] * R_DD.to(gain_D.device)
    fused[reader] = _rotate_rows(reader_VD, folded_DD)
    for name in (embedding, *(f"{path}.weight" for path in adapter.other_writers)):
        fused[name] = _rotate_rows(outer[name] if in_place else outer[name].clone(), R_DD)
    if norm in outer:
        fused[norm] = torch.full_like(outer[norm], 1 - adapter.norm_offset)
    return fused


@torch.no_grad()
def fuse_writer(tensor: Tensor, basis: Basis) -> Tensor:
    """A weight (D, K) or a vector (D) of what writes rows of the residual stream, with R1 fused.

    Returns:
        A new tensor of the dtype of ``tensor``; without R1 the same one.
    """
    if basis.residual_DD is None:
        return tensor
    R_DD = basis.residual_DD.to(tensor.device)
    return (R_DD.T @ tensor.to(R_DD.dtype)).to(tensor.dtype)


def in_basis(hidden_BTD: Tensor, basis: Basis) -> Tensor:
    """Hidden states of the original model as the fused one has them, in their dtype."""
    R_DD = basis.residual_DD
    return hidden_BTD if R_DD is None else hidden_BTD @ R_DD.to(hidden_BTD)


def _rotate_rows(rows_VD: Tensor, R_DD: Tensor) -> Tensor:
    """Overwrite the rows with their products in fp64; returns them."""
    R_DD = R_DD.to(rows_VD.device)
    for start in range(0, len(rows_VD), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        rows_VD[some] = (rows_VD[some].double() @ R_DD).to(rows_VD.dtype)
    return rows_VD
