"""Put a layer's constants together: basis, query metric, mean, codebooks.

The query metric (kv-measured: alpha about 0.5): a score's error is x.e with x a query and e the
key's error, so what counts is e M e, M = E[x x]. Coding y = A k with A = Q P^(1/2) moves error
from where queries are strong to where they are weak.

Shape suffixes: H KV heads, D head width, L levels, E thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from rotq.kv.calibration.codebook import Codebook, gaussian_codebook
from rotq.kv.presets import KVSpec
from rotq.models.rotary import KVShape, Rotary
from rotq.numerics import inverse
from rotq.ops import KVConstants, KVFormat, SideConstants
from rotq.rotations.hadamard import orthogonal

_BASIS_SEED = 0
_SKETCH_SEED = 1
_SMALLEST_RMS = 1e-30
_OCTAVES = 16
BOOSTED_BITS = (2, 3, 4)
"""Of codes whose decoded rows have factors of their own; see ``boost``."""
"""Factors of two that a log8 norm spans."""


def hadamard_basis(head_dim: int) -> Tensor:
    """(D, D) fp64 orthogonal: randomized Hadamard, in diagonal blocks where there is no whole."""
    try:
        return orthogonal("hadamard", head_dim, _BASIS_SEED)
    except ValueError:
        return orthogonal("block_hadamard", head_dim, _BASIS_SEED)


def kv_format(spec: KVSpec, head_dim: int, layer: int, num_layers: int) -> KVFormat:
    """The stored shape of one layer."""
    k_bits, v_bits = spec.layer_bits(layer, num_layers)
    return KVFormat(
        head_dim=head_dim,
        k_bits=k_bits,
        v_bits=v_bits,
        norm=spec.norm,
        residual=spec.residual,
    )


def side_constants(
    matrix_HDD: Tensor,
    mean_HD: Tensor,
    codebooks: Sequence[Codebook],
    *,
    gain: Literal["lsq", "norm", "none"],
    base_H: Tensor,
    metric_HDD: Tensor | None = None,
    search: int = 0,
) -> SideConstants:
    """One side's constants in fp32; the inverse is taken in fp64.

    Args:
        matrix_HDD: A, invertible.
        mean_HD: Zeros where none is removed.
        codebooks: Of each head.
        gain: How the norm is chosen.
        base_H: log2 of the norm of code 0; for ``norm="none"``, of every norm.
        metric_HDD: What an error of y costs, for ``search``.
        search: Elements of a token that may move.
    """
    return SideConstants(
        matrix_HDD=matrix_HDD.float().contiguous(),
        inverse_HDD=stored_inverse(matrix_HDD),
        mean_HD=mean_HD.float().contiguous(),
        levels_HL=torch.stack([book.levels_L for book in codebooks]),
        thresholds_HL=torch.stack([book.thresholds_E for book in codebooks]),
        base_H=base_H.float(),
        gain=gain,
        unit_H=torch.tensor([book.unit for book in codebooks], dtype=torch.float32),
        metric_HDD=metric_HDD.float().contiguous() if metric_HDD is not None and search else None,
        search=search,
    )


def stored_inverse(matrix_HDD: Tensor) -> Tensor:
    """fp32 inverse of A rounded to fp32, taken in fp64."""
    return inverse(matrix_HDD.float().double()).float().contiguous()


def centred_base(rms_H: Tensor, unit_H: Tensor) -> Tensor:
    """base_H that puts the norm of a token of typical size at the middle of the codes.

    Args:
        rms_H: Typical rms of y; 0 counts as tiny.
        unit_H: What a level of 1 is worth in units of that.
    """
    return (rms_H.clamp(min=_SMALLEST_RMS) * unit_H).log2() - _OCTAVES / 2


def orthogonal_sketch(head_dim: int) -> Tensor:
    """(D, D) fp32 S with S S^T = 1: a Hadamard basis of other signs than the codes' own."""
    basis_DD = hadamard_basis(head_dim)
    generator = torch.Generator().manual_seed(_SKETCH_SEED)
    order_D = torch.randperm(head_dim, generator=generator)
    return (basis_DD[:, order_D] @ basis_DD).float()


def gaussian_sketch(head_dim: int) -> Tensor:
    """(D, D) fp32 of independent N(0, 1), as TurboQuant's algorithm 2 has it."""
    generator = torch.Generator().manual_seed(_SKETCH_SEED)
    return torch.randn(head_dim, head_dim, generator=generator)


def unbiased_scale(spec: KVSpec, head_dim: int) -> float:
    """c that makes E[c g x S^T sign(S r)] = x r, with g the rms of r.

    sqrt(pi / 2) / D |r| for rows of N(0, 1), |r| = g sqrt(D); rows of norm 1 are longer than they
    count by sqrt(D), which goes once more (QJL, arXiv 2406.03482, lemma 3.2).
    """
    if spec.sketch == "gaussian":
        return math.sqrt(math.pi / 2 / head_dim)
    return math.sqrt(math.pi / 2)


def layer_constants(
    spec: KVSpec,
    shape: KVShape,
    format: KVFormat,
    *,
    key: SideConstants,
    value: SideConstants,
    rotary: Rotary | None,
    residual_scale_H: Tensor | None = None,
    gamma_base_H: Tensor | None = None,
) -> KVConstants:
    """A layer's constants; ``mean="rope"`` becomes static where the layer's RoPE is unknown."""
    mean = "static" if spec.mean == "rope" and rotary is None else spec.mean
    turned = mean == "rope" and rotary is not None
    sketch_DD = None
    if spec.residual == "qjl":
        make = gaussian_sketch if spec.sketch == "gaussian" else orthogonal_sketch
        sketch_DD = make(shape.head_dim)
    return KVConstants(
        format=format,
        key=key,
        value=value,
        mean=mean,
        inv_freq_R=rotary.inv_freq_R if turned and rotary else None,
        rotary_scale=rotary.scale if turned and rotary else 1.0,
        sketch_DD=sketch_DD,
        residual_scale_H=residual_scale_H,
        gamma_base_H=gamma_base_H,
    )


def recoded(constants: KVConstants, k_bits: int, v_bits: int) -> KVConstants:
    """The same with other bits: codebooks for the unit normal where they change."""
    form = replace(constants.format, k_bits=k_bits, v_bits=v_bits)
    return replace(
        constants,
        format=form,
        key=recoded_side(constants.key, constants.format.k_bits, k_bits),
        value=recoded_side(constants.value, constants.format.v_bits, v_bits),
    )


def search_steps(search: int, bits: int) -> int:
    """Elements of a token that may move: twice as many at 2 bits, where more round badly."""
    return 2 * search if bits == 2 else search


def boost_of(boost_HC: Tensor, bits: int) -> Tensor:
    """(H,) factors of decoded rows; 1 for bits that have none."""
    if bits not in BOOSTED_BITS:
        return torch.ones_like(boost_HC[:, 0])
    return boost_HC[:, BOOSTED_BITS.index(bits)]


def recoded_side(side: SideConstants, old_bits: int, bits: int) -> SideConstants:
    """One side of ``recoded``."""
    if bits == old_bits:
        return side
    inverse_HDD = side.inverse_HDD
    if side.boost_HC is not None:
        ratio_H = boost_of(side.boost_HC, bits) / boost_of(side.boost_HC, old_bits)
        inverse_HDD = inverse_HDD * ratio_H[:, None, None]
    book, heads = gaussian_codebook(bits), side.base_H.numel()
    search = side.search // 2 if old_bits == 2 else side.search
    return replace(
        side,
        search=search_steps(search, bits),
        inverse_HDD=inverse_HDD,
        levels_HL=book.levels_L.expand(heads, -1).contiguous(),
        thresholds_HL=book.thresholds_E.expand(heads, -1).contiguous(),
        base_H=side.base_H + (book.unit / side.unit_H).log2(),
        unit_H=torch.full_like(side.unit_H, book.unit),
    )
