"""Rotations of models with LayerNorm, in such a way that LayerNorm stays LayerNorm.

LayerNorm takes the mean out before it normalizes: norm(x) = x P / rms(x P), P = I - 1 1^T / D. An
orthogonal R commutes with P, and so with the norm, where it leaves the all-ones direction alone:

    1 R = 1    <=>    R = Q blockdiag(1, R') Q^T,   first column of Q: 1 / sqrt(D)

Any orthogonal R becomes such a matrix by one reflection behind it, which spreads as well as R does.
Gain g and bias c go into the readers before that, y = (norm(x) g + c) W^T + b:

    W <- W diag(g) R,   b <- b + c W^T,   g <- 1,   c <- 0
    c <- (c / g) R      where readers have no bias: what the norm adds stays in the norm

Scalings S of what is read divide gain and what is added alike: g <- g / S, c <- c / S.

So the model keeps its class. Replacing the norms by RMSNorms and centring what is written to the
stream would be exact too, but no class of transformers could load the result.

Shape suffixes: N out features, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from rotq.errors import RotqError


def leave_ones_alone(R_DD: Tensor) -> Tensor:
    """An orthogonal matrix with 1 R = 1 close to ``R_DD``: R (I - 2 w w^T), w ~ 1 R - 1.

    Args:
        R_DD: Orthogonal, fp64; not modified.
    """
    ones_D = torch.ones(len(R_DD), dtype=R_DD.dtype, device=R_DD.device)
    w_D = ones_D @ R_DD - ones_D
    length = w_D.norm()
    if length < 1e-9 * len(R_DD):
        return R_DD.clone()
    w_D /= length
    return R_DD - 2 * torch.outer(R_DD @ w_D, w_D)


def fold_layer_norm(norm: nn.Module, readers: Sequence[nn.Linear], *, offset: float = 0.0) -> None:
    """Move gain and bias of a LayerNorm into its readers, in place; nothing is rotated.

    Args:
        norm: Left with gain 1, and bias 0 or what the readers could not take, c / g. It may have no
            bias, and no gain.
        readers: All linear layers that read it, each once; routers too.
        offset: The gain is ``offset + weight``.

    Raises:
        RotqError: what the norm adds cannot be kept: a gain is zero, and readers have no bias.
    """
    if getattr(norm, "weight", None) is None:
        return
    weight_D, bias_D = cast(Tensor, norm.weight), cast(Tensor | None, getattr(norm, "bias", None))
    gain_D = offset + weight_D.double()
    added_D = None if bias_D is None else bias_D.double()
    taken = [getattr(reader, "bias", None) is not None for reader in readers]
    if bias_D is not None and added_D is not None and not all(taken):
        bias_D.copy_(kept_bias(gain_D, added_D))
    elif bias_D is not None and added_D is not None:
        for reader in readers:
            reader.bias.copy_(reader.bias.double() + reader.weight.double() @ added_D)
        bias_D.zero_()
    for reader in readers:
        reader.weight.copy_(reader.weight.double() * gain_D)
    weight_D.fill_(1 - offset)


def kept_bias(gain_D: Tensor, added_D: Tensor) -> Tensor:
    """c / g: what a norm must add when its gain has gone into readers without biases, fp64.

    Raises:
        RotqError: a gain is zero.
    """
    if not bool(gain_D.all()):
        raise RotqError(
            "a LayerNorm has a gain of zero, and its readers have no bias to take what it adds; "
            "set rotation.residual=none"
        )
    return added_D.double() / gain_D.double()


def fold_final_bias(
    outer: dict[str, Tensor], norm: str, reader: str, R_DD: Tensor, *, offset: float = 0.0
) -> dict[str, Tensor]:
    """Biases of the final norm and of the layer that reads it, after folding; dtypes as given.

    Args:
        outer: Tensors by full name, before folding; not modified.
        norm: Path of the final norm, whose gain is ``offset + weight``.
        reader: Path of the linear layer that reads it.
    """
    added_D = outer.get(f"{norm}.bias")
    if added_D is None:
        return {}
    reader_bias_N = outer.get(f"{reader}.bias")
    if reader_bias_N is None:
        gain_D = offset + outer[f"{norm}.weight"].double()
        kept_D = kept_bias(gain_D, added_D) @ R_DD.to(added_D.device)
        return {f"{norm}.bias": kept_D.to(added_D.dtype)}
    moved_N = outer[f"{reader}.weight"].double() @ added_D.double()
    return {
        f"{norm}.bias": torch.zeros_like(added_D),
        f"{reader}.bias": (reader_bias_N.double() + moved_N).to(reader_bias_N.dtype),
    }
