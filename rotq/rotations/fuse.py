"""Fusing a basis into a model's weights, without changing its function.

Activations are rows, a linear layer is y = x W^T + b. With R1 on the residual stream, g the gain
of the norm in front of a reader, and per KV head h an R2:

    embedding        E   <- E R1
    readers          W   <- W diag(g) R1            q, k, v, gate, up, router, head;  g <- 1
    writers          W   <- R1^T W,  b <- b R1      o, down
    v, head h        W_h <- R2_h^T W_h,  b_h <- b_h R2_h
    o, columns of each query head in group h:  W <- W R2_h
    R3: nothing; queries and keys are multiplied by H online
    R4: down         W   <- W D H, its input is multiplied by D H online

RMSNorm without gain commutes with R1, which is why g has to be folded first; what LayerNorm needs
besides is in ``layernorm``. All products are taken in fp64. (QuaRot, arXiv 2404.00456; SpinQuant,
arXiv 2405.16406, whose names R1 to R4 are used. Unlike QuaRot's code the embedding is not
centred: that changes an RMSNorm model.)

Shape suffixes: N out features, K in features, D hidden size, H KV heads, d head size.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rotq.heads import OnlineHeads
from rotq.layers import OnlineLinear
from rotq.models.online_attention import set_heads
from rotq.rotations.basis import Basis
from rotq.rotations.hadamard import fast_hadamard, random_signs
from rotq.rotations.layernorm import fold_final_bias, fold_layer_norm

if TYPE_CHECKING:
    from rotq.models.adapter import Adapter

_ROWS_AT_ONCE = 1024
"""Rows of an embedding that are held in fp64 at a time."""


@torch.no_grad()
def fuse_block(block: nn.Module, adapter: Adapter, basis: Basis, layer_index: int) -> None:
    """Fuse R1, R2 and R4 into one block, in place, and let its attention apply R3.

    Weights keep their dtype; pass an fp64 block to have them unrounded. With R4 the down
    projections become OnlineLinear. An identity basis changes nothing.

    Args:
        layer_index: Which of the basis' value matrices are this block's.
    """
    if basis.residual_DD is not None:
        R_DD = basis.residual_DD
        readers = adapter.attention_readers
        _fold_norm(block, adapter.attention_norm, readers, adapter.norm_offset, R_DD)
        mlp_readers = (*adapter.mlp_readers(block), *adapter.routers(block))
        _fold_norm(block, adapter.mlp_norm, mlp_readers, adapter.norm_offset, R_DD)
        for path in (*readers, *mlp_readers):
            _rotate_input(block.get_submodule(path), R_DD)
        for path in (adapter.attention_output, *adapter.mlp_writers(block)):
            _rotate_output(block.get_submodule(path), R_DD)
    if basis.value is not None:
        value = block.get_submodule(adapter.value)
        _rotate_heads(
            value, block.get_submodule(adapter.attention_output), basis.value[layer_index]
        )
    if basis.attention is not None:
        set_heads(block.get_submodule(adapter.attention), OnlineHeads(rotated=True))
    if basis.down is not None:
        for path in adapter.mlp_writers(block):
            _rotate_online(block, path, basis.down_seed)


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


def _fold_norm(
    block: nn.Module, norm_path: str, readers: tuple[str, ...], offset: float, R_DD: Tensor
) -> None:
    norm = block.get_submodule(norm_path)
    if isinstance(norm, nn.LayerNorm):
        fold_layer_norm(
            norm, [cast(nn.Linear, block.get_submodule(path)) for path in readers], R_DD
        )
        return
    gain_D = offset + _parameter(norm).double()
    for path in readers:
        weight_NK = _parameter(block.get_submodule(path))
        weight_NK.copy_(weight_NK.double() * gain_D)
    _parameter(norm).fill_(1 - offset)


def _rotate_input(linear: nn.Module, R_KK: Tensor) -> None:
    weight_NK = _parameter(linear)
    weight_NK.copy_(weight_NK.double() @ R_KK.to(weight_NK.device))


def _rotate_output(linear: nn.Module, R_NN: Tensor) -> None:
    weight_NK = _parameter(linear)
    R_NN = R_NN.to(weight_NK.device)
    weight_NK.copy_(R_NN.T @ weight_NK.double())
    bias_N = getattr(linear, "bias", None)
    if bias_N is not None:
        bias_N.copy_(bias_N.double() @ R_NN)


def _rotate_heads(value: nn.Module, output: nn.Module, R_Hdd: Tensor) -> None:
    H, d, _ = R_Hdd.shape
    # the values are the last rows where q, k and v are one layer
    value_NK, output_NK = _parameter(value)[-H * d :], _parameter(output)
    R_Hdd = R_Hdd.to(value_NK.device)
    rotated_HdK = R_Hdd.mT @ value_NK.double().view(H, d, -1)  # [H, d, d] @ [H, d, K]
    value_NK.copy_(rotated_HdK.view_as(value_NK))
    bias_N = getattr(value, "bias", None)
    if bias_N is not None:
        bias_N = bias_N[-H * d :]
        bias_N.copy_((bias_N.double().view(H, 1, d) @ R_Hdd).view_as(bias_N))
    # the query heads of one KV head lie next to each other: [N, H, heads per group, d] @ [H, d, d]
    columns = output_NK.double().view(len(output_NK), H, -1, d)
    output_NK.copy_((columns @ R_Hdd).reshape_as(output_NK))


def _rotate_online(block: nn.Module, path: str, seed: int) -> None:
    linear = cast(nn.Linear, block.get_submodule(path))
    weight_NK = _parameter(linear)
    signs_K = random_signs(linear.in_features, seed).to(weight_NK.device)
    weight_NK.copy_(fast_hadamard(weight_NK.double(), signs_n=signs_K))
    parent, _, leaf = path.rpartition(".")
    setattr(block.get_submodule(parent), leaf, OnlineLinear.wrap(linear, signs_K=signs_K))


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


def _exact_norm(norm: nn.Module, offset: float, x_ND: Tensor) -> Tensor:
    scale_N1 = torch.rsqrt(x_ND.pow(2).mean(-1, keepdim=True) + _epsilon(norm))
    return x_ND * scale_N1 * (offset + _parameter(norm).to(x_ND.dtype))


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
