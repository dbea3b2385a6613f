"""What transformers computes in fp32 whatever comes in, computed in its input's dtype instead.

An exact rotation would be hidden behind errors of 1e-7 otherwise.

Shape suffixes: N tokens, D hidden size.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers.models.esm import modeling_esm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@contextmanager
def exact_norms(module: nn.Module) -> Iterator[None]:
    """Compute the RMSNorms inside ``module`` in their input's dtype.

    Modules on meta may be given: gains are read when the norm is called.

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


@contextmanager
def exact_rotary() -> Iterator[None]:
    """Let ESM turn queries and keys to their positions in their own dtype."""
    before = modeling_esm.apply_rotary_pos_emb
    modeling_esm.apply_rotary_pos_emb = apply_rotary_pos_emb
    try:
        yield
    finally:
        modeling_esm.apply_rotary_pos_emb = before


def normalized(norm: nn.Module, x_ND: Tensor) -> Tensor:
    """What an RMSNorm makes of its input before the gain, in the input's dtype."""
    return x_ND * torch.rsqrt(x_ND.pow(2).mean(-1, keepdim=True) + _epsilon(norm))


def _exact_norm(norm: nn.Module, offset: float | None, x_ND: Tensor) -> Tensor:
    if offset is None:
        return normalized(norm, x_ND)
    return normalized(norm, x_ND) * (offset + _parameter(norm).to(x_ND.dtype))


def _gain_offset(norm: nn.Module) -> float | None:
    """0 where the gain is the weight, 1 where it is 1 + weight; asked of the module's forward.

    None where it has no gain.
    """
    if getattr(norm, "weight", None) is None:
        return None
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad():
        _parameter(probe).fill_(0.25)
        gain = probe(torch.ones_like(_parameter(probe))) * (1 + _epsilon(norm)) ** 0.5
    for offset in (0.0, 1.0):
        if torch.allclose(gain, torch.full_like(gain, offset + 0.25), atol=1e-3):
            return offset
    raise ValueError(f"{type(norm).__name__} is not an RMSNorm with gain w or 1 + w")


def _parameter(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _epsilon(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(norm, name, None), float):
            return cast(float, getattr(norm, name))
    raise ValueError(f"{type(norm).__name__} has neither variance_epsilon nor eps")
