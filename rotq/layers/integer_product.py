"""A linear layer in integers on a CPU: codes of tokens times codes of weights, scaled afterwards.

    y_mn = sum_g s_ng s_m (sum_{k in g} q_mk w_nk - z_m sum_{k in g} w_nk) + b_n,    w = q - z

The inner sums are exact in int32, so y differs from the product of dense tensors by that one's
rounding only. Processors with VNNI multiply int8 several times as fast as fp32.

Shape suffixes: M tokens, N out features, K in features, G groups of K.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rotq.formats.activations import ActivationGrid, token_codes
from rotq.formats.integer import Grid, Quantized

TOKEN_BITS = 8
"""Of activations that are multiplied so; with fewer, tokens cost as much and say less."""


def can_multiply_integers(x: Tensor, grid: Grid, input_grid: ActivationGrid | None) -> bool:
    """Whether ``integer_linear`` can take the place of a dense product, and be faster.

    Args:
        x: What the layer is given.
        grid: Of the weight, whose codes less zero points must fit int8.
        input_grid: Of the inputs; None leaves them as they are.
    """
    is_differentiated = x.requires_grad and torch.is_grad_enabled()
    usable = x.device.type == "cpu" and x.dtype != torch.float64 and not is_differentiated
    return usable and is_in_bytes(grid, input_grid) and multiplies_exactly()


def is_in_bytes(grid: Grid, input_grid: ActivationGrid | None) -> bool:
    """Whether inputs are rounded to 8 bits, and codes of the weight less zero points fit int8."""
    rounds = input_grid is not None and input_grid.bits == TOKEN_BITS
    return rounds and (grid.symmetric or grid.bits < TOKEN_BITS)


@functools.cache
def multiplies_exactly() -> bool:
    """Whether this process's int8 products are fast, and right.

    torch looks for VNNI in the processor, oneDNN may have been told to use less of it
    (``ONEDNN_MAX_CPU_ISA``), and what they make of int8 together is wrong then (torch 2.13).
    """
    if not torch.cpu._is_vnni_supported():
        return False
    left_MK = torch.arange(32 * 64).remainder(255).sub(127).to(torch.int8).view(32, 64)
    right_KN = left_MK[:16].T.flip(0)
    exact_MN = left_MK.double() @ right_KN.double()
    return torch.equal(torch._int_mm(left_MK, right_KN).double(), exact_MN)


def integer_linear(
    x: Tensor, weight: Quantized, bias_N: Tensor | None, input_grid: ActivationGrid
) -> Tensor:
    """Q(x) W^T + b over the last axis of ``x``, in its dtype.

    Args:
        x: (..., K), rotated already; not fp64.
        weight: Codes of (N, K), on the CPU.
        bias_N: Any floating dtype.
        input_grid: Each token is rounded to it, with a scale and a zero point of its own.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    q_MK, scale_M1, zero_M1 = token_codes(x_MK.float(), input_grid)
    w_NGg = weight.q_NK.unflatten(1, (weight.scale_NG.shape[1], -1))
    if weight.zero_NG is not None:
        w_NGg = w_NGg - weight.zero_NG[..., None]
    y_MN = torch.zeros(len(x_MK), len(w_NGg))
    for g, q_Mg in enumerate(q_MK.chunk(w_NGg.shape[1], dim=1)):
        w_Ng = w_NGg[:, g].contiguous()
        sums_MN = torch._int_mm(q_Mg.contiguous(), w_Ng.T).float()
        if zero_M1 is not None:
            sums_MN -= zero_M1 * w_Ng.sum(1, dtype=torch.int32).float()
        y_MN.addcmul_(sums_MN, weight.scale_NG[:, g].float()[None])
    y_MN *= scale_M1
    if bias_N is not None:
        y_MN += bias_N.float()
    return y_MN.to(x.dtype).view(*x.shape[:-1], y_MN.shape[1])
